"""The page: a header, the settings in a sidebar, one tab a module. Layout and wiring only."""

from __future__ import annotations

import gradio as gr

from llmq.ui.api import Api
from llmq.ui.shell.state import AppState
from llmq.ui.tabs.compare_tab import CompareTab
from llmq.ui.tabs.outliers_tab import OutliersTab

TITLE = "llmq: what 8-bit quantization does to a LLaMA"
INTRO = (
    "The same prompt through the same model in 16 bit and in 8 bit, side by side. Every step is timed inside the "
    "engine, one method at a time; memory is counted tensor by tensor."
)


def build(state: AppState) -> gr.Blocks:
    """The page over the state that all visitors share; `launch.launch` serves it."""
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
        Api(state).build(page)
    return page


def _about(state: AppState) -> str:
    reason = f" {state.model_reason}" if state.model_reason else ""
    return f"**Device:** {state.device_label}. **Model:** {state.model}.{reason}"
