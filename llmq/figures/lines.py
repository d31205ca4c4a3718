"""The observatory's figures but the heatmaps: records in, plotly figures out. Imports neither gradio nor torch.

Lines differ in their dashes and marks as well as in colour, and what is not a number is left out, so that no figure
shows a value that was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from llmq.figures.heatmaps import FONT, escape
from llmq.figures.palette import DARK, LIGHT
from llmq.inspect.cause import Cause
from llmq.inspect.emergence import LAYER_SHARE, POSITION_SHARE, Emergence
from llmq.inspect.report import OutlierReport, columns_at

DASHES = ("solid", "dash", "dot", "dashdot")
MARKS = ("circle", "square", "diamond", "cross")
MOST_DOTS = 6000  # of each kind in one figure


def columns_figure(report: OutlierReport, kind: str, moment: int, threshold: float, *, dark: bool = False) -> go.Figure:
    """The columns sent to 16 bit at one moment (0: the prompt, n: the n-th generated token) by layer and channel, as
    the layer itself says and as the hooks found; below, how many there are at every moment."""
    colors = _colors(dark)
    modules = list({module.layer: module for module in report.modules if module.kind == kind}.values())
    hooked = [(m, channel) for m in modules for channel in columns_at(m, moment, threshold)][:MOST_DOTS]
    figure = go.Figure()
    _dots(figure, "found by the hooks", hooked, colors, 1, symbol="circle-open", size=9)
    if any(module.sent for module in modules) and threshold == report.threshold:
        own = [(m, int(c)) for m in modules if m.sent and moment < len(m.sent) for c in m.sent[moment]][:MOST_DOTS]
        _dots(figure, "sent to 16 bit by the layer itself", own, colors, 0, symbol="circle", size=4)
    counts = _counts(modules, report.generated_tokens, threshold)
    bars = [colors["line-0"] if number == moment else colors["grid"] for number in range(len(counts))]
    texts = [_moment_name(report, number) for number in range(len(counts))]
    figure.add_bar(
        x=list(range(len(counts))), y=counts, marker={"color": bars}, xaxis="x2", yaxis="y2", customdata=texts,
        hovertemplate="%{customdata}<br>%{y} columns<extra></extra>", showlegend=False,
    )  # fmt: skip
    width = max((module.in_features for module in modules), default=1)
    _style(figure, f"Input of {kind} at {_moment_name(report, moment)}: columns in 16 bit", dark, height=520)
    layers = [str(module.layer) for module in modules]
    figure.update_layout(
        xaxis={"title": {"text": "channel"}, "range": [-width * 0.01, width * 1.01], "anchor": "y"},
        yaxis={
            "title": {"text": "layer"}, "domain": [0.36, 1], "type": "category", "categoryorder": "array",
            "categoryarray": layers, "range": [len(layers) - 0.5, -0.5],
        },
        xaxis2={"title": {"text": "generated token (0: the prompt)"}, "anchor": "y2", "dtick": 1},
        yaxis2={"title": {"text": "columns"}, "domain": [0, 0.2], "rangemode": "tozero"},
    )  # fmt: skip
    if len(counts) > 24:
        figure.update_layout(xaxis2={"dtick": 8})
    return figure


def _dots(figure: go.Figure, name: str, entries: list, colors: dict, number: int, **marker) -> None:
    figure.add_scatter(
        x=[channel for _, channel in entries], y=[str(module.layer) for module, _ in entries], name=name,
        mode="markers", marker={"color": colors[f"line-{number}"], **marker},
        hovertemplate="layer %{y}, channel %{x}<extra></extra>",
    )  # fmt: skip


def _counts(modules: list, generated: int, threshold: float) -> list[int]:
    return [sum(len(columns_at(module, moment, threshold)) for module in modules) for moment in range(generated + 1)]


def _moment_name(report: OutlierReport, moment: int) -> str:
    if moment == 0:
        return "the prompt"
    place = report.prompt_tokens + moment - 1
    text = report.token_texts[place] if place < len(report.token_texts) else ""
    return f"generated token {moment} {escape(repr(text))}"


def peaks_figure(report: OutlierReport, *, dark: bool = False) -> go.Figure:
    """Largest magnitude by layer, over the prompt: the residual stream and what each kind of linear layer reads."""
    figure = go.Figure()
    series = [("residual stream", [peak.layer for peak in report.stream], [p.absmax.max() for p in report.stream])]
    for kind in report.kinds:
        modules = {m.layer: m for m in report.modules if m.kind == kind and m.layer is not None}
        peaks = [float(module.prefill.absmax.max(initial=0)) for module in modules.values()]
        series.append((f"input of {kind}", list(modules), peaks))
    for number, (name, layers, peaks) in enumerate(entry for entry in series if entry[1]):
        _line(figure, name, layers, [float(value) or None for value in peaks], number, dark, "layer %{x}: %{y:,.4~r}")
    figure.add_hline(y=6, line={"color": _colors(dark)["ink-soft"], "width": 1, "dash": "dot"})
    _style(figure, "Largest magnitude by layer, over the prompt (dotted: 6)", dark)
    figure.update_layout(xaxis={"title": {"text": "layer"}}, yaxis={"title": {"text": "|x|"}, "type": "log"})
    return _decades(figure)


def features_figure(found: Emergence, *, dark: bool = False) -> go.Figure:
    """Every dimension that reaches 6.0: in which share of layers, at which share of positions; the paper's criterion is
    the upper right corner."""
    colors, figure = _colors(dark), go.Figure()
    for name, number, meets in (("outlier feature by the paper's criterion", 1, True), ("reaches 6.0", 0, False)):
        some = [feature for feature in found.features if feature.meets_criterion == meets]
        figure.add_scatter(
            x=[100 * f.layer_share for f in some], y=[100 * f.position_share for f in some], mode="markers", name=name,
            marker={"color": colors[f"line-{number}"], "symbol": MARKS[number + meets], "size": 11 if meets else 7},
            customdata=[[f.channel, f.absmax] for f in some],
            hovertemplate="dimension %{customdata[0]}<br>%{x:.3~r} % of layers, %{y:.3~r} % of positions<br>"
            "largest |x| %{customdata[1]:,.4~r}<extra></extra>",
        )  # fmt: skip
    edge = {"color": colors["ink-soft"], "width": 1, "dash": "dot"}
    figure.add_vline(x=100 * LAYER_SHARE, line=edge)
    figure.add_hline(y=100 * POSITION_SHARE, line=edge)
    _style(figure, "Dimensions that reach 6.0: how far they spread", dark)
    figure.update_layout(
        xaxis={"title": {"text": "% of layers"}, "range": [-3, 103]},
        yaxis={"title": {"text": "% of positions"}, "range": [-3, 103]},
    )
    return figure


def layer_error_figure(cause: Cause, *, dark: bool = False) -> go.Figure:
    """SQNR of each layer's output at the token, and how many inputs of its linear layers reach the threshold there."""
    figure, colors = go.Figure(), _colors(dark)
    layers = [entry.layer for entry in cause.layers]
    figure.add_bar(
        x=layers, y=[entry.outlier_count for entry in cause.layers], name="inputs over the threshold", yaxis="y2",
        marker={"color": colors["grid"]}, hovertemplate="layer %{x}: %{y} outliers<extra></extra>",
    )  # fmt: skip
    decibels = [entry.sqnr_db if math.isfinite(entry.sqnr_db) else None for entry in cause.layers]
    relative = [100 * entry.relative for entry in cause.layers]
    figure.add_scatter(
        x=layers, y=decibels, name="SQNR of the output", mode="lines+markers", customdata=relative,
        line={"color": colors["line-1"]}, marker={"size": 6},
        hovertemplate="layer %{x}: %{y:.1f} dB, off by %{customdata:.3~r} %<extra></extra>",
    )  # fmt: skip
    _style(figure, "How far each layer's output is off at this token", dark)
    figure.update_layout(
        xaxis={"title": {"text": "layer"}},
        yaxis={"title": {"text": "SQNR (dB), higher is nearer to 16 bit"}},
        yaxis2={"title": {"text": "outliers"}, "overlaying": "y", "side": "right", "showgrid": False,
                "rangemode": "tozero", "tickmode": "auto", "nticks": 5},
        margin={"r": 60},
    )  # fmt: skip
    return figure


