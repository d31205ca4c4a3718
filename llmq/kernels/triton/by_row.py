"""LLM.int8() of several rows that each have outliers of their own: sequences decoded together, none of which may depend
on another. What a row gives is, bit for bit, what `product` gives for it alone.

The codes go through the int8 tensor cores, the weights streaming once for up to 64 rows. So do the outliers: the
columns that are one in any row are gathered, and a value there, a whole multiple of 2^-14, is four digits of 8 bits,
whose sums are exact. A row in which that column is no outlier has 0 there.

No kernel here starts before the one in front has ended: at 8 to 64 rows, on one H100, what such a start reads ahead
takes more from the kernel that runs than it saves (a whole step of 64 rows takes 6.9 ms so, and 7.2 otherwise).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels.buffers import COUNTERS, Noting, Rows
from llmq.kernels.primitives import Int8Weight
from llmq.kernels.triton.codes import below, code_scale, coded, is_outlier
from llmq.kernels.triton.launch import INTERPRETED, UNFUSED
from llmq.kernels.triton.tiles import rows_tile

OUTLIERS = 32  # columns of outliers multiplied at a time


@triton.jit
def _store(
    value, at, width, row, scale, threshold, codes_ptr, columns_ptr, marks_ptr, count_ptr,
    BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Store the codes of a row's float32 values at the places `at`. Whoever is the first to mark a column of outliers
    lists it.

    The codes are stored in another shape: in the values' own a thread would hold 16 of them and not 8, and RMSNorm's
    sum would be in another order than in `norm`.
    """
    inside = at < width
    codes = tl.reshape(coded(value, scale, threshold, PTX).to(tl.int8), (BLOCK // 8, 8))
    places = codes_ptr + row * width + tl.reshape(at, (BLOCK // 8, 8))
    tl.store(places, codes, mask=tl.reshape(inside, (BLOCK // 8, 8)))
    outlier = is_outlier(value, threshold) & inside
    new = outlier & (tl.atomic_xchg(marks_ptr + at, 1, mask=outlier, sem="relaxed") == 0)
    slot = tl.atomic_add(count_ptr + at * 0, 1, mask=new, sem="relaxed")
    tl.store(columns_ptr + slot, at, mask=new)


@triton.jit
def _norm(
    x_ptr, gain_ptr, out_ptr, codes_ptr, absmax_ptr, columns_ptr, marks_ptr, count_ptr, width, eps, threshold,
    BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One program a row, which it has whole."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0)  # (BLOCK,)
    gain = tl.load(gain_ptr + at, mask=at < width, other=0.0)
    wide = x.to(tl.float32)
    y = ((wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)).to(x.dtype) * gain).to(x.dtype)
    tl.store(out_ptr + row * width + at, y, mask=at < width)
    value = y.to(tl.float32)
    absmax = tl.max(below(value, threshold), 0)
    tl.store(absmax_ptr + row, absmax)
    scale = code_scale(absmax, PTX)
    _store(value, at, width, row, scale, threshold, codes_ptr, columns_ptr, marks_ptr, count_ptr, BLOCK, PTX)


@triton.jit
def _plain(
    x_ptr, codes_ptr, absmax_ptr, columns_ptr, marks_ptr, count_ptr, width, threshold,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One program a row, which it reads twice."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, BLOCK * BLOCKS, BLOCK):
        value = tl.load(x_ptr + row * width + start + at, mask=start + at < width, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, below(value, threshold))
    absmax = tl.max(peak, 0)
    tl.store(absmax_ptr + row, absmax)
    scale = code_scale(absmax, PTX)
    for start in tl.static_range(0, BLOCK * BLOCKS, BLOCK):
        value = tl.load(x_ptr + row * width + start + at, mask=start + at < width, other=0.0).to(tl.float32)
        _store(
            value, start + at, width, row, scale, threshold, codes_ptr, columns_ptr, marks_ptr, count_ptr, BLOCK, PTX
        )


def decomposed(x: torch.Tensor, noting: Noting, norm_weight: torch.Tensor | None = None, eps: float = 0.0) -> Rows:
    """Decompose `x` (rows, in), with a `norm_weight` after RMSNorm."""
    height, width = x.shape
    codes = torch.empty(height, width, dtype=torch.int8, device=x.device)
    absmax = torch.empty(height, dtype=torch.float32, device=x.device)
    columns = torch.empty(width, dtype=torch.int32, device=x.device)
    marks, threshold = noting.outlier_marks, float(noting.threshold)
    made = codes, absmax, columns, marks, marks[-COUNTERS:], width
    if norm_weight is None:
        block = max(8, min(4096, triton.next_power_of_2(width)))
        _plain[(height,)](
            x, *made, threshold, BLOCK=block, BLOCKS=triton.cdiv(width, block), PTX=not INTERPRETED, num_warps=16
        )
        return Rows(x, noting.threshold, absmax, marks, True, codes, columns)
    out = torch.empty_like(x)
    warps = 4 if width <= 2048 else 8  # as many as the kernel of one row has, whose sum is in the same order
    _norm[(height,)](
        x, norm_weight, out, *made, eps, threshold, BLOCK=max(8, triton.next_power_of_2(width)), PTX=not INTERPRETED,
        num_warps=warps, **UNFUSED,
    )  # fmt: skip
    return Rows(out, noting.threshold, absmax, marks, True, codes, columns)


@triton.jit
def _digit(value):
    """The lowest 8 bits as a number from -128 to 127, and what is left."""
    low = ((value + 128) & 255) - 128
    return low.to(tl.int8), (value - low) >> 8


@triton.jit
def _gathered(x_ptr, columns_ptr, first, count, m, width, OUTLIERS: tl.constexpr):
    """Columns of outliers from the `first` listed one on, and the rows' values there (OUTLIERS, ROWS). Beyond the end
    of the list, where the column is -1, nothing is read."""
    o = first + tl.arange(0, OUTLIERS)
    column = tl.load(columns_ptr + o, mask=o < count, other=-1)
    x = tl.load(x_ptr + m[None, :] * width + column[:, None], mask=(column >= 0)[:, None], other=0.0)
    return column, x


@triton.jit
def _codes_of(w_ptr, n, column, width):
    """The weights' codes there (OUTPUTS, OUTLIERS)."""
    return tl.load(w_ptr + n[:, None] * width + column[None, :], mask=(column >= 0)[None, :], other=0)


@triton.jit
def _weighed(x, w, threshold):
    """The products of those of `x` that are outliers, in units of 2^-14: exact, float64 (OUTPUTS, ROWS)."""
    value = x.to(tl.float32)
    whole = tl.where(is_outlier(value, threshold), value * 16384.0, 0.0).to(tl.int32)  # (OUTLIERS, ROWS)
    first, whole = _digit(whole)
    second, whole = _digit(whole)
    third, fourth = _digit(whole)
    low = tl.dot(w, first, out_dtype=tl.int32) + 256 * tl.dot(w, second, out_dtype=tl.int32)
    high = tl.dot(w, third, out_dtype=tl.int32) + 256 * tl.dot(w, fourth.to(tl.int8), out_dtype=tl.int32)
    return high.to(tl.float64) * 65536.0 + low.to(tl.float64)


@triton.jit
def _further(total, x_ptr, columns_ptr, count, w_ptr, m, n, width, threshold, OUTLIERS: tl.constexpr):
    """`total` and the outliers beyond the first OUTLIERS columns."""
    for first in range(OUTLIERS, count, OUTLIERS):
        column, x = _gathered(x_ptr, columns_ptr, first, count, m, width, OUTLIERS)
        total += _weighed(x, _codes_of(w_ptr, n, column, width), threshold)
    return total


@triton.jit
def _scaled(products, outliers, x_absmax, w_absmax):
    """As `product._scaled`, of (OUTPUTS, ROWS)."""
    y = products.to(tl.float32) * (x_absmax / 127)[None, :] + outliers.to(tl.float32) / 16384.0
    return y * (w_absmax / 127)[:, None]


@triton.jit
def _product(
    x_ptr, codes_ptr, x_absmax_ptr, columns_ptr, count_ptr, w_ptr, absmax_ptr, bias_ptr, out_ptr, sums_ptr,
    rows, n_out, width, threshold,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr, OUTLIERS: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """OUTPUTS outputs of ROWS rows over one of PARTS of the inputs. The last part to arrive adds up and finishes."""
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, INPUTS)
    # Those beyond the end repeat earlier ones: what they give is not stored.
    nn, mm = (n % n_out).to(tl.int64), (m % rows).to(tl.int64)
    share = tl.cdiv(tl.cdiv(width, INPUTS), PARTS) * INPUTS
    begin = part * share
    w_at = w_ptr + nn[:, None] * width + (begin + k)[None, :]  # (OUTPUTS, INPUTS)
    x_at = codes_ptr + mm[None, :] * width + (begin + k)[:, None]  # (INPUTS, ROWS)
    up = n_out.to(tl.int64) * width  # from a gate's row to its own
    w_absmax = tl.load(absmax_ptr + nn)  # (OUTPUTS,)
    if GATED:
        w2_absmax = tl.load(absmax_ptr + n_out + nn)
    # Asked for before the long loop, so that these loads, one after the other, do not wait for its end.
    count = tl.load(count_ptr)
    column, first_x = _gathered(x_ptr, columns_ptr, 0, count, mm, width, OUTLIERS)
    first_w = _codes_of(w_ptr, nn, column, width)
    if GATED:
        first_w2 = _codes_of(w_ptr + up, nn, column, width)
    x_absmax = tl.load(x_absmax_ptr + mm)  # (ROWS,)
    acc = tl.zeros((OUTPUTS, ROWS), tl.int32)
    acc2 = acc
    for start in range(begin, tl.minimum(begin + share, width), INPUTS):
        inside = k < width - start
        x = tl.load(x_at, mask=inside[:, None], other=0)
        w = tl.load(w_at, mask=inside[None, :], other=0)
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        if GATED:
            w2 = tl.load(w_at + up, mask=inside[None, :], other=0)
            acc2 = tl.dot(w2, x, acc2, out_dtype=tl.int32)
        w_at += INPUTS
        x_at += INPUTS
    last = True
    if PARTS > 1:
        group = tile + tl.program_id(2) * tl.num_programs(0)
        place = tl.arange(0, OUTPUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        sums_ptr += group.to(tl.int64) * PARTS * OUTPUTS * ROWS
        tl.store(sums_ptr + part * OUTPUTS * ROWS + place, acc)
        tl.debug_barrier()  # all that this program stored, before it says so
        last = tl.atomic_add(count_ptr + 1 + group, 1, sem="acq_rel") == PARTS - 1
        if last:
            tl.store(count_ptr + 1 + group, 0)  # for the next product of these rows
            acc = tl.zeros((OUTPUTS, ROWS), tl.int32)
            for other in range(PARTS):
                acc += tl.load(sums_ptr + other * OUTPUTS * ROWS + place, cache_modifier=".cg")
    if last:
        outliers = _weighed(first_x, first_w, threshold)
        outliers = _further(outliers, x_ptr, columns_ptr, count, w_ptr, mm, nn, width, threshold, OUTLIERS)
        y = _scaled(acc, outliers, x_absmax, w_absmax)
        inside = (n < n_out)[:, None] & (m < rows)[None, :]
        if BIAS:
            y += tl.load(bias_ptr + nn).to(tl.float32)[:, None]
        if GATED:
            outliers = _weighed(first_x, first_w2, threshold)
            outliers = _further(outliers, x_ptr, columns_ptr, count, w_ptr + up, mm, nn, width, threshold, OUTLIERS)
            y = y / (1.0 + tl.exp(-y)) * _scaled(acc2, outliers, x_absmax, w2_absmax)
        out = out_ptr + m.to(tl.int64)[None, :] * n_out + n[:, None]
        if RESIDUAL:
            y += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


def multiply(
    rows: Rows,
    weight: Int8Weight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: bool = False,
    gated: bool = False,
) -> None:
    """Set `out` (rows, out) to the product of decomposed rows, or add it; with `gated`, (rows, out / 2): SiLU of the
    first half of the outputs times the second."""
    (height, width), n_out = rows.x.shape, out.shape[1]
    tile = rows_tile(height, n_out, width, gated)
    across, down = triton.cdiv(n_out, tile.outputs), triton.cdiv(height, tile.rows)
    assert bias is None or not gated, "no LLaMA has biases there"
    assert across * down < COUNTERS or tile.parts == 1, "each tile that is summed in parts needs a counter"
    size = across * down * tile.parts * tile.outputs * tile.rows if tile.parts > 1 else 0
    sums = torch.empty(size, dtype=torch.int32, device=out.device)
    _product[(across, tile.parts, down)](
        rows.x, rows.codes, rows.absmax, rows.columns, rows.outlier_marks[-COUNTERS:], weight.codes, weight.absmax,
        bias, out, sums, height, n_out, width, float(rows.threshold),
        ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=tile.inputs, PARTS=tile.parts, OUTLIERS=OUTLIERS, GATED=gated,
        BIAS=bias is not None, RESIDUAL=residual, num_warps=tile.warps, num_stages=tile.stages, **UNFUSED,
    )  # fmt: skip
