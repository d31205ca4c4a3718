"""Activations to statistics, on the device the activations are on.

Nothing here waits for the device except `fetch` and the list of strong channels in `StepTotals.add`: one histogram
call instead of `bincount`, which reads its minimum and maximum back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from llmq.inspect.report import CRITERION, THRESHOLDS, PhaseStatistics, PromptPositions, TokenMap, cutoff

BINS = len(THRESHOLDS) + 2  # under the first threshold, between each two, over the last; then one for NaN
NAN_BIN = BINS - 1
CHUNK = 1 << 22  # values a histogram call: float32 counts are exact up to 2**24
MAP_ROWS, MAP_COLUMNS = 128, 256  # largest token map


@dataclass(frozen=True)
class Layout:
    """The inputs that one step gathers: for each the modules that read it and its (tokens, in_features)."""

    device: torch.device
    compared_as: str
    inputs: tuple[tuple[tuple[str, ...], tuple[int, int]], ...]


@dataclass(frozen=True, eq=False)
class PromptStatistics:
    """One input's prefill on its device: `tensors` are absmax, histogram, the token map's values and flat positions,
    and how many positions of each channel, and which positions in any channel, meet the criterion."""

    tensors: tuple[torch.Tensor, ...]
    rows: int
    height: int
    width: int

    def to_numpy(
        self,
        absmax: np.ndarray,
        histogram: np.ndarray,
        values: np.ndarray,
        position: np.ndarray,
        counts: np.ndarray,
        touched: np.ndarray,
        *,
        first_token: int,
    ) -> tuple[PhaseStatistics, TokenMap, PromptPositions]:
        """The fetched `tensors` as what a report holds; row 0 of this input is the prompt's token `first_token`."""
        tokens, channels = np.divmod(position, len(absmax))
        where = channels.astype(np.int32), (tokens + first_token).astype(np.int32)
        token_map = TokenMap(values, *where, self.height, self.width, first_token, first_token + self.rows)
        positions = PromptPositions(counts, touched)
        return phase_statistics(absmax, histogram[0], self.rows * len(absmax)), token_map, positions


@torch.inference_mode()
def reduce_prompt(absolute: torch.Tensor, compared_as: str) -> PromptStatistics:
    """Statistics of |x|, (tokens, in_features) float32. Overwrites NaN in `absolute` with 0 after counting them."""
    rows, columns = absolute.shape
    histogram = count_bins(absolute.flatten(), compared_as)
    absolute.nan_to_num_(nan=0.0, posinf=torch.inf)
    cell = (-(-rows // MAP_ROWS), -(-columns // MAP_COLUMNS))
    values, position = F.max_pool2d(absolute[None, None], cell, cell, ceil_mode=True, return_indices=True)
    over = absolute >= float(cutoff(CRITERION, compared_as))
    criterion = over.sum(0, dtype=torch.int32), over.any(1)
    return PromptStatistics((absolute.amax(0), histogram, values[0, 0], position[0, 0], *criterion), rows, *cell)


@torch.inference_mode()
def reduce_stream(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder block's output (1, tokens, width) -> max |y| of each channel, float32, and at which token, int64."""
    absolute = y.reshape(-1, y.shape[-1]).abs().float().nan_to_num_(nan=0.0, posinf=torch.inf)
    return tuple(absolute.max(0))


def count_bins(
    absolute: torch.Tensor, compared_as: str, owner: torch.Tensor | None = None, owners: int = 1
) -> torch.Tensor:
    """Histogram of flat |x| (float32) over the bins between `THRESHOLDS`: (owners, BINS) int64.

    `owner`: int32, same shape, which row each value counts for, times BINS. Exact: the edges are `cutoff`s.
    """
    bins = owners * BINS
    edges = _edges(compared_as, absolute.device)
    total = torch.zeros(bins, dtype=torch.int64, device=absolute.device)
    for start in range(0, absolute.numel(), CHUNK):
        part = absolute[start : start + CHUNK]
        index = torch.bucketize(part, edges, right=True, out_int32=True).masked_fill_(part.isnan(), NAN_BIN)
        if owner is not None:
            index += owner[start : start + CHUNK]
        total += torch.histc(index.float(), bins=bins, min=-0.5, max=bins - 0.5).long()
    return total.view(owners, BINS)


@cache
def _edges(compared_as: str, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(cutoff(THRESHOLDS, compared_as)).to(device)


def phase_statistics(absmax: np.ndarray, histogram: np.ndarray, values: int) -> PhaseStatistics:
    """One row of `count_bins` as counts of |x| >= each threshold."""
    at_least = histogram[:NAN_BIN][::-1].cumsum()[::-1]
    return PhaseStatistics(absmax, at_least[1:].astype(np.int64), values, int(histogram[NAN_BIN]))


class StepTotals:
    """Running statistics, on the device, of all decode steps that have one `Layout`."""

    def __init__(self, layout: Layout) -> None:
        sizes = [rows * columns for _, (rows, columns) in layout.inputs]
        numbers = torch.arange(len(sizes), dtype=torch.int32) * BINS
        self.layout = layout
        self._owner = numbers.repeat_interleave(torch.tensor(sizes)).to(layout.device)
        self._ends = np.cumsum([columns for _, (_, columns) in layout.inputs])
        self._absmax = torch.zeros(int(self._ends[-1]), device=layout.device)
        self._histogram = torch.zeros(len(sizes), BINS, dtype=torch.int64, device=layout.device)
        self._steps = 0

    @torch.inference_mode()
    def add(self, inputs: list[torch.Tensor], lowest_threshold: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """Add one step's inputs, each (tokens, in_features) |x|; returns their channels over the threshold and |x|.

        The step's one synchronisation: how many channels there are, then two short copies.
        """
        compared_as = self.layout.compared_as
        values = torch.cat([x.flatten() for x in inputs])
        self._histogram += count_bins(values, compared_as, self._owner, len(inputs))
        absmax = torch.cat([x.amax(0) if len(x) > 1 else x[0] for x in inputs])
        absmax.nan_to_num_(nan=0.0, posinf=torch.inf)
        self._absmax = torch.maximum(self._absmax, absmax)
        self._steps += 1
        strong = (absmax >= float(cutoff(lowest_threshold, compared_as))).nonzero().flatten()
        positions, peaks = strong.cpu().numpy(), absmax[strong].cpu().numpy()
        starts = np.concatenate([[0], self._ends[:-1]])
        split = np.searchsorted(positions, self._ends[:-1])
        parts = zip(starts, np.split(positions, split), np.split(peaks, split), strict=True)
        return [((where - start).astype(np.int32), found) for start, where, found in parts]

    def statistics(self) -> Iterator[tuple[tuple[str, ...], PhaseStatistics]]:
        """The modules of every input and its statistics over all the steps added."""
        absmax, histogram = fetch([self._absmax, self._histogram])
        for (names, (rows, columns)), peaks, row in zip(
            self.layout.inputs, np.split(absmax, self._ends[:-1]), histogram, strict=True
        ):
            yield names, phase_statistics(peaks, row, rows * columns * self._steps)


def fetch(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    """Copy tensors to the host as numpy arrays, with one transfer for each device and dtype."""
    groups: dict[tuple, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    arrays: list[np.ndarray] = [np.empty(0)] * len(tensors)
    for members in groups.values():
        flat = torch.cat([tensors[index].flatten() for index in members]).cpu().numpy()
        ends = np.cumsum([tensors[index].numel() for index in members])
        for index, part in zip(members, np.split(flat, ends[:-1]), strict=True):
            arrays[index] = part.reshape(tuple(tensors[index].shape))
    return arrays
