"""Int8 codes and row scales of a weight, written straight into place: no float32 copy of the tensor on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels.primitives import Int8Weight
from llmq.kernels.triton.launch import INTERPRETED
from llmq.kernels.triton.norm import code_scale, rounded

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
