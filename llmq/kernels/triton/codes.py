"""LLM.int8()'s codes, and what is noted of activations while they are written: pieces of other kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from llmq.kernels import buffers

PEAKS = tl.constexpr(buffers.PEAKS)


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
def is_outlier(value, threshold):
    size = tl.abs(value)
    return (size >= threshold) & (threshold > 0) & (size < float("inf"))


@triton.jit
def below(value, threshold):
    """The size of what is below the threshold, 0 for an outlier. Infinity and NaN give infinity, which makes the
    products, and at last the logits, not a number."""
    size = tl.abs(value)
    return tl.where(is_outlier(value, threshold), 0.0, tl.where(size < float("inf"), size, float("inf")))


@triton.jit
def coded(value, scale, threshold, PTX: tl.constexpr):
    """The codes of float32 values, int32; 0 of an outlier."""
    return tl.where(is_outlier(value, threshold), 0.0, rounded(value * scale, PTX)).to(tl.int32)


@triton.jit
def quarters(x_ptr, first, width, QUARTER: tl.constexpr):
    """4·QUARTER values from `first` on, 0 beyond `width`, as float32: every fourth of them, from four starts."""
    at = first + tl.arange(0, 4 * QUARTER)
    x = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (2 * QUARTER, 2)))
    first, third = tl.split(tl.reshape(even, (QUARTER, 2)))
    second, fourth = tl.split(tl.reshape(odd, (QUARTER, 2)))
    return first, second, third, fourth


@triton.jit
def packed_codes(x_ptr, first, width, scale, threshold, QUARTER: tl.constexpr, PTX: tl.constexpr):
    """The codes of 4·QUARTER values, four in an int32 (QUARTER,)."""
    a, b, c, d = quarters(x_ptr, first, width, QUARTER)
    low = (coded(a, scale, threshold, PTX) & 255) | ((coded(b, scale, threshold, PTX) & 255) << 8)
    return low | ((coded(c, scale, threshold, PTX) & 255) << 16) | (coded(d, scale, threshold, PTX) << 24)


@triton.jit
def note(value, at, inside, threshold, writer, tally_ptr, index_ptr, value_ptr):
    """Note float32 values, already rounded to their 16 bits, of the places `at`: see `buffers.NotedVector`. The list of
    outliers is filled through an atomic counter, in no particular order. `writer`: spreads programs over the peaks."""
    outlier = is_outlier(value, threshold) & inside
    peak = tl.max(tl.where(inside, below(value, threshold), 0.0), 0)
    tl.atomic_max(tally_ptr + writer % PEAKS, peak.to(tl.int32, bitcast=True), sem="relaxed")
    slot = tl.atomic_add(tally_ptr + PEAKS + at * 0, 1, mask=outlier, sem="relaxed")
    tl.store(index_ptr + slot, at, mask=outlier)
    tl.store(value_ptr + slot, value, mask=outlier)
