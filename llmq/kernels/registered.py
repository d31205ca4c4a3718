"""LLM.int8() as operations of torch, `torch.ops.llmq`: a compiler sees their shapes and leaves them whole.

So `torch.compile(fullgraph=True)` and `torch.export` take a model that uses them. With Triton's kernels nothing in them
asks the host, and all they write is allocated in the call, so that a CUDA graph of it stays valid.
"""

from __future__ import annotations

from functools import cache

import torch

from llmq.kernels.backend import current, kernels_for
from llmq.kernels.buffers import PADDING, Noting, SplitVector
from llmq.kernels.primitives import Int8Weight

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

LIBRARY = torch.library.Library("llmq", "DEF")
LIBRARY.define("split(Tensor x, float threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    "product(Tensor codes, Tensor absmax, Tensor count, Tensor index, Tensor value, Tensor weight, Tensor scales, "
    "Tensor? bias, ScalarType dtype) -> Tensor"
)
LIBRARY.define("linear_rows(Tensor x, Tensor weight, Tensor scales, Tensor? bias, float threshold) -> Tensor")

_kernels = cache(lambda device: kernels_for(str(device))[0])


@torch.library.impl(LIBRARY, "split", "CompositeExplicitAutograd")
def split(x: torch.Tensor, threshold: float) -> Split:
    """Decompose one token's activations, (in,) or with dimensions of 1 before: the fields of a `SplitVector`."""
    parts = _split_like(x, threshold)
    with current(str(x.device)):
        _kernels(x.device).split_alone(_half(x).reshape(-1), threshold, SplitVector(*parts))
    return parts


@torch.library.register_fake("llmq::split", lib=LIBRARY)
def _split_like(x: torch.Tensor, threshold: float) -> Split:
    width = x.shape[-1]
    listed = max(width, PADDING)
    kinds = torch.int8, torch.float32, torch.int32, torch.int32, torch.float32
    sizes = width, 1, 1, listed, listed
    return tuple(x.new_empty(size, dtype=kind) for size, kind in zip(sizes, kinds, strict=True))


@torch.library.impl(LIBRARY, "product", "CompositeExplicitAutograd")
def product(codes, absmax, count, index, value, weight, scales, bias, dtype: torch.dtype) -> torch.Tensor:
    """Multiply what `split` gave with int8 `weight` (out, in) of row `scales`: (out,) in `dtype`."""
    out = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    with current(str(weight.device)):
        x = SplitVector(codes, absmax, count, index, value)
        _kernels(weight.device).product(x, Int8Weight(weight, scales), out, bias=bias)
    return out


@torch.library.register_fake("llmq::product", lib=LIBRARY)
def _product_like(codes, absmax, count, index, value, weight, scales, bias, dtype: torch.dtype) -> torch.Tensor:
    return weight.new_empty(weight.shape[0], dtype=dtype)


@torch.library.impl(LIBRARY, "linear_rows", "CompositeExplicitAutograd")
def linear_rows(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias, threshold: float) -> torch.Tensor:
    """Multiply several tokens' activations (rows, in) with int8 `weight` (out, in): (rows, out) in the type of `x`."""
    marks = torch.zeros(x.shape[1], dtype=torch.int8, device=x.device)
    kernels = _kernels(x.device)
    with current(str(x.device)):
        rows = kernels.plain_rows(_half(x).contiguous(), Noting(threshold, marks))
        return kernels.linear_rows(rows, Int8Weight(weight, scales), bias=bias).to(x.dtype)


@torch.library.register_fake("llmq::linear_rows", lib=LIBRARY)
def _linear_rows_like(x: torch.Tensor, weight, scales, bias, threshold: float) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _half(x: torch.Tensor) -> torch.Tensor:
    """In 16 bit, as bitsandbytes takes it."""
    return x.half() if x.dtype == torch.float32 else x
