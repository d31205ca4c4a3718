"""Activations to statistics, on the device the activations are on.

The bits of a magnitude, read as a whole number, order as the magnitudes do. So maxima are taken of integers, which
carry in their lower half where they stood, and on a CPU 16-bit activations are counted by their bits.

On a GPU nothing here waits for the device except `fetch` and the list of strong channels in `StepTotals.add`: one
histogram call instead of `bincount`, which reads its minimum and maximum back.
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
PATTERNS = 1 << 15  # bits of a 16-bit magnitude
CPU_PIECE = 1 << 18  # numbers widened at a time, so that they stay in its caches: 8 times faster on 2,048 x 11,008
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
PromptParts = tuple[PhaseStatistics, TokenMap, PromptPositions]  # of a report: one input's prefill


@dataclass(frozen=True)
class Layout:
    """The inputs that one step gathers: for each the modules that read it and its (tokens, in_features)."""

    device: torch.device
    compared_as: str
    inputs: tuple[tuple[tuple[str, ...], tuple[int, int]], ...]


@dataclass(frozen=True, eq=False)
class PromptStatistics:
    """One input's prefill on its device. `tensors`: the bits of each channel's absmax, histogram, the token map's peaks
    (`first_peaks`), and how many positions of each channel, and which positions in any channel, meet the criterion."""

    tensors: tuple[torch.Tensor, ...]
    dtype: torch.dtype
    rows: int
    height: int
    width: int

    def to_numpy(self, *fetched: np.ndarray, first_token: int) -> PromptParts:
        """Turn the fetched `tensors` into parts of a report; row 0 of this input is the prompt's `first_token`."""
        absmax, histogram, peaks, counts, touched = fetched
        values, place = split_peaks(peaks, self.dtype)
        down = place // self.width
        tokens = np.arange(len(place))[:, None] * self.height + (down + first_token)
        channels = np.arange(place.shape[1]) * self.width + (place - down * self.width)
        where = channels.astype(np.int32), tokens.astype(np.int32)
        token_map = TokenMap(values, *where, self.height, self.width, first_token, first_token + self.rows)
        positions = PromptPositions(counts.copy(), touched)  # a view would keep everything fetched with it
        statistics = phase_statistics(magnitudes(absmax, self.dtype), histogram[0], self.rows * len(absmax))
        return statistics, token_map, positions


