"""An outlier report as one HTML file that needs nothing else: every heatmap, plotly.js included."""

from __future__ import annotations

import html
from pathlib import Path

from llmq.errors import UserError
from llmq.inspect.report import OutlierReport
from llmq.inspect.views import layer_channel_map
from llmq.ui.outlier_plots import layer_channel_figure

# plotly.js 4 offers a button that uploads the chart; a local file has no business with another host.
NO_CLOUD = {"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>body {{ font-family: system-ui, sans-serif; max-width: 75rem; margin: 2rem auto;
padding: 0 1rem; color: #1a2433; }}</style></head><body><h1>{title}</h1><p>{about}</p>{figures}</body></html>
"""


def write_page(report: OutlierReport, threshold: float, path: Path) -> None:
    """Write the layer × channel heatmap of every kind of linear layer, prefill and decode apart."""
    figures = [
        map_figure(report, kind, phase, threshold)
        for kind in report.kinds
        for phase in (("prefill", "decode") if report.generated_tokens else ("prefill",))
    ]
    body = "".join(
        figure.to_html(full_html=False, include_plotlyjs=(number == 0), default_height="420px", config=NO_CLOUD)
        for number, figure in enumerate(figures)
    )
    title = f"Activation outliers: {report.model}, {report.method}"
    about = (
        f"Largest |x| at the input of every linear layer over {report.prompt_tokens} prompt tokens (prefill) and "
        f"{report.generated_tokens} generated tokens (decode). Threshold {threshold:g}."
    )
    try:
        path.write_text(_PAGE.format(title=html.escape(title), about=html.escape(about), figures=body), "utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def map_figure(report: OutlierReport, kind: str, phase: str, threshold: float, *, dark: bool = False):
    """The layer × channel heatmap of one kind in one phase."""
    cells = layer_channel_map(report, kind, phase)
    title = f"Input of {kind}, {phase}: largest |x| by layer and channel"
    return layer_channel_figure(
        cells.values, cells.channels, threshold, title, dark, layers=cells.layers, width=cells.width
    )
