"""RMSNorm and LLM.int8()'s decomposition of one token's activations: no gather, no host.

The vector is a few thousand numbers, so every program reads the whole of it, for its sums, and writes a slice: on one
H100, 4096 values, 32 programs take 1.6 us and one program with all 32 warps 2.6. A program counts the outliers before
its slice itself, so their list is in order and nobody has to empty it first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels.buffers import SplitVector
from llmq.kernels.triton.codes import below, code_scale, coded, is_outlier
from llmq.kernels.triton.launch import INTERPRETED, UNFUSED, let_next_start, options, wait_for_previous

SLICE = 128  # values written by one program


@triton.jit
def _vector(
    x_ptr, gain_ptr, out_ptr, codes_ptr, absmax_ptr, count_ptr, index_ptr, value_ptr, empty_ptr, width, eps, threshold,
    BLOCK: tl.constexpr, SLICE: tl.constexpr, NORM: tl.constexpr, SPLIT: tl.constexpr, EMPTIED: tl.constexpr,
    PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    start = tl.program_id(0) * SLICE
    whole, at = tl.arange(0, BLOCK), start + tl.arange(0, SLICE)
    if NORM:
        gain = tl.load(gain_ptr + at, mask=at < width, other=0.0)  # (SLICE,)
        if SPLIT:
            gains = tl.load(gain_ptr + whole, mask=whole < width, other=0.0)  # (BLOCK,)
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + whole, mask=whole < width, other=0.0)  # (BLOCK,)
    kind = x.dtype
    wide, y = x.to(tl.float32), tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)  # a scalar
        y = ((y * scale).to(kind) * gain).to(kind).to(tl.float32)  # rounded twice, as in LLaMA
        if SPLIT:
            wide = ((wide * scale).to(kind) * gains).to(kind).to(tl.float32)
    if SPLIT:
        listed = is_outlier(wide, threshold)
        # All, in the upper half, and those before the slice, in the lower: one sum for both, of up to 65,535 each.
        counts = tl.where(listed, 65536, 0).to(tl.uint32) + tl.where(listed & (whole < start), 1, 0).to(tl.uint32)
        absmax, counted = tl.max(below(wide, threshold), 0), tl.sum(counts, 0)
        codes = coded(y, code_scale(absmax, PTX), threshold, PTX)
        tl.store(codes_ptr + at, codes.to(tl.int8), mask=at < width)
        outlier = is_outlier(y, threshold)
        slot = (counted & 65535).to(tl.int32) + tl.cumsum(outlier.to(tl.int32), 0) - 1
        tl.store(index_ptr + slot, at, mask=outlier)
        tl.store(value_ptr + slot, y, mask=outlier)
        if start == 0:
            tl.store(count_ptr, (counted >> 16).to(tl.int32))
            tl.store(absmax_ptr, absmax)
    else:
        tl.store(out_ptr + at, y.to(kind), mask=at < width)
    if EMPTIED > 0:
        if start == 0:
            tl.store(empty_ptr + tl.arange(0, EMPTIED), 0)


def norm(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, out: torch.Tensor, *, empty: torch.Tensor | None = None
) -> None:
    """See `reference.norm`; `x` is one token's, (width,)."""
    _over(x, norm_weight, eps, 0.0, out, None, empty)


def norm_split(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    threshold: float,
    out: SplitVector,
    *,
    empty: torch.Tensor | None = None,
) -> None:
    """See `reference.norm_split`."""
    _over(x, norm_weight, eps, threshold, None, out, empty)


def split(x: torch.Tensor, threshold: float, out: SplitVector) -> None:
    """See `reference.split`."""
    _over(x, None, 0.0, threshold, None, out, None)


def _over(x, norm_weight, eps: float, threshold: float, out, parts: SplitVector | None, empty: torch.Tensor | None):
    width = x.shape[-1]
    places = (parts.codes, parts.absmax, parts.count, parts.index, parts.value) if parts else (None,) * 5
    _vector[(triton.cdiv(width, SLICE),)](
        x, norm_weight, out, *places, empty, width, eps, float(threshold),
        BLOCK=triton.next_power_of_2(width), SLICE=SLICE, NORM=norm_weight is not None, SPLIT=parts is not None,
        EMPTIED=0 if empty is None else empty.numel(), PTX=not INTERPRETED, num_warps=4 if width <= 2048 else 8,
        **UNFUSED, **options(x.device),
    )  # fmt: skip
