"""Lines and points: the paper's figures of a model, and what experiments measured. Imports neither gradio nor torch.

Lines differ in their dashes and marks as well as in colour, and what is not a number is left out, so that no figure
shows a value that was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.figures.palette import named
from llmq.figures.style import DASHES, MARKS, decades, escape, new_figure, style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from llmq.inspect.emergence import Emergence
    from llmq.inspect.report import OutlierReport


def peaks_figure(report: OutlierReport) -> go.Figure:
    """Largest magnitude by layer, over the prompt: the residual stream and what each kind of linear layer reads."""
    figure = new_figure()
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
    from llmq.inspect.emergence import LAYER_SHARE, POSITION_SHARE

    figure = new_figure()
    for name, number, meets in (("outlier feature", 1, True), ("reaches 6", 0, False)):
        some = [feature for feature in found.features if feature.meets_criterion == meets]
        figure.add_scatter(
            x=[100 * f.layer_share for f in some], y=[100 * f.position_share for f in some], mode="markers", name=name,
            marker={"color": named(f"line-{number}"), "symbol": MARKS[number + meets], "size": 11 if meets else 7},
            customdata=[[f.channel, f.absmax] for f in some],
            hovertemplate="channel %{customdata[0]}<br>%{x:.3~r} % of layers, %{y:.3~r} % of tokens<br>"
            "largest |x| %{customdata[1]:,.4~r}<extra></extra>",
        )  # fmt: skip
    edge = {"color": named("ink-soft"), "width": 1, "dash": "dot"}
    figure.add_vline(x=100 * LAYER_SHARE, line=edge)
    figure.add_hline(y=100 * POSITION_SHARE, line=edge)
    style(figure, "Channels that reach 6: how far they spread")
    figure.update_layout(
        xaxis={"title": {"text": "% of layers"}, "range": [-3, 103]},
        yaxis={"title": {"text": "% of tokens"}, "range": [-3, 103]},
    )
    return figure


@dataclass(frozen=True)
class Line:
    """Points of one series; `number`: its colour, dashes and marks; `texts`: a name for each point."""

    name: str
    points: Sequence[tuple[float, float]]
    number: int
    connected: bool = True
    texts: Sequence[str] | None = None


def line_figure(
    title: str, lines: Sequence[Line], told: str, *, x: dict, y: dict, level: float | None = None
) -> go.Figure:
    """Series over one pair of axes. `told`: what pointing at a place says; `level`: where a dotted line lies."""
    figure = new_figure()
    for line in lines:
        xs, ys = zip(*line.points, strict=True) if line.points else ((), ())
        more = {"text": [escape(text) for text in line.texts]} if line.texts else {}
        mode = "lines+markers" if line.connected else "markers"
        _line(figure, line.name, xs, ys, line.number, told, mode=mode, **more)
    if level is not None:
        figure.add_hline(y=level, line={"color": named("ink-soft"), "width": 1, "dash": "dot"})
    style(figure, title)
    figure.update_layout(xaxis=x, yaxis=y)
    return decades(figure) if y.get("type") == "log" else figure


@dataclass(frozen=True)
class Panel:
    """One of several series below one another over the same names; `spread`: lowest and highest of each value."""

    title: str
    values: Sequence[float]
    told: str
    spread: Sequence[tuple[float, float]] | None = None
    from_zero: bool = False


def panels_figure(title: str, what: str, x_title: str, names: Sequence[str], panels: Sequence[Panel]) -> go.Figure:
    """Panels below one another; `what`: the kind of thing that `names` are."""
    figure, count, gap = new_figure(), len(panels), 0.08
    height = (1 - gap * (count - 1)) / count
    axes = {}
    for number, panel in enumerate(panels):
        top, suffix = 1 - number * (height + gap), str(number + 1) if number else ""
        bars = {"type": "data", "symmetric": False} | {
            "array": [high - value for value, (_, high) in zip(panel.values, panel.spread or (), strict=False)],
            "arrayminus": [value - low for value, (low, _) in zip(panel.values, panel.spread or (), strict=False)],
        }
        figure.add_scatter(
            x=list(names), y=list(panel.values), yaxis=f"y{suffix}", name=panel.title, mode="lines+markers",
            showlegend=False, error_y=bars if panel.spread else None,
            line={"color": named(f"line-{number}"), "dash": "dot"}, marker={"size": 9, "symbol": MARKS[number]},
            hovertemplate=f"{what} %{{x}}: {panel.told}<extra></extra>",
        )  # fmt: skip
        axis = {"title": {"text": panel.title}, "domain": [max(0, top - height), top]}
        axes[f"yaxis{suffix}"] = axis | ({"rangemode": "tozero"} if panel.from_zero else {})
    style(figure, title, height=560)
    figure.update_layout(xaxis={"title": {"text": x_title}, "type": "category", "anchor": f"y{count}"}, **axes)
    return figure


def _line(figure, name: str, x, y, number: int, told: str, *, mode: str = "lines+markers", **more) -> None:
    color = named(f"line-{number}" if number < 3 else "ink-soft")
    figure.add_scatter(
        x=x, y=y, name=name, mode=mode, line={"color": color, "dash": DASHES[number % 4]},
        marker={"symbol": MARKS[number % 4], "size": 8, "color": color}, connectgaps=False,
        hovertemplate=f"{escape(name)}<br>{told}<extra></extra>", **more,
    )  # fmt: skip
