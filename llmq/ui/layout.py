"""The page: a header and one tab a module. Layout and wiring only."""

from __future__ import annotations

import html

import gradio as gr

from llmq.models.presets import model_title
from llmq.ui.api import Api
from llmq.ui.parts.words import words_script
from llmq.ui.shell.assets import script
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import QUIET
from llmq.ui.tabs.compare_tab import CompareTab
from llmq.ui.tabs.fit_tab import FitTab
from llmq.ui.tabs.lab_tab import LabTab
from llmq.ui.tabs.outliers_tab import OutliersTab

LESSON = "New to this? Take the lesson."
TITLE = "llmq: what 8-bit quantization does to a LLaMA"
INTRO = (
    "One language model twice: with its weights in 16 bit, and rounded to 8 bit. Ask both the same thing, and see what "
    "rounding saves, what it costs, and where the words part."
)


def build(state: AppState) -> gr.Blocks:
    """The page over the state that all visitors share; `launch.launch` serves it."""
    compare, outliers, fit, lab = CompareTab(state), OutliersTab(state), FitTab(state), LabTab(state)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# What 8 bits do to a language model\n{INTRO} [{LESSON}](lesson/)", elem_id="header")
        if state.unable:
            gr.HTML(_unable(state), elem_id="unable", elem_classes=["llmq-flush"])
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Compare", id="compare", elem_id="tab-compare") as compare_tab:
                compare.build()
            with gr.Tab("Outliers", id="outliers", elem_id="tab-outliers", render_children=False) as tab:
                outliers.build()
            with gr.Tab("Does it fit?", id="fit", elem_id="tab-fit") as fit_tab:
                fit.build()
            with gr.Tab("Lab", id="lab", elem_id="tab-lab", render_children=False) as lab_tab:
                lab.build()
        compare.wire(page)
        outliers.wire(tab)
        fit.wire(page, fit_tab)
        lab.wire(lab_tab)
        page.load(outliers.from_link, None, outliers.linked, **QUIET)
        page.load(lab.from_link, None, lab.linked, **QUIET)
        asked, watched = [compare.prompt, compare.model], [outliers.prompt, outliers.model]
        for shown, there, here in ((tab, asked, watched), (compare_tab, watched, asked)):
            shown.select(None, there, here, js=script("follow.js"), **QUIET)
        page.load(None, js=words_script(), **QUIET)
        page.load(None, js=script("lesson.js"), **QUIET)
        gr.Markdown(_about(state), elem_id="about", elem_classes=["llmq-about"])
        Api(state).build(page)
    return page


def _unable(state: AppState) -> str:
    """What is shown where no model could be made ready; the reason, which may name places here, is the owner's."""
    reason = "" if state.access.public else f": {html.escape(state.unable.rstrip('.'))}"
    return f'<p class="llmq-quiet" role="status">Nothing can run here now{reason}. What is recorded plays.</p>'


def _about(state: AppState) -> str:
    reason = f" {state.model_reason}" if state.model_reason else ""
    return (
        f"Runs on {state.device_label} with {model_title(state.model)}.{reason} Every step is timed inside the engine, "
        "one method at a time. The memory of weights is counted tensor by tensor."
    )
