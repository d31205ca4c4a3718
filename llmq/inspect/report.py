"""What an observation of a model's activations found: numpy arrays, and the questions that the page asks of them.

Everything here works on stored statistics, so a threshold can be moved without running the model again. Imports
neither torch nor gradio.

Values are kept as float32, which holds every fp16 and bf16 value exactly. bitsandbytes decides with
`A.to(float16).abs() >= threshold`, where torch rounds the threshold to float16 too; `cutoff` moves the threshold
instead of the values, so the decision is the same one, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmq.errors import BadChoice, unknown

PHASES = ("prefill", "decode")
CRITERION = 6.0  # the magnitude in the paper's criterion of an outlier feature (section 4.1)
THRESHOLDS = np.arange(5, 201) / 10  # 0.5, 0.6, … 20.0: the slider's stops, and where counts of values are exact
LARGEST_THRESHOLD = 65504.0  # the largest float16


def cutoff(threshold: float | np.ndarray, dtype: str) -> np.ndarray:
    """Return the smallest float32 that passes `x.abs() >= threshold` once x is rounded to `dtype`, as torch compares.

    `dtype`: 'float16', 'bfloat16' or 'float32', the dtype of the comparison; torch rounds a Python threshold to it.
    """
    if np.any(~((np.asarray(threshold) > 0) & (np.asarray(threshold) <= LARGEST_THRESHOLD))):
        raise BadChoice(f"threshold {threshold!r} must lie over 0 and up to {LARGEST_THRESHOLD:g}")
    rounded = _round_to(threshold, dtype)
    if dtype == "float32":
        return rounded
    middle = ((rounded.astype(np.float64) + _next_below(rounded, dtype)) / 2).astype(np.float32)
    return np.where(_round_to(middle, dtype) == rounded, middle, np.nextafter(middle, np.float32(np.inf)))


def _round_to(values: float | np.ndarray, dtype: str) -> np.ndarray:
    """Round to `dtype`, nearest and ties to even, by way of float32 as torch does; returned as float32."""
    values = np.asarray(values, dtype=np.float32)
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)
    raise unknown("dtype of a comparison", dtype, ("float16", "bfloat16", "float32"))


def _next_below(values: np.ndarray, dtype: str) -> np.ndarray:
    """The next smaller magnitude in `dtype`; values are float32, not negative, and lie on the grid of `dtype`."""
    if dtype == "float16":
        return np.nextafter(values.astype(np.float16), np.float16(0)).astype(np.float32)
    bits = values.view(np.uint32)
    return np.where(bits > 0, bits - np.minimum(bits, np.uint32(0x10000)), 0).astype(np.uint32).view(np.float32)


def grid_index(threshold: float) -> int:
    """Return the index in `THRESHOLDS` nearest to `threshold`. Raises BadChoice outside their range."""
    low, high = THRESHOLDS[0], THRESHOLDS[-1]
    if not low - 1e-6 <= threshold <= high + 1e-6:
        raise BadChoice(f"threshold {threshold!r}: shares of values are known from {low:g} to {high:g}")
    return int(np.abs(THRESHOLDS - threshold).argmin())


@dataclass(frozen=True, eq=False)
class TokenMap:
    """One layer's prompt as max |x| over cells of `height` tokens × `width` channels, cell (0, 0) at `first_token`.

    `values` (rows, columns) float32; `channels` and `tokens`, same shape, int32, say where in its cell the maximum is.
    """

    values: np.ndarray
    channels: np.ndarray
    tokens: np.ndarray
    height: int
    width: int
    first_token: int
    end: int  # one past its last token


@dataclass(frozen=True, eq=False)
class PromptPositions:
    """Where |x| >= `CRITERION` in one layer's prompt. `counts` (in_features,) int32: at how many positions, by channel;
    `touched` (tokens,) bool: which positions, in any channel."""

    counts: np.ndarray
    touched: np.ndarray


@dataclass(frozen=True, eq=False)
class StreamPeak:
    """What one decoder block put out over the prompt. `absmax` (width,) float32: max |y| of each channel, and `tokens`
    (width,): the position it is at."""

    layer: int
    absmax: np.ndarray
    tokens: np.ndarray

    def strongest(self, n: int = 1) -> list[tuple[int, int, float]]:
        """Return the `n` strongest channels, as (channel, token, |y|)."""
        order = np.argsort(-self.absmax, kind="stable")[:n]
        return [(int(channel), int(self.tokens[channel]), float(self.absmax[channel])) for channel in order]


@dataclass(frozen=True, eq=False)
class PhaseStatistics:
    """One linear layer's input in one phase. Arrays may be shared by layers that read the same tensor.

    `absmax` (in_features,) float32: max |x| over all tokens. `counts` (196,) int64: how many of the `values` numbers
    have |x| >= each of `THRESHOLDS`. `nan` of them are not a number, which no threshold counts. `values` is 0 where the
    layer did not run.
    """

    absmax: np.ndarray
    counts: np.ndarray
    values: int = 0
    nan: int = 0

    @classmethod
    def of_nothing(cls, in_features: int) -> PhaseStatistics:
        return cls(np.zeros(in_features, np.float32), np.zeros(len(THRESHOLDS), np.int64))

    def __add__(self, other: PhaseStatistics) -> PhaseStatistics:
        absmax = np.maximum(self.absmax, other.absmax)
        return PhaseStatistics(absmax, self.counts + other.counts, self.values + other.values, self.nan + other.nan)


@dataclass(frozen=True, eq=False)
class ModuleOutliers:
    """The input of one linear layer. `dtype` is the activation's; `quantized` layers compare it in float16.

    `decode_steps`: for every generated token the channels (int32, ascending) with |x| >= `lowest_threshold` and their
    |x| (float32). `layer` is None outside the layers, as for lm_head. `outlier_columns`: the channels that the layer
    itself says it multiplied in 16 bit, in the prefill and then for every generated token; None if it cannot say.
    """

    name: str
    kind: str
    layer: int | None
    in_features: int
    quantized: bool
    dtype: str
    lowest_threshold: float
    prefill: PhaseStatistics
    decode: PhaseStatistics
    decode_steps: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    token_map: TokenMap | None = None
    positions: PromptPositions | None = None
    outlier_columns: tuple[np.ndarray, ...] | None = None

    @property
    def compared_as(self) -> str:
        return "float16" if self.quantized else self.dtype

    @property
    def absmax(self) -> float:
        """Largest |x| over the prompt and the generated tokens; 0 where the layer did not run."""
        return float(max(self.prefill.absmax.max(initial=0), self.decode.absmax.max(initial=0)))

    def prefill_columns(self, threshold: float) -> list[int]:
        """Return channels with |x| >= threshold at any prompt token, ascending: what bitsandbytes keeps in 16 bit."""
        return np.flatnonzero(self.prefill.absmax >= cutoff(threshold, self.compared_as)).tolist()

    def decode_columns(self, threshold: float) -> list[list[int]]:
        """Return the same for each generated token. Raises BadChoice under the `lowest_threshold` of the recording."""
        limit = cutoff(threshold, self.compared_as)
        if limit < cutoff(self.lowest_threshold, self.compared_as):
            raise BadChoice(f"threshold {threshold!r}: generated tokens were recorded from {self.lowest_threshold} up")
        return [channels[values >= limit].tolist() for channels, values in self.decode_steps]

    def share_of_channels(self, threshold: float, phase: str) -> float:
        """Return channels over the threshold / in_features. In decode, the mean over the generated tokens."""
        whole = check_phase(phase) == "prefill"
        steps = [self.prefill_columns(threshold)] if whole else self.decode_columns(threshold)
        return sum(map(len, steps)) / len(steps) / self.in_features if steps else 0.0

    def share_of_values(self, threshold: float, phase: str) -> float:
        """Return numbers with |x| >= threshold / all numbers; the threshold moves to the nearest of `THRESHOLDS`."""
        found = self.statistics(phase)
        return int(found.counts[grid_index(threshold)]) / found.values if found.values else 0.0

    def statistics(self, phase: str) -> PhaseStatistics:
        return self.prefill if check_phase(phase) == "prefill" else self.decode


def check_phase(phase: str) -> str:
    if phase not in PHASES:
        raise unknown("phase", phase, PHASES)
    return phase


@dataclass(frozen=True, eq=False)
class OutlierReport:
    """One prompt through one model. `token_texts` are the prompt's tokens, then the generated ones.

    `threshold` is the method's own; every question takes another. `stopped`: ended early on request, so layers and
    tokens after that point are missing.
    """

    model: str
    method: str
    threshold: float
    prompt_tokens: int
    generated_tokens: int
    token_texts: list[str]
    modules: tuple[ModuleOutliers, ...]
    stream: tuple[StreamPeak, ...] = ()
    stopped: bool = False

    @property
    def kinds(self) -> list[str]:
        """The kinds of layer that occur, in the order of the model."""
        return list(dict.fromkeys(module.kind for module in self.modules))

    def module(self, name: str) -> ModuleOutliers:
        for module in self.modules:
            if module.name == name:
                return module
        raise unknown("linear layer", name, [module.name for module in self.modules])

    def to_json(self, threshold: float | None = None) -> dict:
        """Return plain values for `json.dumps`, at `threshold` (default: the report's own)."""
        threshold = self.threshold if threshold is None else threshold
        return {
            "model": self.model,
            "method": self.method,
            "threshold": threshold,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "stopped": self.stopped,
            "kernel_agrees": agreement_with_kernel(self) if threshold == self.threshold else None,
            "modules": [_module_json(module, threshold) for module in self.modules],
        }


def _module_json(module: ModuleOutliers, threshold: float) -> dict:
    own = module.outlier_columns
    return {
        "name": module.name,
        "kind": module.kind,
        "quantized": module.quantized,
        "in_features": module.in_features,
        "absmax": module.absmax if math.isfinite(module.absmax) else 1e308,  # JSON has no infinity
        "prefill_columns": module.prefill_columns(threshold),
        "decode_columns": module.decode_columns(threshold),
        "kernel_columns": None if own is None else [columns.tolist() for columns in own],
    }


def columns_at(module: ModuleOutliers, moment: int, threshold: float) -> list[int]:
    """Return channels that reach the threshold at one moment: 0 is the prompt, n the n-th generated token."""
    return module.prefill_columns(threshold) if moment == 0 else module.decode_columns(threshold)[moment - 1]


def agreement_with_kernel(report: OutlierReport) -> tuple[int, int] | None:
    """Count the calls in which a layer's own outlier columns are those that the hooks found at the run's threshold:
    (calls that agree, all calls); None where no layer reports its own."""
    calls = [
        np.array_equal(columns, columns_at(module, moment, report.threshold))
        for module in report.modules
        for moment, columns in enumerate(module.outlier_columns or ())
    ]
    return (sum(calls), len(calls)) if calls else None
