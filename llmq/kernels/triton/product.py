"""Matrix-vector products: the weights stream once, everything else is small.

For LLM.int8() four codes are multiplied and summed by one instruction (DP4A): with one conversion and one
multiply-add per weight instead, the arithmetic and not the memory is the limit (measured on one H100, 4096x4096: 6.0 us
against 7.5 us). The outliers are a list; their weights are gathered from rows that are being read anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels import reference
from llmq.kernels.buffers import LISTED, NotedVector, SplitVector
from llmq.kernels.primitives import Int8Weight
from llmq.kernels.triton.codes import PEAKS, code_scale, coded, note, packed_codes
from llmq.kernels.triton.launch import INTERPRETED, UNFUSED, let_next_start, options, wait_for_previous
from llmq.kernels.triton.tiles import noted_tile, plain_tile, split_tile


@triton.jit
def _epilogue(y, other, rows, bias_ptr, residual_ptr, out_ptr, n_out, GATED: tl.constexpr, BIAS: tl.constexpr,
              RESIDUAL: tl.constexpr):  # fmt: skip
    inside = rows < n_out
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            other += tl.load(bias_ptr + n_out + rows, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * other
    if RESIDUAL:
        y += tl.load(residual_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows, y, mask=inside)
    return y


@triton.jit
def _tile(w_ptr, rows, cols, start, width, row_stride, n_rows):
    inside = (rows < n_rows)[:, None] & (cols[None, :] < width - start)
    at = rows[:, None].to(tl.int64) * row_stride + (start + cols)[None, :]
    return tl.load(w_ptr + at, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _plain(
    x_ptr, w_ptr, absmax_ptr, bias_ptr, residual_ptr, out_ptr, tally_ptr, index_ptr, value_ptr, n_out, width, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INT8: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, NOTE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Floating-point or int8 weights against 16-bit activations, summed in float32."""
    let_next_start(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLUMNS)
    w = _tile(w_ptr, rows, cols, 0, width, width, n_out)  # (ROWS, COLUMNS) of (n_out, width)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if GATED:
        w2 = _tile(w_ptr, n_out + rows, cols, 0, width, width, 2 * n_out)
        acc2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait_for_previous(OVERLAP)
    for start in range(0, width, COLUMNS):
        x = tl.load(x_ptr + start + cols, mask=cols < width - start, other=0.0).to(tl.float32)[None, :]
        acc += w.to(tl.float32) * x
        w = _tile(w_ptr, rows, cols, start + COLUMNS, width, width, n_out)
        if GATED:
            acc2 += w2.to(tl.float32) * x
            w2 = _tile(w_ptr, n_out + rows, cols, start + COLUMNS, width, width, 2 * n_out)
    y = tl.sum(acc, 1)  # (ROWS,)
    other = y
    if GATED:
        other = tl.sum(acc2, 1)
    if INT8:
        y *= tl.load(absmax_ptr + rows, mask=rows < n_out, other=0.0) / 127
        if GATED:
            other *= tl.load(absmax_ptr + n_out + rows, mask=rows < n_out, other=0.0) / 127
    y = _epilogue(y, other, rows, bias_ptr, residual_ptr, out_ptr, n_out, GATED, BIAS, RESIDUAL)
    if NOTE:
        note(y.to(tl.float32), rows, rows < n_out, threshold, tl.program_id(0), tally_ptr, index_ptr, value_ptr)


