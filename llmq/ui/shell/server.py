"""What the jobs need of the web server: it tells who listens, and answers their owner."""

from __future__ import annotations

from starlette.middleware import Middleware

from llmq.ui.shell.listening import Ears
from llmq.ui.shell.owner import routes_of
from llmq.ui.shell.state import AppState


def watched(options: dict, state: AppState) -> dict:
    """`options` of the web server, and what watches over the jobs of `state`."""
    if state.jobs is None:
        return options
    ears = Middleware(Ears, listeners=state.jobs.listeners, uploaded=state.prune)
    return options | {
        "middleware": [*options.get("middleware", ()), ears],
        "routes": [*options.get("routes", ()), *routes_of(state.jobs)],
    }
