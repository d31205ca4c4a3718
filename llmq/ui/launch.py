"""Start the server: limits, theme, and what Gradio would load from elsewhere switched off."""

from __future__ import annotations

import gradio as gr

from llmq.ui.layout import build
from llmq.ui.shell.endpoints import fail_briefly, server_options
from llmq.ui.shell.state import AppState
from llmq.ui.shell.theme import build_css, build_theme

WAITING_RUNS = 32
CELL_PIXELS = 900  # of the page inside a notebook's cell
QUEUE_POLL_SECONDS = 0.05  # Gradio's 0.001 keeps its idle loop on the GIL a tenth of the time (profiled)


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
    page = build(state)
    page.queue(max_size=WAITING_RUNS, default_concurrency_limit=16)
    page._queue.sleep_when_free = QUEUE_POLL_SECONDS  # no public setting
    fail_briefly(page)
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
        prevent_thread_lock=not block,
        quiet=not block,
        run_history=False,
        inbrowser=False,
        height=CELL_PIXELS,
        app_kwargs=server_options(page),
        mcp_server=mcp or None,
    )
    return page