def silencing_figure(rows: Sequence[dict], *, dark: bool = False) -> go.Figure:
    """Perplexity against the number of silenced channels: the strongest, and random ones."""
    figure = go.Figure()
    base = [row for row in rows if row["silenced"] == "none"]
    for number, name in ((1, "strongest"), (0, "random")):
        some = [row for row in rows if row["silenced"] == name]
        mode = "lines+markers" if name == "strongest" else "markers"
        _line(
            figure, f"{name} channels", [row["count"] for row in some], [row["perplexity"] for row in some], number,
            dark, "%{x} silenced: perplexity %{y:,.5~r}", mode=mode,
        )  # fmt: skip
    if base:
        figure.add_hline(y=base[0]["perplexity"], line={"color": _colors(dark)["ink-soft"], "width": 1, "dash": "dot"})
    _style(figure, "Perplexity with channels silenced (dotted: none)", dark)
    figure.update_layout(
        xaxis={"title": {"text": "channels silenced"}, "type": "log", "tickvals": sorted({r["count"] for r in rows})},
        yaxis={"title": {"text": "perplexity"}, "type": "log"},
    )
    return _decades(figure)


def amplifying_figure(rows: Sequence[dict], *, dark: bool = False) -> go.Figure:
    """Perplexity of each method against the factor."""
    figure = go.Figure()
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        some = sorted((row for row in rows if row["method"] == method), key=lambda row: row["factor"])
        told = "s = %{x:g}: perplexity %{y:,.5~r}"
        _line(figure, method, [r["factor"] for r in some], [r["perplexity"] for r in some], number, dark, told)
    _style(figure, "Perplexity with channels amplified by s, function unchanged", dark)
    figure.update_layout(
        xaxis={"title": {"text": "s"}, "type": "log", "tickvals": [1, 2, 4, 8, 16, 32, 64], "range": [-0.06, 1.87]},
        yaxis={"title": {"text": "perplexity"}, "type": "log"},
    )
    return _decades(figure)


