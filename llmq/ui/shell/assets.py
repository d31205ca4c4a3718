"""What the browser runs: the scripts of the parts, and plotly.js out of the plotly wheel (no other host is asked)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import gradio as gr

PARTS = Path(__file__).parents[1] / "parts"


def script(*names: str) -> str:
    """The named JavaScript files of llmq/ui/parts, joined in order."""
    return "\n".join((PARTS / name).read_text(encoding="utf-8") for name in names)


def component(template: str, js: str, *, elem_id: str, value, **props) -> gr.HTML:
    """A component whose `template` never changes: `js` runs once, and draws `props.value` whenever that changes.

    A function and not a subclass: Gradio writes a `.pyi` file beside the source of every component class.
    """
    return gr.HTML(
        value=value, html_template=template, js_on_load=js, apply_default_css=False, elem_id=elem_id,
        elem_classes=["llmq-flush"], **props,
    )  # fmt: skip


def serve_plotly() -> str:
    """Let Gradio serve plotly.js; returns its path below the app's root, e.g. 'gradio_api/file=/…/plotly.min.js'.

    The path is relative on purpose: the browser resolves it against the root that Gradio reports, so it also holds
    behind a proxy, on a mounted sub-path and on a share link.
    """
    path = Path(str(files("plotly") / "package_data" / "plotly.min.js")).resolve()
    gr.set_static_paths([path])
    return f"gradio_api/file={quote(path.as_posix())}"
