"""Heatmaps of activation outliers as plotly figures: numbers in, figures out. Imports neither gradio nor torch.

Colour is logarithmic and breaks at the threshold: a quiet blue ramp under it, an orange one from it on, so what stays
in 16 bit is seen at once, also without red-green vision. Lightness only ever moves one way as |x| grows, and jumps at
the threshold, so the figures read in grey too. Values travel linear, as float32, so that hovering shows |x| itself: the
ramps' stops are placed logarithmically, and a colour bar of its own, in log10, stands for them. A figure whose arrays
would pass `BYTES` is pooled further along the channels, by maximum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmq.figures.palette import STEPS, named
from llmq.figures.style import base_layout, escape, new_figure
from llmq.inspect.report import OutlierReport
from llmq.inspect.views import layer_channel_map

if TYPE_CHECKING:
    import plotly.graph_objects as go

FLOOR = 0.1  # |x| up to here has the first colour
BYTES = 135_000  # most bytes of a figure's arrays in base64: 32 layers of 512 cells
NAME_CHARACTERS = 18


def map_figure(report: OutlierReport, kind: str, phase: str, threshold: float) -> go.Figure:
    """The layer × channel heatmap of one kind in one phase."""
    cells = layer_channel_map(report, kind, phase)
    title = f"Input of {kind}, {phase}: largest |x| by layer and channel"
    return layer_channel_figure(cells.values, cells.channels, threshold, title, layers=cells.layers, width=cells.width)


def token_figure(report: OutlierReport, kind: str, layer: int, threshold: float) -> go.Figure | None:
    """Token × channel heatmap of one layer's input over the prompt; None where there is nothing to show."""
    module = next((m for m in report.modules if m.kind == kind and m.layer == layer), None)
    if module is None or module.token_map is None:
        return None
    cells = module.token_map
    return token_channel_figure(
        cells.values,
        cells.channels,
        cells.tokens,
        report.token_texts[: report.prompt_tokens],
        threshold,
        f"Input of {kind}, layer {layer}: largest |x| by token and channel",
        width=cells.width,
        height=cells.height,
        first_token=cells.first_token,
    )


def layer_channel_figure(
    values: np.ndarray,
    channels: np.ndarray,
    threshold: float,
    title: str,
    *,
    layers: Sequence[int | None] | None = None,
    width: int | None = None,
) -> go.Figure:
    """Layer × channel heatmap of max |x|.

    `values` (layers, cells) max |x|, NaN where nothing ran; `channels`, same shape, the channel each maximum is in;
    `layers`, one number a row (default 0, 1, …); `width` channels a cell, for the axis (default: from `channels`).
    """
    values, channels, width = _fit(values, channels, width=width or _cell_width(channels))
    names = [str(row) for row in range(len(values))] if layers is None else [_layer_name(layer) for layer in layers]
    heatmap = _heatmap(
        values,
        threshold,
        x0=(width - 1) / 2,
        dx=width,
        y=names,
        customdata=channels,
        hovertemplate="layer %{y}<br>channel %{customdata}<br>|x| %{z:,.5~r}<extra></extra>",
    )
    return _figure(heatmap, values, threshold, title, "layer")


def token_channel_figure(
    values: np.ndarray,
    channels: np.ndarray,
    tokens: np.ndarray,
    texts: Sequence[str],
    threshold: float,
    title: str,
    *,
    width: int | None = None,
    height: int = 1,
    first_token: int = 0,
) -> go.Figure:
    """Token × channel heatmap of max |x| for one layer, its rows named by their tokens.

    `values`, `channels`, `tokens` (rows, cells): a cell's max |x|, and the channel and the token it is at; `texts`: the
    prompt's tokens from token 0; a cell covers `width` channels × `height` tokens, the first row from `first_token`.
    """
    values, channels, tokens, width = _fit(values, channels, tokens, width=width or _cell_width(channels))
    heatmap = _heatmap(
        values,
        threshold,
        x0=(width - 1) / 2,
        dx=width,
        y=[_token_name(first_token + row * height, height, texts) for row in range(len(values))],
        customdata=channels,
        text=tokens,
        hovertemplate="%{y}<br>token %{text}, channel %{customdata}<br>|x| %{z:,.5~r}<extra></extra>",
    )
    return _figure(heatmap, values, threshold, title, "token")


def _layer_name(layer: int | None) -> str:
    return "head" if layer is None else str(layer)


def _token_name(first: int, height: int, texts: Sequence[str]) -> str:
    """A row's label, led by the number of its first token: plotly merges rows of one name."""
    last = min(first + height, len(texts)) - 1
    joined = "".join(texts[first : last + 1])
    short = joined if len(joined) <= NAME_CHARACTERS else joined[: NAME_CHARACTERS - 1] + "…"
    return f"{first}–{last} {escape(short)}" if last > first else f"{first} {escape(short)}"


