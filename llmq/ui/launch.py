"""Start the server: limits, theme, and what Gradio would load from elsewhere switched off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
from gradio.routes import App

from llmq.ui.layout import build
from llmq.ui.shell.ending import serve_until_told
from llmq.ui.shell.endpoints import describe_once, fail_briefly, server_options
from llmq.ui.shell.listening import watched
from llmq.ui.shell.state import AppState
from llmq.ui.shell.teaching import announce
from llmq.ui.shell.theme import build_css, build_theme

CELL_PIXELS = 900  # of the page inside a notebook's cell
THREADS = 160  # all who wait for the machine have one, and clicks that need no device have the rest
KEPT_SESSIONS = 100  # of visitors' pages, 0.05 MB each; one who is forgotten goes on with a new one
QUEUE_POLL_SECONDS = 0.05  # Gradio's 0.001 keeps its idle loop on the GIL a tenth of the time (profiled)


@contextmanager
def without_spare_servers() -> Iterator[None]:
    """While inside, Gradio makes no web server: it would make two of a page that is being laid out, a tenth of the time
    until that is open (measured), and a third one to serve it."""
    original = App.create_app
    App.create_app = staticmethod(lambda *_, **__: None)
    try:
        yield
    finally:
        App.create_app = staticmethod(original)


def launch(
    state: AppState,
    *,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    mcp: bool = False,
    block: bool = True,
) -> gr.Blocks:
    """Build and serve the page; with `block=False` return at once (tests, notebooks). `mcp`: its endpoints are also
    tools of an MCP server."""
    os.environ |= {
        "GRADIO_TEMP_DIR": str(state.folder),  # uploads and downloads go with the server
        "GRADIO_DEFAULT_CONCURRENCY_LIMIT": "16",  # of each kind of click that needs no device
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",  # Gradio sums up as many after every event (pandas, holding the GIL)
    }
    with without_spare_servers():
        page = build(state)
    page._queue.sleep_when_free = QUEUE_POLL_SECONDS  # no public setting
    fail_briefly(page)
    describe_once(page)
    page.launch(
        server_name=host,
        server_port=port,
        share=share or None,
        auth=auth,
        theme=build_theme(),
        css=build_css(),
        footer_links=["api"],
        show_error=True,
        max_file_size=state.access.upload_bytes,
        enable_monitoring=False,
        strict_cors=True,
        prevent_thread_lock=True,
        max_threads=THREADS,
        state_session_capacity=KEPT_SESSIONS,
        quiet=not block,
        run_history=False,
        inbrowser=False,
        height=CELL_PIXELS,
        app_kwargs=watched(server_options(page, state.frames), state, page._queue),
        mcp_server=mcp or None,
    )
    if block and state.classes:
        print(announce(state.classes, host, page.local_url, page.share_url), flush=True)
    if block:
        serve_until_told(page, state)
    return page
