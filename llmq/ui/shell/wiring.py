"""What events of the page are wired with: nothing fades while one runs, and programs have endpoints of their own.

Gradio streams the answers of a page's queued events in one stream, which it closes when none is left. The browser may
learn that another was asked before it reads the end of the stream; then it never asks for that one's answer. So only
what takes time is queued, and answers that come at once are those of their requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq.machine.jobs import Limits, Visitor

if TYPE_CHECKING:
    import gradio as gr

STREAMED = {"show_progress": "hidden", "api_visibility": "private"}
QUIET = STREAMED | {"queue": False}  # answered at once
# Whatever asks the machine: all whom its door lets in, and room to refuse the others.
RUNS = {"concurrency_limit": Limits().pending + 16, "concurrency_id": "runs"}
ASKED = STREAMED | RUNS


def owner_of(request: gr.Request) -> Visitor:
    """Whose question this is: a browser session, or that of a program."""
    client = getattr(request, "client", None)
    return Visitor.of(request.session_hash or "", client.host if client else "")


def tell_end(event: gr.events.Dependency, elem_id: str) -> None:
    """Tell the component in the browser when the server is done with `event`, however that ended: an error that nobody
    words, a full queue and a lost connection leave no value behind, and a value like the one before is not seen."""
    js = f"() => document.dispatchEvent(new CustomEvent('llmq-ended', {{ detail: '{elem_id}' }}))"
    for after in (event.then, event.failure):  # `then` alone is not called after an error
        after(None, js=js, **QUIET)
