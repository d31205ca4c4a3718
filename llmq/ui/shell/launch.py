"""The page: a header, the settings in a sidebar, one tab a module; and its server: limits, theme, and what Gradio would
load from elsewhere switched off."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from llmq.ui.shell.state import AppState
from llmq.ui.shell.theme import build_css, build_theme
from llmq.ui.tabs.compare_tab import CompareTab
from llmq.ui.tabs.outliers_tab import OutliersTab

TITLE = "llmq: what 8-bit quantization does to a LLaMA"
INTRO = (
    "The same prompt through the same model in 16 bit and in 8 bit, side by side. Every step is timed inside the "
    "engine, one method at a time; memory is counted tensor by tensor."
)
WAITING_RUNS = 32
QUEUE_POLL_SECONDS = 0.05  # Gradio's 0.001 keeps its idle loop on the GIL a tenth of the time (profiled)


def launch(
    state: AppState,
    *,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    block: bool = True,
) -> gr.Blocks:
    """Build and serve the page; with `block=False` return at once (tests, notebooks)."""
    page = build(state)
    page.queue(max_size=WAITING_RUNS, default_concurrency_limit=16)
    page._queue.sleep_when_free = QUEUE_POLL_SECONDS  # no public setting
    page.launch(
        server_name=host,
        server_port=port,
        share=share or None,
        auth=auth,
        theme=build_theme(),
        css=build_css() + Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        footer_links=["api"],
        show_error=True,
        max_file_size="32mb",
        strict_cors=True,
        prevent_thread_lock=not block,
        quiet=not block,
        run_history=False,
        inbrowser=False,
    )
    return page


def build(state: AppState) -> gr.Blocks:
    """The page over the state that all visitors share; `launch` serves it."""
    compare, outliers = CompareTab(state), OutliersTab(state)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Sidebar(open=False, elem_id="settings", position="left"):
            compare.sidebar()
        gr.Markdown(f"# llmq\n{INTRO}", elem_id="header")
        gr.Markdown(_about(state), elem_id="about", elem_classes=["llmq-about"])
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                compare.build()
            with gr.Tab("Outliers", id="outliers", elem_id="tab-outliers", render_children=False) as tab:
                outliers.build()
        compare.wire(page)
        outliers.wire(tab)
    return page


def _about(state: AppState) -> str:
    reason = f" {state.model_reason}" if state.model_reason else ""
    return f"**Device:** {state.device_label}. **Model:** {state.model}.{reason}"
