"""What a prompt's rows need besides matrix products: rotation into the cache, SwiGLU, and LLM.int8()'s decomposition.

For many rows an outlier column is one that reaches the threshold in any row of the call; nothing here asks the host how
many there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels.buffers import Cache, Noting, Rows
from llmq.kernels.primitives import Int8Weight
from llmq.kernels.triton.by_row import decomposed
from llmq.kernels.triton.codes import code_scale, rounded
from llmq.kernels.triton.launch import INTERPRETED, let_next_start, options, wait_for_previous

GATHERED = 128  # outlier columns copied side by side for the matrix product; further ones are read where they are
OUTLIERS = 32  # of them multiplied at a time
GATHERERS = 16  # rows copied by one program
HEADS = 16  # rotated by one program


@triton.jit
def _append(
    qkv_ptr, rope_ptr, queries_ptr, keys_ptr, values_ptr, rows, heads, groups, width, capacity, start,
    HEADS: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]  # (HEADS, 1)
    half = width // 2
    at = tl.arange(0, HALF)[None, :]  # (1, HALF)
    inside = (at < half) & (head < heads + 2 * groups)
    x_ptr = qkv_ptr + row * (heads + 2 * groups) * width + head * width + at
    first = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)  # (HEADS, HALF)
    second = tl.load(x_ptr + half, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(rope_ptr + (start + row) * width + at, mask=at < half, other=0.0)  # (1, HALF)
    sine = tl.load(rope_ptr + (start + row) * width + half + at, mask=at < half, other=0.0)
    turned = head < heads + groups
    kind = queries_ptr.dtype.element_ty
    first, second = (
        tl.where(turned, first * cosine - second * sine, first).to(kind),
        tl.where(turned, second * cosine + first * sine, second).to(kind),
    )
    out = queries_ptr + (head.to(tl.int64) * rows + row) * width + at
    chosen = inside & (head < heads)
    tl.store(out, first, mask=chosen)
    tl.store(out + half, second, mask=chosen)
    out = keys_ptr + ((head - heads).to(tl.int64) * capacity + start + row) * width + at
    chosen = inside & (head >= heads) & turned
    tl.store(out, first, mask=chosen)
    tl.store(out + half, second, mask=chosen)
    out = values_ptr + ((head - heads - groups).to(tl.int64) * capacity + start + row) * width + at
    chosen = inside & (head >= heads + groups)
    tl.store(out, first, mask=chosen)
    tl.store(out + half, second, mask=chosen)


def append_rows(
    qkv: torch.Tensor, cache: Cache, rope: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.append_rows`."""
    rows = qkv.shape[0]
    groups, capacity, width = cache.keys.shape
    heads = qkv.shape[1] // width - 2 * groups
    queries = torch.empty(heads, rows, width, dtype=qkv.dtype, device=qkv.device)
    _append[(rows, triton.cdiv(heads + 2 * groups, HEADS))](
        qkv, rope, queries, cache.keys, cache.values, rows, heads, groups, width, capacity, start,
        HEADS=HEADS, HALF=triton.next_power_of_2(width // 2), num_warps=4, **options(qkv.device),
    )  # fmt: skip
    return queries, cache.keys[:, : start + rows], cache.values[:, : start + rows]


@triton.jit
def _noted_width(row, width, used_ptr, USED: tl.constexpr):
    """How much of a row is noted: nothing of one beyond `used`, which only fills a captured graph's shape."""
    noted = width
    if USED:
        noted = tl.where(row < tl.load(used_ptr), width, 0)
    return noted


@triton.jit
def _note(x, at, inside, threshold, marks_ptr, peak):
    """Mark the columns of outliers; the peaks so far with those of `x` that are below the threshold."""
    size = tl.abs(x.to(tl.float32))
    outlier = (size >= threshold) & (threshold > 0) & inside
    tl.store(marks_ptr + at, 1, mask=outlier)
    finite = tl.where(size < float("inf"), size, float("inf"))
    return tl.maximum(peak, tl.where(outlier & (size < float("inf")), 0.0, finite))


@triton.jit
def _survey(
    x_ptr,
    marks_ptr,
    absmax_ptr,
    used_ptr,
    width,
    threshold,
    BLOCK: tl.constexpr,
    USED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    noted = _noted_width(row, width, used_ptr, USED)
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0)
        peak = _note(x, at, at < noted, threshold, marks_ptr, peak)
    tl.store(absmax_ptr + row, tl.max(peak, 0))


def plain_rows(x: torch.Tensor, noting: Noting) -> Rows:
    """See `reference.plain_rows`; `x` is contiguous."""
    if noting.threshold is None:
        return Rows(x)
    if noting.by_row:
        return decomposed(x, noting)
    rows, width = x.shape
    absmax = torch.empty(rows, dtype=torch.float32, device=x.device)
    _survey[(rows,)](
        x, noting.outlier_marks, absmax, noting.used, width, float(noting.threshold),
        BLOCK=min(4096, triton.next_power_of_2(width)), USED=noting.used is not None, num_warps=4, **options(x.device),
    )  # fmt: skip
    return Rows(x, noting.threshold, absmax, noting.outlier_marks)


@triton.jit
def _gate(
    x_ptr, out_ptr, marks_ptr, absmax_ptr, used_ptr, inner, threshold,
    BLOCK: tl.constexpr, NOTE: tl.constexpr, USED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    noted = _noted_width(row, inner, used_ptr, USED)
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, inner, BLOCK):
        at = start + tl.arange(0, BLOCK)
        gate = tl.load(x_ptr + row * 2 * inner + at, mask=at < inner, other=0.0).to(tl.float32)  # (BLOCK,)
        up = tl.load(x_ptr + row * 2 * inner + inner + at, mask=at < inner, other=0.0).to(tl.float32)
        y = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)  # (BLOCK,)
        tl.store(out_ptr + row * inner + at, y, mask=at < inner)
        if NOTE:
            peak = _note(y, at, at < noted, threshold, marks_ptr, peak)
    if NOTE:
        tl.store(absmax_ptr + row, tl.max(peak, 0))


