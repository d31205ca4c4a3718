"""An `OutlierReport` as the page's heatmap and table show it. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmq.errors import unknown
from llmq.formatting import format_share
from llmq.inspect.report import PHASES, OutlierReport, cutoff

STRONGEST = 15  # rows of the table of channels


class ChannelMap(NamedTuple):
    """Layers × channels of one kind of module, max-pooled over cells of `width` neighbouring channels.

    `values` (rows, cells) float32 max |x|, NaN where nothing ran; `channels`, same shape, int32, the channel of that
    maximum; `layers`: one number a row (None for a layer outside the stack, as lm_head); `in_features` channels.
    """

    values: np.ndarray
    channels: np.ndarray
    layers: list[int | None]
    width: int
    in_features: int


@dataclass(frozen=True)
class StrongChannel:
    """A channel of one kind of module: where |x| is largest, and every layer in which it reaches the threshold."""

    kind: str
    layer: int | None
    channel: int
    absmax: float
    phase: str
    layers: tuple[int | None, ...]


def layer_channel_map(report: OutlierReport, kind: str, phase: str, columns: int = 512) -> ChannelMap:
    """Return max |x| by layer and channel for modules of `kind`, in at most `columns` cells a layer; maxima survive.

    Modules of one kind in one layer (q, k and v) are merged by maximum. In 'decode' over all generated tokens.
    """
    stack, layers, _ = _stack(report, kind, phase)
    rows, in_features = stack.shape
    width = -(-in_features // columns)
    padded = np.full((rows, -(-in_features // width) * width), -1, np.float32)
    padded[:, :in_features] = stack
    cells = padded.reshape(rows, -1, width)
    best = cells.argmax(axis=2)
    values = np.take_along_axis(cells, best[..., None], axis=2)[..., 0]
    channels = (best + np.arange(cells.shape[1]) * width).astype(np.int32)
    return ChannelMap(np.where(values < 0, np.nan, values), channels, layers, width, in_features)


def strongest_channels(report: OutlierReport, threshold: float, n: int = 20) -> list[StrongChannel]:
    """Return the `n` strongest channels that reach `threshold` in either phase, strongest first, by (kind, channel)."""
    rows = [row for kind in report.kinds for row in _strongest_of_kind(report, kind, threshold, n)]
    return sorted(rows, key=lambda row: -row.absmax)[:n]


def _strongest_of_kind(report: OutlierReport, kind: str, threshold: float, n: int) -> list[StrongChannel]:
    prefill, layers, compared = _stack(report, kind, "prefill")
    stacks = np.stack([prefill, _stack(report, kind, "decode")[0]])  # as PHASES
    limits = np.array([cutoff(threshold, dtype) for dtype in compared])
    pooled = stacks.max(axis=0)
    over = pooled >= limits[:, None]
    peaks = np.where(over, pooled, -1).max(axis=0, initial=-1)
    rows = []
    for channel in np.argsort(-peaks, kind="stable")[:n]:
        if peaks[channel] < 0:
            break
        phase, row = np.unravel_index(stacks[:, :, channel].argmax(), stacks.shape[:2])
        reached = tuple(layers[index] for index in np.flatnonzero(over[:, channel]))
        strongest = float(stacks[phase, row, channel])
        rows.append(StrongChannel(kind, layers[row], int(channel), strongest, PHASES[phase], reached))
    return rows


def shares_table(report: OutlierReport, threshold: float) -> list[list[str]]:
    """Return one row for each kind of linear layer and phase: how many layers, which shares of channels and values."""
    phases = PHASES if report.generated_tokens else PHASES[:1]
    return [_share_row(report, kind, phase, threshold) for kind in report.kinds for phase in phases]


def _share_row(report: OutlierReport, kind: str, phase: str, threshold: float) -> list[str]:
    # q, k and v of a layer read one tensor, as do gate and up: one module a layer speaks for them.
    modules = list({module.layer: module for module in report.modules if module.kind == kind}.values())
    channels = [module.share_of_channels(threshold, phase) for module in modules]
    values = [module.share_of_values(threshold, phase) for module in modules]
    largest = max(float(module.statistics(phase).absmax.max(initial=0)) for module in modules)
    return [
        kind + (" (last position alone)" if modules[0].layer is None and phase == "prefill" else ""),
        phase,
        f"{sum(share > 0 for share in channels)} of {len(modules)}",
        format_share(sum(channels) / len(channels)),
        format_share(sum(values) / len(values)),
        f"{largest:,.1f}",
    ]


def strongest_table(report: OutlierReport, threshold: float) -> list[list[str]]:
    """Return the strongest channels, strongest first, and the layers where each reaches the threshold."""
    return [
        [
            row.kind,
            str(row.channel),
            f"{row.absmax:,.1f}",
            "head" if row.layer is None else str(row.layer),
            row.phase,
            ranges([layer for layer in row.layers if layer is not None]) or "head",
        ]
        for row in strongest_channels(report, threshold, STRONGEST)
    ]


def ranges(numbers: list[int]) -> str:
    """Write [1, 2, 3, 7] -> '1–3, 7'."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in parts)


def _stack(report: OutlierReport, kind: str, phase: str) -> tuple[np.ndarray, list[int | None], list[str]]:
    """(layers, widest in_features) float32 max |x|, -1 where nothing ran; the layers; what dtype each compares in."""
    modules = [module for module in report.modules if module.kind == kind]
    if not modules:
        raise unknown("kind of layer", kind, report.kinds)
    layers = sorted({module.layer for module in modules}, key=lambda layer: (layer is None, layer))
    row_of = {layer: row for row, layer in enumerate(layers)}
    stack = np.full((len(layers), max(module.in_features for module in modules)), -1, np.float32)
    compared = [""] * len(layers)
    for module in modules:
        row, found = row_of[module.layer], module.statistics(phase)
        compared[row] = module.compared_as
        if found.values:
            np.maximum(stack[row, : module.in_features], found.absmax, out=stack[row, : module.in_features])
    return stack, layers, compared