@triton.jit
def _dot4(w, x, acc):
    """acc + the dot product of four signed bytes with four signed bytes, each packed in an int32."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _accumulate(acc, w, x, DP4A: tl.constexpr):
    if DP4A:
        return _dot4(w, tl.broadcast_to(x[None, :], w.shape), acc)
    return acc + w.to(tl.int32) * x.to(tl.int32)[None, :]


@triton.jit
def _outliers(count_ptr, index_ptr, value_ptr, OUTLIERS: tl.constexpr):
    """How many outliers, and the first of them: columns, and values as whole multiples of 2^-14, of which every FP16
    value of 1/16 or more is one. Sums of such products are exact in int64, so the order of the list does not matter."""
    at = tl.arange(0, OUTLIERS)
    count, column, value = tl.load(count_ptr), tl.load(index_ptr + at), tl.load(value_ptr + at)
    return count, column, tl.where(at < count, value * 16384.0, 0.0).to(tl.int64)


@triton.jit
def _gathered(w_ptr, rows, n_rows, width, column, value):
    """The weights' codes in the outlier columns. Beyond the list's end, where the value is 0, nothing is read."""
    inside = (rows < n_rows)[:, None] & (value != 0)[None, :]  # (rows, outliers)
    return tl.load(w_ptr + rows[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0)


@triton.jit
def _weighed(codes, value):
    return tl.sum(codes.to(tl.int64) * value[None, :], 1)


@triton.jit
def _further(total, w_ptr, rows, n_rows, width, index_ptr, value_ptr, count, OUTLIERS: tl.constexpr):
    """`total` and the outliers beyond the first OUTLIERS."""
    for start in range(OUTLIERS, count, OUTLIERS):
        at = start + tl.arange(0, OUTLIERS)
        column = tl.load(index_ptr + at, mask=at < count, other=0)
        value = (tl.load(value_ptr + at, mask=at < count, other=0.0) * 16384.0).to(tl.int64)
        total += _weighed(_gathered(w_ptr, rows, n_rows, width, column, value), value)
    return total


@triton.jit
def _scaled(products, outliers, x_absmax, w_absmax):
    """Both sums in the units of the output."""
    return (products.to(tl.float32) * (x_absmax / 127) + outliers.to(tl.float32) / 16384.0) * (w_absmax / 127)


@triton.jit
def _int8_activations(x_ptr, start, width, scale, threshold, COLUMNS: tl.constexpr, DP4A: tl.constexpr,
                      NOTED: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Codes of (COLUMNS,) activations, or of four times as many where four are packed: read, or made here."""
    at = start + tl.arange(0, COLUMNS)
    if NOTED and DP4A:
        x = packed_codes(x_ptr, 4 * start, 4 * width, scale, threshold, COLUMNS, PTX)
    else:
        x = tl.load(x_ptr + at, mask=at < width, other=0)
        if NOTED:
            x = coded(x.to(tl.float32), scale, threshold, PTX)
    return x


@triton.jit
def _split_rows(
    program, x_ptr, x_absmax_ptr, count_ptr, index_ptr, value_ptr, w_ptr, packed_ptr, absmax_ptr, bias_ptr,
    residual_ptr, out_ptr, tally_ptr, out_index_ptr, out_value_ptr, n_out, width, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTLIERS: tl.constexpr, DP4A: tl.constexpr, NOTED: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NOTE: tl.constexpr, PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """LLM.int8(): int8 codes times int8 codes summed exactly in int32, plus the outliers in float32.

    With DP4A `packed_ptr`, and `x_ptr` unless NOTED, are int8 memory seen as int32, and COLUMNS counts those. NOTED:
    `x_ptr` is the activations themselves, `x_absmax_ptr` their tally.
    """
    rows = program * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLUMNS)
    packed_width = width // 4 if DP4A else width
    w = _tile(packed_ptr, rows, cols, 0, packed_width, packed_width, n_out)  # (ROWS, COLUMNS) of (n_out, packed_width)
    acc = tl.zeros((ROWS, COLUMNS), tl.int32)
    w_absmax = tl.load(absmax_ptr + rows, mask=rows < n_out, other=0.0)  # (ROWS,)
    if GATED:
        w2 = _tile(packed_ptr, n_out + rows, cols, 0, packed_width, packed_width, 2 * n_out)
        acc2 = tl.zeros((ROWS, COLUMNS), tl.int32)
        w2_absmax = tl.load(absmax_ptr + n_out + rows, mask=rows < n_out, other=0.0)
    wait_for_previous(OVERLAP)
    # Asked for before the long loop, so that these loads, one after the other, do not wait for its end.
    count, column, value = _outliers(count_ptr, index_ptr, value_ptr, OUTLIERS)
    if NOTED:
        x_absmax = tl.max(tl.load(x_absmax_ptr + tl.arange(0, PEAKS)), 0).to(tl.float32, bitcast=True)
    else:
        x_absmax = tl.load(x_absmax_ptr)
    scale = code_scale(x_absmax, PTX)
    gathered = _gathered(w_ptr, rows, n_out, width, column, value)  # (ROWS, OUTLIERS)
    if GATED:
        gathered2 = _gathered(w_ptr, n_out + rows, 2 * n_out, width, column, value)
    for start in range(0, packed_width, COLUMNS):
        x = _int8_activations(x_ptr, start, packed_width, scale, threshold, COLUMNS, DP4A, NOTED, PTX)  # (COLUMNS,)
        acc = _accumulate(acc, w, x, DP4A)
        w = _tile(packed_ptr, rows, cols, start + COLUMNS, packed_width, packed_width, n_out)
        if GATED:
            acc2 = _accumulate(acc2, w2, x, DP4A)
            w2 = _tile(packed_ptr, n_out + rows, cols, start + COLUMNS, packed_width, packed_width, 2 * n_out)
    outliers = _further(_weighed(gathered, value), w_ptr, rows, n_out, width, index_ptr, value_ptr, count, OUTLIERS)
    y = _scaled(tl.sum(acc, 1), outliers, x_absmax, w_absmax)  # (ROWS,)
    other = y
    if GATED:
        outliers = _further(
            _weighed(gathered2, value), w_ptr, n_out + rows, 2 * n_out, width, index_ptr, value_ptr, count, OUTLIERS
        )
        other = _scaled(tl.sum(acc2, 1), outliers, x_absmax, w2_absmax)
    y = _epilogue(y, other, rows, bias_ptr, residual_ptr, out_ptr, n_out, GATED, BIAS, RESIDUAL)
    if NOTE:
        note(y.to(tl.float32), rows, rows < n_out, threshold, program, tally_ptr, out_index_ptr, out_value_ptr)