@torch.inference_mode()
def reduce_prompt(absolute: torch.Tensor, compared_as: str) -> PromptStatistics:
    """Reduce |x|, (tokens, in_features), to statistics. Overwrites NaN in `absolute` with 0 after counting them."""
    rows, columns = absolute.shape
    histogram = count_bins(absolute.flatten(), compared_as)  # (1, BINS)
    bits = _bits_without_nan(absolute)  # (rows, columns)
    height, width = -(-rows // MAP_ROWS), -(-columns // MAP_COLUMNS)
    edge = edge_bits(CRITERION, compared_as, absolute.dtype)
    narrow = torch.int16 if rows < 1 << 15 else torch.int32  # a sum of bytes in int16 is 10 times faster than of bool
    counts = (bits >= edge).view(torch.int8).sum(0, dtype=narrow).int()  # (columns,)
    peaks = first_peaks(bits, height, width)  # (down, across) cells
    tensors = bits.amax(0), histogram, peaks, counts, bits.amax(1) >= edge
    return PromptStatistics(tensors, absolute.dtype, rows, height, width)


@torch.inference_mode()
def reduce_stream(y: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """Reduce a decoder block's output (1, tokens, hidden_size) -> (hidden_size,) peaks, max |y| of each channel and its
    token; and the dtype to give `split_peaks`."""
    absolute = y.reshape(-1, y.shape[-1]).abs()
    return first_peaks(_bits_without_nan(absolute), len(absolute), 1)[0], absolute.dtype


def _bits_without_nan(absolute: torch.Tensor) -> torch.Tensor:
    return absolute.nan_to_num_(nan=0.0, posinf=torch.inf).view(INTEGERS[absolute.dtype])


def first_peaks(bits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the maximum of each cell of `height` rows x `width` columns, and the first place in it that has it, as one
    integer: the magnitude's bits over the place counted backwards, so that of two equal ones the earlier is larger."""
    rows, columns = bits.shape
    narrow = bits.dtype == torch.int16 and height * width <= 1 << 16
    shift, integer = (16, torch.int32) if narrow else (32, torch.int64)  # the lower bits hold the place
    down, across = -(-rows // height), -(-columns // width)
    missing = across * width - columns, down * height - rows
    if any(missing):
        bits = F.pad(bits, (0, missing[0], 0, missing[1]))
    place = torch.arange(height * width, dtype=integer, device=bits.device).view(height, 1, width)
    backwards = ((1 << shift) - 1 - place).expand(height, across, width).reshape(height, -1)
    piece = CPU_PIECE if bits.device.type == "cpu" else CHUNK
    pieces = bits.view(down, height, -1).split(max(1, piece // (height * across * width)))
    columnwise = torch.cat([torch.add(backwards, piece, alpha=1 << shift).amax(1) for piece in pieces])
    return columnwise.view(down, across, width).amax(2)


def split_peaks(peaks: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Turn `first_peaks` of activations of `dtype` into (maximum, float32; place in its cell, of their dtype)."""
    shift = 16 if peaks.dtype == np.int32 else 32
    return magnitudes(peaks >> shift, dtype), ~peaks & ((1 << shift) - 1)


def magnitudes(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Turn bits of magnitudes of `dtype` into float32."""
    if dtype == torch.float16:
        return bits.astype(np.int16).view(np.float16).astype(np.float32)
    return (bits.astype(np.int32) << (16 if dtype == torch.bfloat16 else 0)).view(np.float32)


@cache
def edge_bits(threshold: float, compared_as: str, dtype: torch.dtype) -> int:
    """Return the bits of the smallest magnitude of `dtype` that reaches the threshold where it is compared."""
    edge = cutoff(threshold, compared_as)
    if dtype == torch.float32:
        return int(edge.view(np.int32))
    return int(np.searchsorted(magnitudes(np.arange(_infinity(dtype) + 1), dtype), edge))


def _infinity(dtype: torch.dtype) -> int:
    """Its bits; more are NaN."""
    return int(torch.tensor(torch.inf, dtype=dtype).view(INTEGERS[dtype]))


def count_bins(
    absolute: torch.Tensor, compared_as: str, owner: torch.Tensor | None = None, owners: int = 1
) -> torch.Tensor:
    """Count a histogram of flat |x| over the bins between `THRESHOLDS`: (owners, BINS) int64. Exact: the edges are
    `cutoff`s.

    `owner`: int32, same shape, which row each value counts for, times BINS.
    """
    by_bits = absolute.device.type == "cpu" and absolute.dtype in (torch.float16, torch.bfloat16)
    return (_count_bits if by_bits else _count_values)(absolute, compared_as, owner, owners)


def _count_bits(absolute: torch.Tensor, compared_as: str, owner: torch.Tensor | None, owners: int) -> torch.Tensor:
    """`count_bins` of 16-bit numbers on a CPU: measured 12 times faster than to look for each one's bin."""
    ends, bins = _bins_of_bits(compared_as, absolute.dtype)
    bits = absolute.view(torch.int16)
    if owner is None:
        below = torch.bincount(bits, minlength=PATTERNS).cumsum(0)[ends]  # (BINS,)
        return below.diff(prepend=below.new_zeros(1))[None]
    found = torch.bincount(bins.index_select(0, bits.int()).add_(owner), minlength=owners * BINS)
    return found.view(owners, BINS)


@cache
def _bins_of_bits(compared_as: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The last pattern of each bin, int64; the bin of each pattern, int32."""
    starts = [edge_bits(threshold, compared_as, dtype) for threshold in THRESHOLDS] + [_infinity(dtype) + 1]
    bins = np.searchsorted(starts, np.arange(PATTERNS), side="right").astype(np.int32)
    return torch.tensor([*starts, PATTERNS]) - 1, torch.from_numpy(bins)


def _count_values(absolute: torch.Tensor, compared_as: str, owner: torch.Tensor | None, owners: int) -> torch.Tensor:
    bins = owners * BINS
    edges = _edges(compared_as, absolute.device)
    total = torch.zeros(bins, dtype=torch.int64, device=absolute.device)
    for start in range(0, absolute.numel(), CHUNK):
        part = absolute[start : start + CHUNK].float()
        index = torch.bucketize(part, edges, right=True, out_int32=True).masked_fill_(part.isnan(), NAN_BIN)
        if owner is not None:
            index += owner[start : start + CHUNK]
        total += torch.histc(index.float(), bins=bins, min=-0.5, max=bins - 0.5).long()
    return total.view(owners, BINS)


@cache
def _edges(compared_as: str, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(cutoff(THRESHOLDS, compared_as)).to(device)


def phase_statistics(absmax: np.ndarray, histogram: np.ndarray, values: int) -> PhaseStatistics:
    """Turn one row of `count_bins` into counts of |x| >= each threshold."""
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
        single = all(rows == 1 for _, (rows, _) in self.layout.inputs)  # one token: |x| is its own maximum
        values = torch.cat(inputs, 1)[0] if single else torch.cat([x.flatten() for x in inputs])
        self._histogram += count_bins(values, compared_as, self._owner, len(inputs))
        absmax = (values if single else torch.cat([x.amax(0) for x in inputs])).float()  # (all channels,)
        absmax.nan_to_num_(nan=0.0, posinf=torch.inf)
        self._absmax = torch.maximum(self._absmax, absmax)
        self._steps += 1
        strong = (absmax >= float(cutoff(lowest_threshold, compared_as))).nonzero().flatten()  # places in absmax
        positions, peaks = strong.cpu().numpy(), absmax[strong].cpu().numpy()
        found_until = np.searchsorted(positions, self._ends)
        starts = np.concatenate([[0], self._ends[:-1]])
        channels = (positions - np.repeat(starts, np.diff(found_until, prepend=0))).astype(np.int32)
        return list(zip(_split(channels, found_until), _split(peaks, found_until), strict=True))

    def statistics(self) -> Iterator[tuple[tuple[str, ...], PhaseStatistics]]:
        """Return the modules of every input and its statistics over all the steps added."""
        absmax, histogram = fetch([self._absmax, self._histogram])
        for (names, (rows, columns)), peaks, row in zip(
            self.layout.inputs, _split(absmax, self._ends), histogram, strict=True
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
        for index, part in zip(members, _split(flat, ends), strict=True):
            arrays[index] = part.reshape(tuple(tensors[index].shape))
    return arrays


def _split(flat: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Views of `flat` up to each of `ends`; `np.split` takes 4 times as long, 200 arrays a token."""
    ends = ends.tolist()
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
