"""Bars with points or a line over them: outlier columns moment by moment, and each layer's error. No gradio, no torch.

What is not a number is left out, so that no figure shows a value that was not measured.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmq.figures.palette import named
from llmq.figures.style import escape, new_figure, style
from llmq.formatting import quoted
from llmq.inspect.cause import Cause

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from llmq.inspect.report import OutlierReport

MOST_DOTS = 6000  # of each kind in one figure


def columns_figure(report: OutlierReport, kind: str, moment: int, threshold: float) -> go.Figure:
    """The columns sent to 16 bit at one moment (0: the prompt, n: the n-th generated token) by layer and channel, as
    the layer itself says and as the hooks found; below, how many there are at every moment."""
    from llmq.inspect.report import columns_at

    modules = list({module.layer: module for module in report.modules if module.kind == kind}.values())
    hooked = [(m, channel) for m in modules for channel in columns_at(m, moment, threshold)][:MOST_DOTS]
    figure = new_figure()
    _dots(figure, "reaches the threshold, as we saw it", hooked, 1, symbol="circle-open", size=9)
    if any(module.outlier_columns for module in modules) and threshold == report.threshold:
        own = [(m, int(c)) for m in modules if len(found := m.outlier_columns or ()) > moment for c in found[moment]]
        _dots(figure, "kept in 16 bit by the layer", own[:MOST_DOTS], 0, symbol="circle", size=4)
    counts = _counts(modules, report.generated_tokens, threshold)
    bars = [named("line-0" if number == moment else "grid") for number in range(len(counts))]
    texts = [_moment_name(report, number) for number in range(len(counts))]
    figure.add_bar(
        x=list(range(len(counts))), y=counts, marker={"color": bars}, xaxis="x2", yaxis="y2", customdata=texts,
        hovertemplate="%{customdata}<br>%{y} columns<extra></extra>", showlegend=False,
    )  # fmt: skip
    width = max((module.in_features for module in modules), default=1)
    style(figure, f"Input of {kind} at {_moment_name(report, moment)}: columns in 16 bit", height=520)
    layers = [str(module.layer) for module in modules]
    figure.update_layout(
        xaxis={"title": {"text": "channel"}, "range": [-width * 0.01, width * 1.01], "anchor": "y"},
        yaxis={
            "title": {"text": "layer"}, "domain": [0.36, 1], "type": "category", "categoryorder": "array",
            "categoryarray": layers, "range": [len(layers) - 0.5, -0.5],
        },
        xaxis2={"title": {"text": "token (0: the prompt)"}, "anchor": "y2", "dtick": 1},
        yaxis2={"title": {"text": "columns"}, "domain": [0, 0.2], "rangemode": "tozero"},
    )  # fmt: skip
    if len(counts) > 24:
        figure.update_layout(xaxis2={"dtick": 8})
    return figure


def _dots(figure: go.Figure, name: str, entries: list, number: int, **marker) -> None:
    figure.add_scatter(
        x=[channel for _, channel in entries], y=[str(module.layer) for module, _ in entries], name=name,
        mode="markers", marker={"color": named(f"line-{number}"), **marker},
        hovertemplate="layer %{y}, channel %{x}<extra></extra>",
    )  # fmt: skip


def _counts(modules: list, generated: int, threshold: float) -> list[int]:
    from llmq.inspect.report import columns_at

    return [sum(len(columns_at(module, moment, threshold)) for module in modules) for moment in range(generated + 1)]


def _moment_name(report: OutlierReport, moment: int) -> str:
    if moment == 0:
        return "the prompt"
    place = report.prompt_tokens + moment - 1
    text = report.token_texts[place] if place < len(report.token_texts) else ""
    return f"generated token {moment} {escape(quoted(text))}"


def layer_error_figure(cause: Cause) -> go.Figure:
    """SQNR of each layer's output at the token, and how many inputs of its linear layers reach the threshold there."""
    figure = new_figure()
    layers = [entry.layer for entry in cause.layers]
    figure.add_bar(
        x=layers, y=[entry.outlier_count for entry in cause.layers], name="inputs over the threshold", yaxis="y2",
        marker={"color": named("grid")}, hovertemplate="layer %{x}: %{y} outliers<extra></extra>",
    )  # fmt: skip
    decibels = [entry.sqnr_db if math.isfinite(entry.sqnr_db) else None for entry in cause.layers]
    relative = [100 * entry.relative for entry in cause.layers]
    figure.add_scatter(
        x=layers, y=decibels, name="SQNR of the output", mode="lines+markers", customdata=relative,
        line={"color": named("line-1")}, marker={"size": 6},
        hovertemplate="layer %{x}: %{y:.1f} dB, off by %{customdata:.3~r} %<extra></extra>",
    )  # fmt: skip
    style(figure, "How far each layer's output is off at this token")
    figure.update_layout(
        xaxis={"title": {"text": "layer"}},
        yaxis={"title": {"text": "SQNR (dB), higher: nearer to 16 bit"}},
        yaxis2={"title": {"text": "outliers"}, "overlaying": "y", "side": "right", "showgrid": False,
                "rangemode": "tozero", "tickmode": "auto", "nticks": 5},
        margin={"r": 60},
    )  # fmt: skip
    return figure
