"""What a prompt's rows need besides matrix products: rotation into the cache, SwiGLU, and LLM.int8()'s decomposition.

For many rows an outlier column is one that reaches the threshold in any row of the call; nothing here asks the host how
many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llmq.kernels.buffers import Cache
from llmq.kernels.triton.launch import INTERPRETED
from llmq.kernels.triton.norm import code_scale, rounded

GATHERED = 128  # outlier columns copied side by side for the matrix product; further ones are read where they are
BLOCK = 1024


@triton.jit
def _append(
    qkv_ptr, rope_ptr, queries_ptr, keys_ptr, values_ptr, rows, heads, groups, width, capacity, start,
    HALF: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    half = width // 2
    at = tl.arange(0, HALF)
    inside = at < half
    x_ptr = qkv_ptr + row.to(tl.int64) * (heads + 2 * groups) * width + head * width
    first = tl.load(x_ptr + at, mask=inside, other=0.0)
    second = tl.load(x_ptr + half + at, mask=inside, other=0.0)
    if head < heads + groups:
        cosine = tl.load(rope_ptr + (start + row) * width + at, mask=inside, other=0.0)
        sine = tl.load(rope_ptr + (start + row) * width + half + at, mask=inside, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * cosine - b * sine).to(first.dtype), (b * cosine + a * sine).to(first.dtype)
    if head < heads:
        out_ptr = queries_ptr + (head.to(tl.int64) * rows + row) * width
    elif head < heads + groups:
        out_ptr = keys_ptr + ((head - heads).to(tl.int64) * capacity + start + row) * width
    else:
        out_ptr = values_ptr + ((head - heads - groups).to(tl.int64) * capacity + start + row) * width
    tl.store(out_ptr + at, first, mask=inside)
    tl.store(out_ptr + half + at, second, mask=inside)


def append_rows(
    qkv: torch.Tensor, cache: Cache, rope: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.append_rows`."""
    rows = qkv.shape[0]
    groups, capacity, width = cache.keys.shape
    heads = qkv.shape[1] // width - 2 * groups
    queries = torch.empty(heads, rows, width, dtype=qkv.dtype, device=qkv.device)
    _append[(rows, heads + 2 * groups)](
        qkv, rope, queries, cache.keys, cache.values, rows, heads, groups, width, capacity, start,
        HALF=triton.next_power_of_2(width // 2), num_warps=1,
    )  # fmt: skip
    return queries, cache.keys[:, : start + rows], cache.values[:, : start + rows]


@triton.jit
def _gate(x_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * 2 * inner + at, mask=at < inner, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * inner + inner + at, mask=at < inner, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * inner + at, y.to(out_ptr.dtype.element_ty), mask=at < inner)


def gate_rows(gate_up: torch.Tensor) -> torch.Tensor:
    """See `reference.gate_rows`."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    _gate[(rows, triton.cdiv(inner, BLOCK))](gate_up, out, inner, BLOCK=BLOCK, num_warps=4)
    return out


@dataclass(frozen=True)
class SplitMatrix:
    """Rows decomposed for one call. `codes`: int8 (rows, in). `absmax`: float32 (rows,). `columns`: int32 (in,), the
    first `count` of which are the outlier columns in order. `gathered`: float16 (rows, GATHERED), the values of the
    first of them, 0 beyond `count`."""

    codes: torch.Tensor
    absmax: torch.Tensor
    columns: torch.Tensor
    count: torch.Tensor
    gathered: torch.Tensor


@triton.jit
def _survey(x_ptr, flags_ptr, absmax_ptr, width, threshold, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        size = tl.abs(tl.load(x_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32))
        outlier = (size >= threshold) & (threshold > 0)
        tl.store(flags_ptr + at, 1, mask=outlier)
        finite = tl.where(size < float("inf"), size, float("inf"))
        peak = tl.maximum(peak, tl.where(outlier & (size < float("inf")), 0.0, finite))
    tl.store(absmax_ptr + row, tl.max(peak, 0))


@triton.jit
def _code(
    x_ptr, flags_ptr, absmax_ptr, codes_ptr, columns_ptr, count_ptr, rows, width,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One program a row; one more lists the outlier columns meanwhile."""
    row = tl.program_id(0).to(tl.int64)
    if row < rows:
        scale = code_scale(tl.load(absmax_ptr + row), PTX)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)
            flag = tl.load(flags_ptr + at, mask=at < width, other=1)
            codes = tl.where(flag != 0, 0.0, rounded(x * scale, PTX))
            tl.store(codes_ptr + row * width + at, codes.to(tl.int8), mask=at < width)
    else:
        at = tl.arange(0, WHOLE)
        flag = tl.load(flags_ptr + at, mask=at < width, other=0).to(tl.int32)
        place = tl.cumsum(flag, 0)
        tl.store(columns_ptr + place - 1, at, mask=flag != 0)
        tl.store(count_ptr, tl.sum(flag, 0))


@triton.jit
def _gather(x_ptr, columns_ptr, count_ptr, out_ptr, width, GATHERED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, GATHERED)
    listed = at < tl.load(count_ptr)
    column = tl.load(columns_ptr + at, mask=listed & (at < width), other=0)
    x = tl.load(x_ptr + row * width + column, mask=listed, other=0)
    tl.store(out_ptr + row * GATHERED + at, x.to(tl.float16))


def gather(x: torch.Tensor, columns: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The listed columns of (rows, width), side by side as float16 (rows, GATHERED), 0 beyond the list."""
    out = torch.empty(x.shape[0], GATHERED, dtype=torch.float16, device=x.device)
    _gather[(x.shape[0],)](x, columns, count, out, x.shape[1], GATHERED=GATHERED, num_warps=1)
    return out


def split_matrix(x: torch.Tensor, threshold: float) -> SplitMatrix:
    """See `primitives.split_rows`; `x` is contiguous (rows, in)."""
    rows, width = x.shape
    flags = torch.zeros(width, dtype=torch.int8, device=x.device)
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    absmax = torch.empty(rows, dtype=torch.float32, device=x.device)
    columns = torch.empty(max(width, GATHERED), dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    _survey[(rows,)](x, flags, absmax, width, float(threshold), BLOCK=block, num_warps=4)
    _code[(rows + 1,)](
        x, flags, absmax, codes, columns, count, rows, width,
        BLOCK=block, WHOLE=triton.next_power_of_2(width), PTX=not INTERPRETED, num_warps=4,
    )  # fmt: skip
    return SplitMatrix(codes, absmax, columns, count, gather(x, columns, count))
