"""Who listens to which answer, read from the web server's requests, so that nobody is computed for who is not there."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from starlette.middleware import Middleware

from llmq.machine.jobs import Listeners
from llmq.models.loading import quiet_libraries
from llmq.ui.shell import classroom, lessons, owner
from llmq.ui.shell.state import AppState

if TYPE_CHECKING:
    from gradio.queueing import Queue

log = logging.getLogger(__name__)
OPEN = re.compile(r".*/gradio_api/heartbeat/(?P<session>[^/]+)")
BY_NAME = re.compile(r".*/gradio_api/call/(?:v2/)?[^/]+/(?P<session>[^/]+)/?")


def watched(options: dict, state: AppState, queue: Queue) -> dict:
    """`options` of the web server, with what watches over the jobs of `state` and the page's `queue`."""
    listeners = state.jobs.listeners if state.jobs else Listeners()
    ears = Middleware(
        Ears, listeners=listeners, left=state.stop, uploaded=state.prune, opened=state.opened.set,
        heard=partial(forget, queue), needed=quiet_libraries,
    )  # fmt: skip
    return options | {
        "middleware": [*options.get("middleware", ()), ears, Middleware(lessons.ToTheLesson)],
        "routes": [
            *options.get("routes", ()),
            *(owner.routes_of(state.jobs) if state.jobs else ()),
            *classroom.routes_of(state.classes),
            *lessons.routes_of(state.classes is not None),
        ],
    }


class Ears:
    """Stands in front of the server: counts the streams of answers, and calls `left(session)` when a page is closed,
    `opened()` after one was sent, `uploaded()` after an upload, and `heard(session)` when a stream of answers ended.
    The first click, or call, waits for `needed()`: the libraries are imported after the page was sent."""

    def __init__(
        self, app, listeners: Listeners, left: Callable[[str], object], uploaded: Callable[[], object],
        opened: Callable[[], object], heard: Callable[[str], object], needed: Callable[[], object],
    ):  # fmt: skip
        self.app, self.listeners, self.left, self.uploaded, self.opened = app, listeners, left, uploaded, opened
        self.heard, self.needed, self.ready = heard, needed, False
        listeners.told = True

    async def __call__(self, scope, receive, send) -> None:
        session, page = session_of(scope), page_of(scope)
        if not self.ready and scope.get("method") == "POST" and "/gradio_api/" in scope["path"]:
            self.opened()
            try:
                await asyncio.to_thread(self.needed)
            except Exception:  # whoever needs them says so where it is read
                log.exception("the libraries cannot be imported")
            self.ready = True
        try:
            with self.listeners.listening(session) if session else nullcontext():
                await self.app(scope, receive, send)
        finally:
            if session:
                self.heard(session)
            if page:
                self.left(page)
            if scope.get("method") == "POST" and scope["path"].endswith("/gradio_api/upload"):
                self.uploaded()
            if scope.get("method") == "GET" and scope["path"] in ("/", "/config"):  # a browser's, a program's
                self.opened()


def forget(queue: Queue, session: str) -> None:
    """Drop the empty line of answers of a session that waits for none, and give back the memory that its figures took.
    Gradio keeps 2,000 lines, 4 kB each, and makes a new one with the next click."""
    if not queue.pending_event_ids_session.get(session):
        queue.pending_event_ids_session.pop(session, None)
        if queue.pending_messages_per_session.pop(session, None):
            _trim()


def _trim() -> None:
    """Return what was freed to the system (glibc alone keeps it, 20 MB after a hundred visitors): 2 ms."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def page_of(scope) -> str:
    """The session of the page that a request holds open; '' for any other request."""
    found = OPEN.fullmatch(scope["path"]) if scope["type"] == "http" else None
    return found["session"] if found else ""


def session_of(scope) -> str:
    """Whose answers a request streams; '' for any other request. Who asked without a session has the event's name."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return ""
    if scope["path"].endswith("/gradio_api/queue/data"):
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
    found = BY_NAME.fullmatch(scope["path"])
    return found["session"] if found else ""