def gate_rows(gate_up: torch.Tensor, noting: Noting) -> Rows:
    """See `reference.gate_rows`."""
    if noting.by_row and noting.threshold is not None:
        return decomposed(gate_rows(gate_up, Noting()).x, noting)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    absmax = None if noting.threshold is None else torch.empty(rows, dtype=torch.float32, device=out.device)
    _gate[(rows,)](
        gate_up, out, noting.outlier_marks, absmax, noting.used, width, float(noting.threshold or 0),
        BLOCK=min(2048, triton.next_power_of_2(width)), NOTE=absmax is not None, USED=noting.used is not None,
        num_warps=8, **options(out.device),
    )  # fmt: skip
    return Rows(out, noting.threshold, absmax, noting.outlier_marks)


@triton.jit
def _norm(
    x_ptr, gain_ptr, out_ptr, marks_ptr, absmax_ptr, used_ptr, width, eps, threshold,
    BLOCK: tl.constexpr, NOTE: tl.constexpr, USED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    noted = _noted_width(row, width, used_ptr, USED)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0)  # (BLOCK,), the whole row
    gain = tl.load(gain_ptr + at, mask=at < width, other=0.0)
    wide = x.to(tl.float32)
    y = ((wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)).to(x.dtype) * gain).to(x.dtype)
    tl.store(out_ptr + row * width + at, y, mask=at < width)
    if NOTE:
        peak = _note(y, at, at < noted, threshold, marks_ptr, tl.zeros((BLOCK,), tl.float32))
        tl.store(absmax_ptr + row, tl.max(peak, 0))


def norm_rows(x: torch.Tensor, norm_weight: torch.Tensor, eps: float, noting: Noting) -> Rows:
    """See `reference.norm_rows`; `x` is contiguous."""
    if noting.by_row and noting.threshold is not None:
        return decomposed(x, noting, norm_weight, eps)
    rows, width = x.shape
    out = torch.empty_like(x)
    absmax = None if noting.threshold is None else torch.empty(rows, dtype=torch.float32, device=out.device)
    _norm[(rows,)](
        x, norm_weight, out, noting.outlier_marks, absmax, noting.used, width, eps, float(noting.threshold or 0),
        BLOCK=triton.next_power_of_2(width), NOTE=absmax is not None, USED=noting.used is not None, num_warps=8,
        **options(x.device),
    )  # fmt: skip
    return Rows(out, noting.threshold, absmax, noting.outlier_marks)


