"""Int8 weights times many rows, in one kernel each.

LLM.int8(): int8 tensor cores, then the outlier columns in FP16, then the scales. In cuBLAS' int8 product the int32 sums
go to memory and come back to be scaled, 6 bytes for every output; here they stay in registers. The outlier columns are
few: they come side by side from two small copies.

Weight-only: codes become 16-bit numbers, exactly, on their way from the registers to the tensor cores, which is why
outputs are the rows of what a program computes; no matrix in 16 bit is written and read back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels import reference
from llmq.kernels.buffers import Noting, Rows
from llmq.kernels.primitives import Int8Weight
from llmq.kernels.triton import by_row
from llmq.kernels.triton.launch import INTERPRETED, let_next_start, options, wait_for_previous
from llmq.kernels.triton.rows import GATHERED, OUTLIERS, gate_rows, plain_rows, split_matrix

NEIGHBOURS = 8  # tiles of rows taken together, so that they share columns of weights in the L2 cache


@triton.jit
def _place(program, rows, n_out, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """The rows and the outputs of a program."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(n_out, OUTPUTS)
    band = program // (NEIGHBOURS * across)
    height = tl.minimum(down - band * NEIGHBOURS, NEIGHBOURS)
    m = (band * NEIGHBOURS + (program % (NEIGHBOURS * across)) % height) * ROWS + tl.arange(0, ROWS)
    return m, ((program % (NEIGHBOURS * across)) // height) * OUTPUTS + tl.arange(0, OUTPUTS)


@triton.jit
def _codes_linear(
    x_ptr, w_ptr, absmax_ptr, bias_ptr, out_ptr, rows, n_out, width,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, NEIGHBOURS: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    m, n = _place(tl.program_id(0), rows, n_out, ROWS, OUTPUTS, NEIGHBOURS)
    k = tl.arange(0, INPUTS)
    # Rows beyond the end repeat earlier ones: what they give is not stored.
    a_ptr = w_ptr + (n % n_out).to(tl.int64)[:, None] * width + k[None, :]  # (OUTPUTS, INPUTS)
    b_ptr = x_ptr + (m % rows).to(tl.int64)[None, :] * width + k[:, None]  # (INPUTS, ROWS)
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(0, width, INPUTS):
        a = tl.load(a_ptr, mask=k[None, :] < width - start, other=0)
        b = tl.load(b_ptr, mask=k[:, None] < width - start, other=0.0)
        acc = tl.dot(a.to(b.dtype), b, acc)
        a_ptr += INPUTS
        b_ptr += INPUTS
    y = acc * (tl.load(absmax_ptr + n, mask=n < n_out, other=0.0) / 127)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < n_out, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + m.to(tl.int64)[None, :] * n_out + n[:, None]
    inside = (m < rows)[None, :] & (n < n_out)[:, None]
    if RESIDUAL:
        y += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _int8_linear(
    x_ptr, codes_ptr, x_absmax_ptr, w_ptr, absmax_ptr, bias_ptr, columns_ptr, count_ptr, xo_ptr, wo_ptr, out_ptr,
    rows, n_out, width,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OUTLIERS: tl.constexpr, GATHERED: tl.constexpr,
    NEIGHBOURS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    m, n = _place(tl.program_id(0), rows, n_out, ROWS, OUTPUTS, NEIGHBOURS)
    k = tl.arange(0, INPUTS)
    # Rows beyond the end repeat earlier ones: what they give is not stored.
    mm, nn = (m % rows).to(tl.int64), (n % n_out).to(tl.int64)
    a_ptr = codes_ptr + mm[:, None] * width + k[None, :]
    b_ptr = w_ptr + nn[None, :] * width + k[:, None]
    acc = tl.zeros((ROWS, OUTPUTS), tl.int32)
    for start in range(0, width, INPUTS):
        a = tl.load(a_ptr, mask=k[None, :] < width - start, other=0)
        b = tl.load(b_ptr, mask=k[:, None] < width - start, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        a_ptr += INPUTS
        b_ptr += INPUTS
    count = tl.load(count_ptr)
    x_scale = tl.load(x_absmax_ptr + mm) / 127
    y = acc.to(tl.float32) * x_scale[:, None]
    o = tl.arange(0, OUTLIERS)
    for start in range(0, tl.minimum(count, GATHERED), OUTLIERS):
        xo = tl.load(xo_ptr + mm[:, None] * GATHERED + (start + o)[None, :])
        wo = tl.load(wo_ptr + nn[None, :] * GATHERED + (start + o)[:, None])
        y = tl.dot(xo, wo, y)
    for start in range(GATHERED, count, OUTLIERS):
        listed = start + o < count
        column = tl.load(columns_ptr + start + o, mask=listed, other=0)
        xo = tl.load(x_ptr + mm[:, None] * width + column[None, :], mask=listed[None, :], other=0.0).to(tl.float16)
        wo = tl.load(w_ptr + nn[None, :] * width + column[:, None], mask=listed[:, None], other=0).to(tl.float16)
        y = tl.dot(xo, wo, y)
    y = y * (tl.load(absmax_ptr + nn) / 127)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + nn).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * n_out + n[None, :]
    inside = (m < rows)[:, None] & (n < n_out)[None, :]
    if RESIDUAL:
        y += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


def linear_rows(
    rows: Rows, weight, *, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.linear_rows`."""
    x = rows.x
    if residual is not None and bias is None and not isinstance(weight, Int8Weight):
        return residual.addmm_(x, weight.T)
    if not isinstance(weight, Int8Weight):
        return reference.linear_rows(rows, weight, bias=bias, residual=residual)
    out = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device) if residual is None else residual
    _multiply(rows, weight, out, bias=bias, residual=residual is not None)
    return out


def scores(rows: Rows, weight, out: torch.Tensor) -> None:
    """See `reference.scores`."""
    if isinstance(weight, Int8Weight):
        _multiply(rows, weight, out)
    else:
        reference.scores(rows, weight, out)


def gated_rows(rows: Rows, weight, noting: Noting) -> Rows:
    """See `reference.gated_rows`; by row in one kernel, which rounds once, as `product` does."""
    if not (rows.by_row and isinstance(weight, Int8Weight)):
        return gate_rows(linear_rows(rows, weight), noting)
    out = torch.empty(len(rows.x), weight.shape[0] // 2, dtype=rows.x.dtype, device=rows.x.device)
    by_row.multiply(rows, weight, out, gated=True)
    return plain_rows(out, noting)


def _multiply(
    rows: Rows, weight: Int8Weight, out: torch.Tensor, *, bias: torch.Tensor | None = None, residual: bool = False
) -> None:
    """Set `out` (rows, out), or add to it."""
    if rows.by_row:
        by_row.multiply(rows, weight, out, bias=bias, residual=residual)
        return
    x, only = rows.x, rows.threshold is None
    (height, width), n_out = x.shape, weight.shape[0]
    m, n, k, warps, stages = _codes_tile(height) if only else _tile(height, n_out, width)
    grid = (triton.cdiv(height, m) * triton.cdiv(n_out, n),)
    flags = {"BIAS": bias is not None, "RESIDUAL": residual, "num_warps": warps, "num_stages": stages}
    flags |= {"ROWS": m, "OUTPUTS": n, "INPUTS": k, "NEIGHBOURS": NEIGHBOURS} | options(x.device)
    if only:
        _codes_linear[grid](x, weight.codes, weight.absmax, bias, out, height, n_out, width, **flags)
        return
    codes, *outliers = split_matrix(rows, weight)
    _int8_linear[grid](
        x, codes, rows.absmax, weight.codes, weight.absmax, bias, *outliers, out, height, n_out, width,
        OUTLIERS=OUTLIERS, GATHERED=GATHERED, **flags,
    )  # fmt: skip


def _codes_tile(rows: int) -> tuple[int, int, int, int, int]:
    """As `_tile`, weight-only."""
    if INTERPRETED:
        return (16, 16, 32, 4, 1)
    if rows <= 64:
        return (64, 64, 256, 4, 3)
    if rows <= 128:
        return (128, 64, 128, 4, 3)
    return (128, 128, 64, 8, 4) if rows <= 512 else (256, 128, 64, 8, 4)


def _tile(rows: int, n_out: int, width: int) -> tuple[int, int, int, int, int]:
    """Rows, outputs, inputs, warps, stages: of those tried on one H100 at LLaMA-2-7B's shapes."""
    if INTERPRETED:
        return (16, 16, 32, 4, 1)
    if rows <= 64:
        return (64, 64, 128, 4, 4)
    if rows < 1024:
        return (128, 128, 128, 4, 4)
    return (256, 128, 128, 8, 3) if width > 2 * n_out else (128, 256, 128, 8, 3)
