"""The page's own components, its tables and notices.

A component's template never changes, so Gradio never touches the nodes below it: its scripts run once, when it is
mounted, and draw `props.value` whenever that changes. Give its events `show_progress="hidden"`: otherwise Gradio fades
it while a run is going.
"""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import gradio as gr

from llmq.figures.palette import KL_EDGES, PAINT

if TYPE_CHECKING:
    import plotly.graph_objects as go

_STATUS = """
<p class="llmq-status" role="status"></p>
<progress class="llmq-progress" max="1" aria-label="Progress" hidden></progress>
"""
_FIGURE = """
<figure class="llmq-figure" hidden><figcaption data-part="title"></figcaption><div data-part="figure"></div></figure>
<p class="llmq-quiet" data-part="failed" hidden>The figure could not be drawn in this browser; the tables hold its
  numbers.</p>
"""
_LIVE = """
<div class="llmq-live">
  <p class="llmq-hidden" role="status" data-part="status"></p>
  <p class="llmq-quiet" data-part="empty">Time, speed and memory of each method appear here when a run starts.</p>
  <div class="llmq-cards" data-part="cards"></div>
  <p class="llmq-quiet" data-part="plot-error" hidden>
    The plot could not be loaded. The table below holds its figures.</p>
  <div class="llmq-plot" data-part="plot" hidden role="group" aria-label="Memory and decode speed over time, by method.
    The table below holds the figures."></div>
  <p class="llmq-quiet" data-part="caption" hidden>Weights and peak memory on the cards, and the coloured memory
    curves, are exact tensor sizes of each method.</p>
  <details class="llmq-figures" data-part="figures" hidden>
    <summary>Show figures as a table</summary>
    <div class="llmq-scroll" role="region" tabindex="0" aria-label="Figures of the plots"><table>
      <thead><tr><th scope="col">Series</th><th scope="col">Unit</th>
        <th scope="col">Lowest</th><th scope="col">Highest</th><th scope="col">Latest</th></tr></thead>
      <tbody data-part="rows"></tbody>
    </table></div>
  </details>
</div>
"""
_DIFF = """
<div class="llmq-diff">
  <p class="llmq-diff-summary" data-part="summary">The comparison of the texts appears here when a run has finished.</p>
  <div class="llmq-panes" data-part="texts"></div>
</div>
"""
_NATS = [f"under {KL_EDGES[0]:g}", *(f"{edge:g}" for edge in KL_EDGES[:-1]), f"{KL_EDGES[-1]:g} and more"]
_SHADES = " ".join(f'<span class="llmq-token llmq-kl{level}">{text}</span>' for level, text in enumerate(_NATS))
_READING = f"""
<div class="llmq-reading">
  <p class="llmq-diff-summary" data-part="summary" data-placeholder="The text appears here, each token shaded by how
    much the methods differ on it."></p>
  <p class="llmq-legend" data-part="legend" hidden>KL in nats: {_SHADES}
    <span class="llmq-token llmq-other">another first choice</span></p>
  <p class="llmq-reading-text" data-part="text"></p>
  <p class="llmq-quiet" data-part="help" hidden>Point at a token for both methods' five likeliest; click it for the
    chain of cause.</p>
  <p class="llmq-reading-about" data-part="about"></p>
  <div class="llmq-panes" data-part="lists"></div>
</div>
"""


def status_line(text: str, *, elem_id: str) -> gr.HTML:
    """One line that says what is going on, announced to screen readers; whatever it says is text, not markup.

    Its value is the text, or {"text", "fraction"} for a line with a bar below it; None: a bar without an end.
    """
    return _component(_STATUS, _script("status.js"), elem_id=elem_id, value=text)


def figure_view(*, elem_id: str) -> gr.HTML:
    """A plotly figure that changes in place: a slider that moves it makes nothing flicker. Its value is `sent(figure)`;
    it is empty and without height until it has one."""
    js = _script("plotly.js") + PAINT + _script("figure.js")
    return _component(_FIGURE, js, elem_id=elem_id, plotly_path=_plotly_path())


def sent(figure: go.Figure | None) -> dict:
    """A figure as it goes to the browser, its title apart: plotly's titles do not wrap."""
    if figure is None:
        return {}
    plain = json.loads(figure.to_json())
    title = plain["layout"].pop("title", {}).get("text", "")
    plain["layout"]["margin"]["t"] = 40
    return {"title": html.unescape(title), **plain}


def live_panel() -> gr.HTML:
    """One card per contestant, and memory and decode speed over time in one plot, drawn at most four times a second.
    Its value is `LiveState.value()` or `{}`."""
    js = _script("plotly.js", "live_cards.js", "live_plot.js", "live.js")
    return _component(_LIVE, js, elem_id="live-panel", plotly_path=_plotly_path())


def token_diff_view() -> gr.HTML:
    """Two texts token by token; its value is `token_alignment.diff_value(...)` or `{}`."""
    return _component(_DIFF, _script("token_diff.js"), elem_id="token-diff")


def reading_view(*, elem_id: str) -> gr.HTML:
    """What both methods made of a text; its value is `Read.value()` or `{}`. A click on a token raises `select` with
    its `position`; the arrow keys move through the text."""
    return _component(_READING, _script("reading.js"), elem_id=elem_id, edges=KL_EDGES)


def _component(template: str, js: str, *, elem_id: str, value: object = None, **props) -> gr.HTML:
    """A function and not a subclass: Gradio writes a `.pyi` file beside the source of every component class."""
    return gr.HTML(
        value={} if value is None else value, html_template=template, js_on_load=js, apply_default_css=False,
        elem_id=elem_id, elem_classes=["llmq-flush"], **props,
    )  # fmt: skip


def _script(*names: str) -> str:
    """The named JavaScript files of this folder, joined in order."""
    return "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)


def _plotly_path() -> str:
    """Let Gradio serve plotly.js out of its wheel (no other host is asked); its path below the app's root.

    The path is relative on purpose: the browser resolves it against the root that Gradio reports, so it also holds
    behind a proxy, on a mounted sub-path and on a share link.
    """
    path = Path(str(files("plotly") / "package_data" / "plotly.min.js")).resolve()
    gr.set_static_paths([path])
    return f"gradio_api/file={quote(path.as_posix())}"


def table(label: str, headers: list[str], elem_id: str) -> gr.Dataframe:
    """Hidden until it is `filled`."""
    return gr.Dataframe(
        headers=headers, value=[], label=label, interactive=False, wrap=True, elem_id=elem_id, type="array",
        elem_classes=["llmq-table"], visible=False,
    )  # fmt: skip


def filled(rows: list[list[str]], *, visible: bool = True) -> gr.Dataframe:
    """A `table` with something in it, shown."""
    return gr.Dataframe(value=rows, visible=visible)


def notice(error: Exception | str) -> gr.Error:
    """An error notice that stays until closed; a prompt's or a model's markup in it is shown as text, for Gradio
    renders markup in notices."""
    return gr.Error(html.escape(str(error)), duration=None, print_exception=False)