@triton.jit
def _split(
    x_ptr, x_absmax_ptr, count_ptr, index_ptr, value_ptr, w_ptr, packed_ptr, absmax_ptr, bias_ptr, residual_ptr,
    out_ptr, tally_ptr, out_index_ptr, out_value_ptr, n_out, width, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTLIERS: tl.constexpr, DP4A: tl.constexpr, NOTED: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NOTE: tl.constexpr, PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    _split_rows(
        tl.program_id(0), x_ptr, x_absmax_ptr, count_ptr, index_ptr, value_ptr, w_ptr, packed_ptr, absmax_ptr,
        bias_ptr, residual_ptr, out_ptr, tally_ptr, out_index_ptr, out_value_ptr, n_out, width, threshold,
        ROWS, COLUMNS, OUTLIERS, DP4A, NOTED, GATED, BIAS, RESIDUAL, NOTE, PTX, OVERLAP,
    )  # fmt: skip


@triton.jit
def _split_several(
    codes_ptr, x_absmax_ptr, count_ptr, index_ptr, value_ptr,
    w_ptr, packed_ptr, absmax_ptr, bias_ptr, out_ptr, n_out,
    w2_ptr, packed2_ptr, absmax2_ptr, bias2_ptr, out2_ptr, n_out2,
    w3_ptr, packed3_ptr, absmax3_ptr, bias3_ptr, out3_ptr, n_out3, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTLIERS: tl.constexpr, DP4A: tl.constexpr, BIAS: tl.constexpr,
    PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The rows of up to three matrices, one matrix after the other, times the same activations."""
    let_next_start(OVERLAP)
    program = tl.program_id(0)
    second = tl.cdiv(n_out, ROWS)
    third = second + tl.cdiv(n_out2, ROWS)
    if program < second:
        _split_rows(
            program, codes_ptr, x_absmax_ptr, count_ptr, index_ptr, value_ptr, w_ptr, packed_ptr, absmax_ptr,
            bias_ptr, None, out_ptr, None, None, None, n_out, width, 0.0, ROWS, COLUMNS, OUTLIERS, DP4A, False,
            False, BIAS, False, False, PTX, OVERLAP,
        )  # fmt: skip
    elif program < third:
        _split_rows(
            program - second, codes_ptr, x_absmax_ptr, count_ptr, index_ptr, value_ptr, w2_ptr, packed2_ptr,
            absmax2_ptr, bias2_ptr, None, out2_ptr, None, None, None, n_out2, width, 0.0, ROWS, COLUMNS, OUTLIERS, DP4A,
            False, False, BIAS, False, False, PTX, OVERLAP,
        )  # fmt: skip
    else:
        _split_rows(
            program - third, codes_ptr, x_absmax_ptr, count_ptr, index_ptr, value_ptr, w3_ptr, packed3_ptr,
            absmax3_ptr, bias3_ptr, None, out3_ptr, None, None, None, n_out3, width, 0.0, ROWS, COLUMNS, OUTLIERS, DP4A,
            False, False, BIAS, False, False, PTX, OVERLAP,
        )  # fmt: skip


def products(
    x: SplitVector, weights: list[Int8Weight], outs: list[torch.Tensor], *, biases: list[torch.Tensor] | None = None
) -> None:
    """See `reference.products`; two or three matrices take one launch."""
    if len(weights) not in (2, 3):
        return reference.products(x, weights, outs, biases=biases, product=product)
    width = weights[0].shape[1]
    tile, dp4a = split_tile(width, False), not INTERPRETED and width % 4 == 0
    codes = x.codes.view(torch.int32) if dp4a else x.codes
    members = []
    for weight, out, bias in zip(weights, outs, biases or [None] * len(outs), strict=True):
        packed = weight.codes.view(torch.int32) if dp4a else weight.codes
        members += [weight.codes, packed, weight.absmax, bias, out, len(out)]
    members += members[-6:] if len(weights) == 2 else []  # for the programs of a third, of which there are none then
    _split_several[(sum(triton.cdiv(len(out), tile.rows) for out in outs),)](
        codes, x.absmax, x.count, x.index, x.value, *members, width, ROWS=tile.rows,
        COLUMNS=tile.columns // 4 if dp4a else tile.columns, OUTLIERS=LISTED, DP4A=dp4a, BIAS=bool(biases),
        PTX=not INTERPRETED, num_warps=tile.warps, **UNFUSED, **options(outs[0].device),
    )  # fmt: skip


def product(
    x: torch.Tensor | SplitVector | NotedVector,
    weight: torch.Tensor | Int8Weight,
    out: torch.Tensor | NotedVector,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> None:
    """See `reference.product`."""
    rows, width = weight.shape
    n_out = rows // 2 if gated else rows
    note = isinstance(out, NotedVector)
    places = (out.x, out.tally, out.index, out.value) if note else (out, None, None, None)
    flags = {"GATED": gated, "BIAS": bias is not None, "RESIDUAL": residual is not None, "NOTE": note}
    flags |= options(places[0].device)
    if not isinstance(x, (SplitVector, NotedVector)):
        int8 = isinstance(weight, Int8Weight)
        codes, absmax = (weight.codes, weight.absmax) if int8 else (weight, None)
        tile = plain_tile(width, codes.itemsize, gated)
        _plain[(triton.cdiv(n_out, tile.rows),)](
            x, codes, absmax, bias, residual, *places, n_out, width, float(out.threshold if note else 0),
            ROWS=tile.rows, COLUMNS=tile.columns, INT8=int8, num_warps=tile.warps, **flags,
        )  # fmt: skip
        return
    noted, dp4a = isinstance(x, NotedVector), not INTERPRETED and width % 4 == 0
    tile = noted_tile(width) if noted else split_tile(width, gated)
    packed = weight.codes.view(torch.int32) if dp4a else weight.codes
    given = (x.x, x.tally) if noted else (x.codes.view(torch.int32) if dp4a else x.codes, x.absmax)
    threshold = x.threshold if noted else out.threshold if note else 0
    _split[(triton.cdiv(n_out, tile.rows),)](
        *given, x.count, x.index, x.value, weight.codes, packed, weight.absmax, bias, residual, *places, n_out, width,
        float(threshold), ROWS=tile.rows, COLUMNS=tile.columns // 4 if dp4a else tile.columns, OUTLIERS=LISTED,
        DP4A=dp4a, NOTED=noted, PTX=not INTERPRETED, num_warps=tile.warps, **UNFUSED, **flags,
    )  # fmt: skip
