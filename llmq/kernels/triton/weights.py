"""Int8 weights: codes and row scales written straight into place, and rows of an embedding read at their scale.

No float32 copy of the tensor is made on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels.primitives import Int8Weight
from llmq.kernels.triton.codes import code_scale, rounded
from llmq.kernels.triton.launch import INTERPRETED, let_next_start, options, wait_for_previous

BLOCK = 2048


@triton.jit
def _quantize(w_ptr, codes_ptr, absmax_ptr, width, BLOCK: tl.constexpr, PTX: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        w = tl.load(w_ptr + row * width + start + cols, mask=start + cols < width, other=0.0)
        peak = tl.maximum(peak, tl.abs(w.to(tl.float16).to(tl.float32)))
    absmax = tl.max(peak, 0)
    scale = code_scale(absmax, PTX)
    for start in range(0, width, BLOCK):
        w = tl.load(w_ptr + row * width + start + cols, mask=start + cols < width, other=0.0)
        codes = rounded(w.to(tl.float16).to(tl.float32) * scale, PTX)
        tl.store(codes_ptr + row * width + start + cols, codes.to(tl.int8), mask=start + cols < width)
    tl.store(absmax_ptr + row, absmax)


def quantize_rows(weight: torch.Tensor, out: Int8Weight) -> None:
    """See `reference.quantize_rows`; `weight` is contiguous and on the device of `out`."""
    rows, width = weight.shape
    _quantize[(rows,)](
        weight, out.codes, out.absmax, width, BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        PTX=not INTERPRETED, num_warps=8,
    )  # fmt: skip


@triton.jit
def _embed(
    table_ptr, absmax_ptr, tokens_ptr, out_ptr, width, BLOCK: tl.constexpr, INT8: tl.constexpr, OVERLAP: tl.constexpr
):
    let_next_start(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous(OVERLAP)
    token = tl.load(tokens_ptr + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(table_ptr + token * width + at, mask=at < width, other=0)
    if INT8:
        x = x.to(tl.float32) * (tl.load(absmax_ptr + token) / 127)
    tl.store(out_ptr + row * width + at, x.to(out_ptr.dtype.element_ty), mask=at < width)


def embed(table: torch.Tensor | Int8Weight, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """See `reference.embed`."""
    codes, absmax = (table.codes, table.absmax) if isinstance(table, Int8Weight) else (table, None)
    width = table.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    _embed[(len(tokens), triton.cdiv(width, block))](
        codes, absmax, tokens, out, width, BLOCK=block, INT8=absmax is not None, num_warps=4, **options(out.device)
    )
