"""Rows of the embedding, int8 ones at their scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels import reference
from llmq.kernels.primitives import Int8Weight
from llmq.kernels.triton.launch import let_next_start, options, wait_for_previous


@triton.jit
def _embed(codes_ptr, absmax_ptr, tokens_ptr, out_ptr, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_start(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous(OVERLAP)
    token = tl.load(tokens_ptr + row)
    scale = tl.load(absmax_ptr + token) / 127
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + token * width + at, mask=at < width, other=0)
    tl.store(out_ptr + row * width + at, (codes.to(tl.float32) * scale).to(out_ptr.dtype.element_ty), mask=at < width)


def embed(table: torch.Tensor | Int8Weight, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """See `reference.embed`."""
    if not isinstance(table, Int8Weight):
        return reference.embed(table, tokens, out)
    width = table.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    _embed[(len(tokens), triton.cdiv(width, block))](
        table.codes, table.absmax, tokens, out, width, BLOCK=block, num_warps=4, **options(out.device)
    )
