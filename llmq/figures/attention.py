"""Time and memory of attention by length, for each kernel, with the lines of N and N². No gradio, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmq.figures.palette import named
from llmq.figures.style import DASHES, MARKS, new_figure, style

if TYPE_CHECKING:
    import plotly.graph_objects as go

PANELS = {  # of the figure: where it lies, the row's key, its unit and how many of the key's that is
    "": ([0.58, 1], "seconds", "ms", 1e-3),
    "2": ([0, 0.42], "peak_bytes", "MB", 1e6),
}


def attention_figure(measured: Mapping[str, Sequence[dict]]) -> go.Figure:
    """Above the time of a call, below the memory beside the inputs; both axes logarithmic. `measured`: of each kernel
    its rows (`tokens`, `seconds`, `peak_bytes`) by length."""
    figure = new_figure()
    for panel, (_, key, unit, size) in PANELS.items():
        for number, (name, rows) in enumerate(measured.items()):
            color = named(f"line-{number}" if number < 3 else "ink-soft")
            figure.add_scatter(
                x=[row["tokens"] for row in rows], y=[row[key] / size for row in rows], yaxis=f"y{panel}", name=name,
                mode="lines+markers", legendgroup=name, showlegend=not panel,
                line={"color": color, "dash": DASHES[number % 4]},
                marker={"symbol": MARKS[number % 4], "size": 8, "color": color},
                hovertemplate=f"{name}<br>%{{x:,}} tokens: %{{y:.3~r}} {unit}<extra></extra>",
            )  # fmt: skip
    _line_of(figure, "N²", measured.get("eager", ()), 2)
    _line_of(figure, "N", measured.get("flash", ()), 1)
    style(figure, "Attention by length: time of a layer, and memory beside its inputs", height=640)
    axis = {"type": "log", "dtick": 1, "tickformat": ",~r", "exponentformat": "power"}
    lengths = sorted({row["tokens"] for rows in measured.values() for row in rows})
    figure.update_layout(
        xaxis={"title": {"text": "tokens (N)"}, "type": "log", "anchor": "y2", "tickvals": lengths,
               "ticktext": [f"{tokens:,}" for tokens in lengths]},
        **{f"yaxis{panel}": axis | {"title": {"text": unit}, "domain": domain}
           for panel, (domain, _, unit, _) in PANELS.items()},
    )  # fmt: skip
    return figure


def _line_of(figure: go.Figure, name: str, rows: Sequence[dict], power: int) -> None:
    """What memory would be at every length if it grew as that power, from the longest of these rows."""
    if len(rows) < 2:
        return
    (*_, last), tokens = rows, [row["tokens"] for row in rows]
    figure.add_scatter(
        x=tokens, y=[last["peak_bytes"] / 1e6 * (n / last["tokens"]) ** power for n in tokens], yaxis="y2",
        name=f"∝ {name} (memory)", mode="lines", line={"color": named("ink-soft"), "dash": "dot", "width": 1},
        hoverinfo="skip",
    )  # fmt: skip