def _fit(values: np.ndarray, *where: np.ndarray, width: int) -> tuple:
    """`values` and `where` small enough to send, and the channels a column then covers."""
    where = tuple(_smallest(array) for array in where)
    size = values.size * (4 + sum(array.itemsize for array in where)) * 4 / 3
    factor = math.ceil(size / BYTES) or 1
    return *_pool_columns(values, *where, factor=factor), width * factor


def _pool_columns(values: np.ndarray, *where: np.ndarray, factor: int) -> tuple[np.ndarray, ...]:
    """Merge every `factor` columns by maximum; `where` arrays give their entry at each maximum."""
    if factor == 1:
        return values, *where
    padding = (0, 0), (0, -values.shape[1] % factor)
    cells = np.pad(values, padding, constant_values=-1).reshape(len(values), -1, factor)
    best = cells.argmax(axis=2)[..., None]
    padded = [np.pad(array, padding).reshape(cells.shape) for array in where]
    return tuple(np.take_along_axis(array, best, axis=2)[..., 0] for array in (cells, *padded))


def _cell_width(channels: np.ndarray) -> int:
    """The narrowest width of equal cells that puts every channel into its column."""
    return int(np.ceil((channels.max(axis=0, initial=0) + 1) / np.arange(1, channels.shape[1] + 1)).max(initial=1))


def _smallest(numbers: np.ndarray) -> np.ndarray:
    """int16 where the numbers fit, else int32: half the bytes on their way to the browser."""
    return numbers.astype(np.int16 if numbers.max(initial=0) < 2**15 else np.int32)


def _bounds(values: np.ndarray, threshold: float) -> tuple[float, float]:
    """Where the colours begin and end: at least a decade on both sides of the threshold."""
    finite = values[np.isfinite(values)]
    return min(FLOOR, threshold / 10), max(float(finite.max(initial=0)), threshold * 10)


def _heatmap(values: np.ndarray, threshold: float, **more) -> dict:
    """The trace of the cells; `more`: where they lie and what pointing at one says."""
    low, high = _bounds(values, threshold)
    steps = _color_steps(low, high, threshold)
    return {
        "type": "heatmap",
        "z": np.nan_to_num(values.astype(np.float32), nan=np.nan),
        "zmin": 0,
        "zmax": high,
        "colorscale": [(0, steps[0][1]), *((value / high, color) for value, color in steps)],
        "showscale": False,
        "hoverongaps": False,
        **more,
    }


def _color_steps(low: float, high: float, threshold: float) -> list[tuple[float, str]]:
    """(|x|, colour) in ascending order, evenly spaced in log |x|, with a jump of hue just under the threshold."""
    ramps = {"under": np.geomspace(low, threshold * (1 - 1e-6), STEPS), "over": np.geomspace(threshold, high, STEPS)}
    return [(float(v), named(f"{name}-{i}")) for name, ramp in ramps.items() for i, v in enumerate(ramp)]


def _color_bar(low: float, high: float, threshold: float) -> dict:
    """An empty trace that only carries the colour bar: log10 |x|, with the threshold among its ticks."""
    span = math.log10(high / low)
    scale = [(math.log10(v / low) / span, color) for v, color in _color_steps(low, high, threshold)]
    scale = [(min(max(position, 0.0), 1.0), color) for position, color in scale]
    ticks = _ticks(low, high, threshold)
    bar = {
        "title": {"text": "|x|", "side": "top"},
        "tickvals": [math.log10(value) for value in ticks],
        "ticktext": [f"<b>{v:g} threshold</b>" if v == threshold else f"{v:,g}" for v in ticks],
        "thickness": 14,
        "outlinewidth": 0,
        "ticks": "outside",
    }
    marker = {"color": [math.log10(low)], "cmin": math.log10(low), "cmax": math.log10(high), "colorscale": scale}
    marker |= {"showscale": True, "colorbar": bar}
    return {"type": "scatter", "x": [None], "y": [None], "mode": "markers", "marker": marker, "hoverinfo": "skip"}


def _ticks(low: float, high: float, threshold: float) -> list[float]:
    """The threshold and the powers of ten, without those whose label would touch the threshold's."""
    room = 0.05 * math.log10(high / low)
    exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high)) + 1)
    decades = [10.0**e for e in exponents if abs(e - math.log10(threshold)) > room]
    return sorted([threshold, *decades])


def _figure(heatmap: dict, values: np.ndarray, threshold: float, title: str, row: str) -> go.Figure:
    figure = new_figure(heatmap, _color_bar(*_bounds(values, threshold), threshold))
    plain = {"showgrid": False, "zeroline": False}
    figure.update_layout(
        **base_layout(),
        title={"text": escape(title)},
        xaxis={"title": {"text": "channel"}, **plain},
        yaxis={
            "title": {"text": row, "standoff": 12},
            "type": "category",
            "autorange": "reversed",
            "automargin": True,
            **plain,
        },
        showlegend=False,
        height=int(np.clip(150 + 14 * len(values), 300, 900)),
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
    )
    return figure