def thresholds_figure(rows: Sequence[dict], *, dark: bool = False) -> go.Figure:
    """Perplexity, share of columns in 16 bit and speed at each threshold, below one another."""
    figure, colors = go.Figure(), _colors(dark)
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
            line={"color": colors[f"line-{number % 3}"], "dash": "dot"}, marker={"size": 9, "symbol": MARKS[number]},
            hovertemplate=f"threshold %{{x}}: {told}<extra></extra>", **more,
        )  # fmt: skip
    _style(figure, "The threshold moved: quality, columns in 16 bit, speed", dark, height=560)
    figure.update_layout(
        xaxis={"title": {"text": "threshold (off: no decomposition)"}, "type": "category", "anchor": "y3"},
        yaxis={"title": {"text": "perplexity"}, "domain": [0.72, 1]},
        yaxis2={"title": {"text": "% of columns"}, "domain": [0.38, 0.64], "rangemode": "tozero"},
        yaxis3={"title": {"text": "tok/s"}, "domain": [0, 0.3], "rangemode": "tozero"},
    )
    return figure


def sweep_figure(rows: Sequence[dict], by: str, *, dark: bool = False) -> go.Figure:
    """Shares of layers and positions touched by outlier features, a point a model, by 'parameters' or 'perplexity'."""
    figure = go.Figure()
    some = sorted(rows, key=lambda row: row[by])
    for number, (name, key) in enumerate((("layers", "layers_touched"), ("positions", "positions_touched"))):
        told = f"%{{text}}<br>%{{y:.3~r}} % of {name}"
        values = [100 * row[key] for row in some]
        texts = [escape(row["model"]) for row in some]
        _line(figure, f"% of {name} touched", [row[by] for row in some], values, number, dark, told, text=texts)
    _style(figure, f"Outlier features by {by}", dark)
    figure.update_layout(
        xaxis={"title": {"text": by}, "type": "log" if by == "parameters" else "linear"},
        yaxis={"title": {"text": "%"}, "range": [-3, 103]},
    )
    return figure


def _line(figure, name: str, x, y, number: int, dark: bool, told: str, *, mode: str = "lines+markers", **more) -> None:
    color = _colors(dark)[f"line-{number % 3}"] if number < 3 else _colors(dark)["ink-soft"]
    figure.add_scatter(
        x=x, y=y, name=name, mode=mode, line={"color": color, "dash": DASHES[number % 4]},
        marker={"symbol": MARKS[number % 4], "size": 8, "color": color}, connectgaps=False,
        hovertemplate=f"{escape(name)}<br>{told}<extra></extra>", **more,
    )  # fmt: skip


def _colors(dark: bool) -> dict[str, str]:
    return DARK if dark else LIGHT


def _decades(figure: go.Figure) -> go.Figure:
    """Powers of ten alone on a logarithmic axis, as 10, 100, 1,000."""
    figure.update_layout(yaxis={"dtick": 1, "tickformat": ",~r", "exponentformat": "power"})
    return figure


def _style(figure: go.Figure, title: str, dark: bool, *, height: int = 400) -> None:
    colors = _colors(dark)
    axis = {"gridcolor": colors["grid"], "zeroline": False, "linecolor": colors["grid"], "automargin": True}
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0, "xref": "container", "pad": {"l": 12}},
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "color": colors["ink"], "size": 13},
        hoverlabel={"bgcolor": colors["surface"], "font": {"family": FONT, "color": colors["ink"]}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 60, "r": 20, "t": 84, "b": 64},
        height=height,
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    for name in ("xaxis2", "yaxis2", "yaxis3"):
        if any(name in (trace.xaxis and f"xaxis{trace.xaxis[1:]}", trace.yaxis and f"yaxis{trace.yaxis[1:]}")
               for trace in figure.data):  # fmt: skip
            figure.update_layout({name: axis})
