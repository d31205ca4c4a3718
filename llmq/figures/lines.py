"""Lines and points: the paper's figures of a model, and what experiments measured. Imports neither gradio nor torch.

Lines differ in their dashes and marks as well as in colour, and what is not a number is left out, so that no figure
shows a value that was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from llmq.figures.palette import named
from llmq.figures.style import DASHES, MARKS, decades, escape, style
from llmq.inspect.emergence import LAYER_SHARE, POSITION_SHARE, Emergence
from llmq.inspect.report import OutlierReport


def peaks_figure(report: OutlierReport) -> go.Figure:
    """Largest magnitude by layer, over the prompt: the residual stream and what each kind of linear layer reads."""
    figure = go.Figure()
    series = [("residual stream", [peak.layer for peak in report.stream], [p.absmax.max() for p in report.stream])]
    for kind in report.kinds:
        modules = {m.layer: m for m in report.modules if m.kind == kind and m.layer is not None}
        peaks = [float(module.prefill.absmax.max(initial=0)) for module in modules.values()]
        series.append((f"input of {kind}", list(modules), peaks))
    for number, (name, layers, peaks) in enumerate(entry for entry in series if entry[1]):
        _line(figure, name, layers, [float(value) or None for value in peaks], number, "layer %{x}: %{y:,.4~r}")
    figure.add_hline(y=6, line={"color": named("ink-soft"), "width": 1, "dash": "dot"})
    style(figure, "Largest magnitude by layer, over the prompt (dotted: 6)")
    figure.update_layout(xaxis={"title": {"text": "layer"}}, yaxis={"title": {"text": "|x|"}, "type": "log"})
    return decades(figure)


def features_figure(found: Emergence) -> go.Figure:
    """Every dimension that reaches 6.0: in which share of layers, at which share of positions; the paper's criterion is
    the upper right corner."""
    figure = go.Figure()
    for name, number, meets in (("outlier feature by the paper's criterion", 1, True), ("reaches 6.0", 0, False)):
        some = [feature for feature in found.features if feature.meets_criterion == meets]
        figure.add_scatter(
            x=[100 * f.layer_share for f in some], y=[100 * f.position_share for f in some], mode="markers", name=name,
            marker={"color": named(f"line-{number}"), "symbol": MARKS[number + meets], "size": 11 if meets else 7},
            customdata=[[f.channel, f.absmax] for f in some],
            hovertemplate="dimension %{customdata[0]}<br>%{x:.3~r} % of layers, %{y:.3~r} % of positions<br>"
            "largest |x| %{customdata[1]:,.4~r}<extra></extra>",
        )  # fmt: skip
    edge = {"color": named("ink-soft"), "width": 1, "dash": "dot"}
    figure.add_vline(x=100 * LAYER_SHARE, line=edge)
    figure.add_hline(y=100 * POSITION_SHARE, line=edge)
    style(figure, "Dimensions that reach 6.0: how far they spread")
    figure.update_layout(
        xaxis={"title": {"text": "% of layers"}, "range": [-3, 103]},
        yaxis={"title": {"text": "% of positions"}, "range": [-3, 103]},
    )
    return figure


def silencing_figure(rows: Sequence[dict]) -> go.Figure:
    """Perplexity against the number of silenced channels: the strongest, and random ones."""
    figure = go.Figure()
    base = [row for row in rows if row["silenced"] == "none"]
    for number, name in ((1, "strongest"), (0, "random")):
        some = [row for row in rows if row["silenced"] == name]
        mode = "lines+markers" if name == "strongest" else "markers"
        _line(
            figure, f"{name} channels", [row["count"] for row in some], [row["perplexity"] for row in some], number,
            "%{x} silenced: perplexity %{y:,.5~r}", mode=mode,
        )  # fmt: skip
    if base:
        figure.add_hline(y=base[0]["perplexity"], line={"color": named("ink-soft"), "width": 1, "dash": "dot"})
    style(figure, "Perplexity with channels silenced (dotted: none)")
    figure.update_layout(
        xaxis={"title": {"text": "channels silenced"}, "type": "log", "tickvals": sorted({r["count"] for r in rows})},
        yaxis={"title": {"text": "perplexity"}, "type": "log"},
    )
    return decades(figure)


def amplifying_figure(rows: Sequence[dict]) -> go.Figure:
    """Perplexity of each method against the factor."""
    figure = go.Figure()
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        some = sorted((row for row in rows if row["method"] == method), key=lambda row: row["factor"])
        told = "s = %{x:g}: perplexity %{y:,.5~r}"
        _line(figure, method, [r["factor"] for r in some], [r["perplexity"] for r in some], number, told)
    style(figure, "Perplexity with channels amplified by s, function unchanged")
    figure.update_layout(
        xaxis={"title": {"text": "s"}, "type": "log", "tickvals": [1, 2, 4, 8, 16, 32, 64], "range": [-0.06, 1.87]},
        yaxis={"title": {"text": "perplexity"}, "type": "log"},
    )
    return decades(figure)


def thresholds_figure(rows: Sequence[dict]) -> go.Figure:
    """Perplexity, share of columns in 16 bit and speed at each threshold, below one another."""
    figure = go.Figure()
    names = [row["threshold"] for row in rows]
    speed = [row["tokens_per_second"] for row in rows]
    spread = {
        "type": "data",
        "symmetric": False,
        "array": [row["tokens_per_second_max"] - row["tokens_per_second"] for row in rows],
        "arrayminus": [row["tokens_per_second"] - row["tokens_per_second_min"] for row in rows],
    }
    panels = (
        ("perplexity", [row["perplexity"] for row in rows], "y", {}, "perplexity %{y:.5~r}"),
        ("% of columns in 16 bit", [100 * r["outlier_share"] for r in rows], "y2", {}, "%{y:.3~r} % in 16 bit"),
        ("tokens a second", speed, "y3", {"error_y": spread}, "%{y:.4~r} tok/s"),
    )
    for number, (name, values, axis, more, told) in enumerate(panels):
        figure.add_scatter(
            x=names, y=values, yaxis=axis, name=name, mode="lines+markers", showlegend=False,
            line={"color": named(f"line-{number}"), "dash": "dot"}, marker={"size": 9, "symbol": MARKS[number]},
            hovertemplate=f"threshold %{{x}}: {told}<extra></extra>", **more,
        )  # fmt: skip
    style(figure, "The threshold moved: quality, columns in 16 bit, speed", height=560)
    figure.update_layout(
        xaxis={"title": {"text": "threshold (off: no decomposition)"}, "type": "category", "anchor": "y3"},
        yaxis={"title": {"text": "perplexity"}, "domain": [0.72, 1]},
        yaxis2={"title": {"text": "% of columns"}, "domain": [0.38, 0.64], "rangemode": "tozero"},
        yaxis3={"title": {"text": "tok/s"}, "domain": [0, 0.3], "rangemode": "tozero"},
    )
    return figure


def sweep_figure(rows: Sequence[dict], by: str) -> go.Figure:
    """Shares of layers and positions touched by outlier features, a point a model, by 'parameters' or 'perplexity'."""
    figure = go.Figure()
    some = sorted(rows, key=lambda row: row[by])
    for number, (name, key) in enumerate((("layers", "layers_touched"), ("positions", "positions_touched"))):
        told = f"%{{text}}<br>%{{y:.3~r}} % of {name}"
        values = [100 * row[key] for row in some]
        texts = [escape(row["model"]) for row in some]
        _line(figure, f"% of {name} touched", [row[by] for row in some], values, number, told, text=texts)
    style(figure, f"Outlier features by {by}")
    figure.update_layout(
        xaxis={"title": {"text": by}, "type": "log" if by == "parameters" else "linear"},
        yaxis={"title": {"text": "%"}, "range": [-3, 103]},
    )
    return figure


def _line(figure, name: str, x, y, number: int, told: str, *, mode: str = "lines+markers", **more) -> None:
    color = named(f"line-{number}" if number < 3 else "ink-soft")
    figure.add_scatter(
        x=x, y=y, name=name, mode=mode, line={"color": color, "dash": DASHES[number % 4]},
        marker={"symbol": MARKS[number % 4], "size": 8, "color": color}, connectgaps=False,
        hovertemplate=f"{escape(name)}<br>{told}<extra></extra>", **more,
    )  # fmt: skip


# Kind of an experiment -> the figure of its rows.
FIGURES = {"silencing": silencing_figure, "amplifying": amplifying_figure, "thresholds": thresholds_figure}
