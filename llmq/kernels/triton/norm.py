"""RMSNorm and LLM.int8()'s decomposition of one token's activations: no gather, no host.

The vector is a few thousand numbers, so a program holds it whole. The list of outliers is filled through an atomic
counter, in no particular order, because a prefix sum over the vector costs more than all the rest (measured on one H100
at 4096 and 11008 values: 4.2 and 11.6 us with it, 2.3 and 4.1 us with the counter); a sum over the list must not depend
on its order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels.buffers import PADDING, SplitVector
from llmq.kernels.triton.launch import INTERPRETED, let_next_start, options, wait_for_previous

SLICE, SLICE_ALONE = 1024, 512  # values coded by one program


@triton.jit
def rounded(x, PTX: tl.constexpr):
    """Round to the nearest integer, ties to even, for |x| < 2^22. Adding 1.5·2^23 leaves no bits after the point, but
    where `x` is a product a compiler may fuse that with it, which rounds once and not twice."""
    if PTX:
        return tl.inline_asm_elementwise("cvt.rni.f32.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def code_scale(absmax, PTX: tl.constexpr):
    """Return 127 / absmax, 0 for 0. bitsandbytes divides with CUDA's fast division, so equal codes need it too."""
    if PTX:
        scale = tl.inline_asm_elementwise(
            "div.approx.f32 $0, 0f42FE0000, $1;", "=f,f", [absmax], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        scale = (1.0 / absmax) * 127.0  # as torch divides a number by a tensor
    return tl.where(absmax > 0, scale, 0.0)


@triton.jit
def _empty(count_ptr, index_ptr, value_ptr, PADDING: tl.constexpr):
    padding = tl.arange(0, PADDING)
    tl.store(count_ptr, 0)
    tl.store(index_ptr + padding, 0)
    tl.store(value_ptr + padding, 0.0)


@triton.jit
def _is_outlier(size, threshold):
    return (size >= threshold) & (threshold > 0) & (size < float("inf"))


@triton.jit
def _absmax(value, threshold):
    """Of the values below the threshold. Infinity and NaN make it infinite, which makes the products, and at last the
    logits, not a number."""
    size = tl.abs(value)
    finite = tl.where(size < float("inf"), size, float("inf"))
    return tl.max(tl.where(_is_outlier(size, threshold), 0.0, finite), 0)


@triton.jit
def _store(value, at, inside, absmax, threshold, codes_ptr, count_ptr, index_ptr, value_ptr, PTX: tl.constexpr):
    """Codes into place, outliers onto the list."""
    outlier = _is_outlier(tl.abs(value), threshold) & inside
    codes = tl.where(outlier, 0.0, rounded(value * code_scale(absmax, PTX), PTX))
    tl.store(codes_ptr + at, codes.to(tl.int8), mask=inside)
    slot = tl.atomic_add(count_ptr + at * 0, 1, mask=outlier, sem="relaxed")
    tl.store(index_ptr + slot, at, mask=outlier)
    tl.store(value_ptr + slot, value, mask=outlier)


@triton.jit
def _split(
    x_ptr, codes_ptr, absmax_ptr, count_ptr, index_ptr, value_ptr, width, threshold,
    BLOCK: tl.constexpr, SLICE: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Every program finds the absmax of the whole vector and codes a slice of it."""
    let_next_start(OVERLAP)
    whole, at = tl.arange(0, BLOCK), tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    wait_for_previous(OVERLAP)
    absmax = _absmax(tl.load(x_ptr + whole, mask=whole < width, other=0.0).to(tl.float32), threshold)
    value = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)  # (SLICE,)
    _store(value, at, at < width, absmax, threshold, codes_ptr, count_ptr, index_ptr, value_ptr, PTX)
    tl.store(absmax_ptr, absmax)


@triton.jit
def _norm_split(
    x_ptr, gain_ptr, out_ptr, codes_ptr, absmax_ptr, count_ptr, index_ptr, value_ptr, next_count_ptr, next_index_ptr,
    next_value_ptr, width, eps, threshold,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, NEXT: tl.constexpr, PTX: tl.constexpr, PADDING: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gain = tl.load(gain_ptr + at, mask=inside, other=0.0)  # (BLOCK,), BLOCK >= width
    wait_for_previous(OVERLAP)
    if SPLIT:
        _empty(count_ptr, index_ptr, value_ptr, PADDING)
        if NEXT:
            _empty(next_count_ptr, next_index_ptr, next_value_ptr, PADDING)
        tl.debug_barrier()
    x = tl.load(x_ptr + at, mask=inside, other=0.0)  # (BLOCK,)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)  # a scalar
    x = ((wide * scale).to(x.dtype) * gain).to(x.dtype)
    if SPLIT:
        value = x.to(tl.float32)
        absmax = _absmax(value, threshold)
        _store(value, at, inside, absmax, threshold, codes_ptr, count_ptr, index_ptr, value_ptr, PTX)
        tl.store(absmax_ptr, absmax)
    else:
        tl.store(out_ptr + at, x, mask=inside)


def norm(x: torch.Tensor, norm_weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """See `reference.norm`; `x` is one token's, (width,)."""
    _normalise(x, norm_weight, eps, 0.0, out, None, None)


def norm_split(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, threshold: float, out: SplitVector, empty: SplitVector
) -> None:
    """See `reference.norm_split`."""
    _normalise(x, norm_weight, eps, threshold, x, out, empty)


def _normalise(x, norm_weight, eps: float, threshold: float, out, parts: SplitVector | None, empty: SplitVector | None):
    width = x.shape[-1]
    places = (parts.codes, parts.absmax, parts.count, parts.index, parts.value) if parts else (None,) * 5
    emptied = (empty.count, empty.index, empty.value) if empty else (None,) * 3
    _norm_split[(1,)](
        x, norm_weight, out, *places, *emptied, width, eps, float(threshold),
        BLOCK=triton.next_power_of_2(width), SPLIT=parts is not None, NEXT=empty is not None, PTX=not INTERPRETED,
        PADDING=PADDING, num_warps=4 if width <= 2048 else 32 if parts else 16, **options(x.device),
    )  # fmt: skip


def split(x: torch.Tensor, threshold: float, out: SplitVector) -> None:
    """See `reference.split`."""
    width = x.shape[0]
    _split[(triton.cdiv(width, SLICE),)](
        x, out.codes, out.absmax, out.count, out.index, out.value, width, float(threshold),
        BLOCK=triton.next_power_of_2(width), SLICE=SLICE, PTX=not INTERPRETED, num_warps=8, **options(x.device),
    )  # fmt: skip


@triton.jit
def _split_alone(
    x_ptr, codes_ptr, absmax_ptr, count_ptr, index_ptr, value_ptr, width, threshold,
    BLOCK: tl.constexpr, SLICE: tl.constexpr, PADDING: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As `_split`; each program counts the outliers before its slice, so the list is in order and needs no counter."""
    let_next_start(OVERLAP)
    start = tl.program_id(0) * SLICE
    whole, at = tl.arange(0, BLOCK), start + tl.arange(0, SLICE)
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + whole, mask=whole < width, other=0.0).to(tl.float32)  # (BLOCK,)
    absmax = _absmax(x, threshold)
    listed = _is_outlier(tl.abs(x), threshold).to(tl.int32)
    count, before = tl.sum(listed, 0), tl.sum(tl.where(whole < start, listed, 0), 0)
    value = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)  # (SLICE,)
    outlier = _is_outlier(tl.abs(value), threshold)
    codes = tl.where(outlier, 0.0, rounded(value * code_scale(absmax, PTX), PTX))
    tl.store(codes_ptr + at, codes.to(tl.int8), mask=at < width)
    slot = before + tl.cumsum(outlier.to(tl.int32), 0) - 1
    tl.store(index_ptr + slot, at, mask=outlier)
    tl.store(value_ptr + slot, value, mask=outlier)
    if start == 0:
        padding = tl.arange(0, PADDING)
        tl.store(index_ptr + padding, 0, mask=padding >= count)
        tl.store(value_ptr + padding, 0.0, mask=padding >= count)
        tl.store(count_ptr, count)
        tl.store(absmax_ptr, absmax)


def split_alone(x: torch.Tensor, threshold: float, out: SplitVector) -> None:
    """See `reference.split_alone`."""
    width = x.shape[0]
    _split_alone[(triton.cdiv(width, SLICE_ALONE),)](
        x, out.codes, out.absmax, out.count, out.index, out.value, width, float(threshold),
        BLOCK=triton.next_power_of_2(width), SLICE=SLICE_ALONE, PADDING=PADDING, PTX=not INTERPRETED, num_warps=8,
        **options(x.device),
    )  # fmt: skip
