"""What each layer and module costs when it alone is quantized, as a heatmap. Imports neither gradio nor torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from llmq.figures.palette import STEPS, named
from llmq.figures.style import escape, new_figure, style
from llmq.formatting import MISSING, format_bytes, format_number

if TYPE_CHECKING:
    import plotly.graph_objects as go

WHOLE = "whole layer"
DECADES = 4  # that the colours span at most
WIDE = 12  # layers, from which on not every one has its number


def sensitivity_figure(rows: Sequence[dict], kept: Collection[str] = ()) -> go.Figure:
    """Layers × modules, the whole layer above: colour is log10 KL. `rows`: of layers and modules, each with `layer`;
    `kept`: names of modules that a recipe keeps, marked."""
    cells = {(_module(row), row["layer"]): row for row in rows}
    modules = list(dict.fromkeys(sorted((module for module, _ in cells), key=lambda name: name != WHOLE)))
    layers = range(max(layer for _, layer in cells) + 1)
    low, high = _bounds([row["kl_to_fp16"] for row in rows])
    figure = new_figure({
        "type": "heatmap", "x": list(layers), "y": [escape(module) for module in modules],
        "z": [[_level(cells.get((module, layer)), low, high) for layer in layers] for module in modules],
        "text": [[_told(cells.get((module, layer))) for layer in layers] for module in modules],
        "hovertemplate": "layer %{x}, %{y}<br>%{text}<extra></extra>", "hoverongaps": False, "ygap": 1,
        "colorscale": [(step / (STEPS - 1), named(f"harm-{step}")) for step in range(STEPS)],
        "zmin": low, "zmax": high, "colorbar": _color_bar(low, high),
    })  # fmt: skip
    chosen = [place for place, row in cells.items() if row.get("name") in kept]
    figure.add_scatter(
        x=[layer for _, layer in chosen], y=[escape(module) for module, _ in chosen], mode="markers",
        name="kept by the recipe", hoverinfo="skip", showlegend=bool(chosen),
        marker={"size": 7, "color": named("surface"), "line": {"width": 2, "color": named("ink")}},
    )  # fmt: skip
    style(figure, "KL to FP16 with only this part quantized", height=210 + 28 * len(modules))
    plain = {"showgrid": False, "zeroline": False}
    ticks = {"dtick": 1} if len(layers) < WIDE else {}
    figure.update_layout(
        xaxis={"title": {"text": "layer"}, "range": [-0.5, len(layers) - 0.5], **ticks, **plain},
        yaxis={"autorange": "reversed", "type": "category", **plain},
        margin={"b": 116},
    )
    return figure


def _module(row: dict) -> str:
    return WHOLE if row["part"] == "layer" else row["module"]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """log10 of where the colours begin and end."""
    known = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    return max(min(known), max(known) - DECADES), max(known)


def _level(row: dict | None, low: float, high: float) -> float | None:
    """log10 of the KL within the bounds; None where nothing was measured."""
    if row is None:
        return None
    value = row["kl_to_fp16"]
    return min(max(math.log10(value), low), high) if 0 < value < math.inf else high if value else low


def _told(row: dict | None) -> str:
    if row is None:
        return ""
    kl = format_number(row["kl_to_fp16"]) if math.isfinite(row["kl_to_fp16"]) else "beyond measure"
    decibels = f"{row['sqnr_db']:.1f} dB" if math.isfinite(row.get("sqnr_db", math.inf)) else MISSING
    return f"KL {kl}<br>SQNR {decibels}<br>saves {format_bytes(row['bytes_saved'])}"


def _color_bar(low: float, high: float) -> dict:
    """Powers of ten, and between them 2 and 5 where the values span little."""
    steps = (1, 2, 5) if high - low < 2 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    ticks = [step * 10.0**e for e in exponents for step in steps if low <= math.log10(step * 10.0**e) <= high]
    return {
        "orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "thickness": 12, "outlinewidth": 0,
        "ticks": "outside",
        "tickvals": [math.log10(tick) for tick in ticks], "ticktext": [format_number(tick) for tick in ticks],
    }  # fmt: skip
