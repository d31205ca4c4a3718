"""What events of the page are wired with: nothing fades while one runs, and programs have endpoints of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr

QUIET = {"show_progress": "hidden", "api_visibility": "private"}
RUNS = {"concurrency_limit": 16, "concurrency_id": "runs"}  # of whatever asks the machine


def owner_of(request: gr.Request) -> str:
    """Whose question this is: a browser session, or that of a program."""
    return request.session_hash or "nobody"


def tell_end(event: gr.events.Dependency, elem_id: str) -> None:
    """Tell the component in the browser when the server is done with `event`, however that ended: an error that nobody
    words, a full queue and a lost connection leave no value behind, and a value like the one before is not seen."""
    js = f"() => document.dispatchEvent(new CustomEvent('llmq-ended', {{ detail: '{elem_id}' }}))"
    for after in (event.then, event.failure):  # `then` alone is not called after an error
        after(None, js=js, **QUIET)