@triton.jit
def _code(
    x_ptr, marks_ptr, absmax_ptr, codes_ptr, columns_ptr, count_ptr, rows, width,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a row; the first one lists the outlier columns meanwhile, which takes it longer."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64) - 1
    if row >= 0:
        scale = code_scale(tl.load(absmax_ptr + row), PTX)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)  # (BLOCK,)
            mark = tl.load(marks_ptr + at, mask=at < width, other=1)
            codes = tl.where(mark != 0, 0.0, rounded(x * scale, PTX))
            tl.store(codes_ptr + row * width + at, codes.to(tl.int8), mask=at < width)
    else:
        at = tl.arange(0, WHOLE)
        mark = tl.load(marks_ptr + at, mask=at < width, other=0).to(tl.int32)  # (WHOLE,)
        place = tl.cumsum(mark, 0)
        tl.store(columns_ptr + place - 1, at, mask=mark != 0)
        tl.store(count_ptr, tl.sum(mark, 0))


@triton.jit
def _gather(
    x_ptr, w_ptr, columns_ptr, count_ptr, xo_ptr, wo_ptr, rows, n_out, width,
    ROWS: tl.constexpr, GATHERED: tl.constexpr, OUTLIERS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some rows of activations or, after all those, of weights. What is read later is whole OUTLIERS of columns."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    program, across = tl.program_id(0), tl.cdiv(rows, ROWS)
    at, count = tl.arange(0, GATHERED)[None, :], tl.load(count_ptr)
    listed, used = at < count, at < tl.cdiv(count, OUTLIERS) * OUTLIERS
    column = tl.load(columns_ptr + at, mask=listed, other=0)  # (1, GATHERED)
    if program < across:
        row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = row < rows
        x = tl.load(x_ptr + row * width + column, mask=inside & listed, other=0.0)
        tl.store(xo_ptr + row * GATHERED + at, x.to(tl.float16), mask=inside & used)
    else:
        row = ((program - across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = row < n_out
        w = tl.load(w_ptr + row * width + column, mask=inside & listed, other=0)
        tl.store(wo_ptr + row * GATHERED + at, w.to(tl.float16), mask=inside & used)


def split_matrix(rows: Rows, weight: Int8Weight) -> tuple[torch.Tensor, ...]:
    """See `primitives.split_rows`; the rows have been noted. Returns their codes, int8 (rows, in); a list of columns,
    int32 (in,), and int32 (1,) how many of these are the outlier columns, in order; of the first of those the values,
    float16 (rows, GATHERED), and the weights' codes, float16 (out, GATHERED), both 0 up to whole OUTLIERS."""
    (height, width), n_out, device = rows.x.shape, weight.shape[0], rows.x.device
    codes = torch.empty(height, width, dtype=torch.int8, device=device)
    listed = torch.empty(max(width, GATHERED) + 1, dtype=torch.int32, device=device)
    count, columns = listed[:1], listed[1:]
    gathered = torch.empty(height + n_out, GATHERED, dtype=torch.float16, device=device)
    values, weights = gathered[:height], gathered[height:]
    _code[(height + 1,)](
        rows.x, rows.outlier_marks, rows.absmax, codes, columns, count, height, width,
        BLOCK=min(4096, triton.next_power_of_2(width)), WHOLE=triton.next_power_of_2(width), PTX=not INTERPRETED,
        num_warps=8, **options(device),
    )  # fmt: skip
    _gather[(triton.cdiv(height, GATHERERS) + triton.cdiv(n_out, GATHERERS),)](
        rows.x, weight.codes, columns, count, values, weights, height, n_out, width,
        ROWS=GATHERERS, GATHERED=GATHERED, OUTLIERS=OUTLIERS, num_warps=4, **options(device),
    )  # fmt: skip
    return codes, columns, count, values, weights
