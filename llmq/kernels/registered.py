"""LLM.int8() as operations of torch, `torch.ops.llmq`: a compiler sees their shapes and leaves them whole.

So `torch.compile(fullgraph=True)` and `torch.export` take a model that uses them. With Triton's kernels nothing in them
asks the host, and all they write is allocated in the call, so that a CUDA graph of it stays valid.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from llmq.kernels.backend import current, kernels_for
from llmq.kernels.buffers import LISTED, Noting, SplitVector
from llmq.kernels.primitives import Int8Weight

LIBRARY = torch.library.Library("llmq", "DEF")
LIBRARY.define(
    "linear_token(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases, float threshold) -> Tensor[]"
)
LIBRARY.define("linear_rows(Tensor x, Tensor weight, Tensor scales, Tensor? bias, float threshold) -> Tensor")


@torch.library.impl(LIBRARY, "linear_token", "CompositeExplicitAutograd")
def linear_token(x: torch.Tensor, weights, scales, biases, threshold: float) -> list[torch.Tensor]:
    """Multiply one token's activations, (in,) or with dimensions of 1 before, with each of several int8 `weights`
    (out, in) of row `scales`: an (out,) each, in the type of `x`. `biases`: as many, or none."""
    outs = [x.new_empty(len(weight)) for weight in weights]
    kernels, split = _kernels(x.device), _split_like(x)
    with _current(x.device):
        kernels.split(_half(x).reshape(-1), threshold, split)
        kernels.products(split, [*map(Int8Weight, weights, scales)], outs, biases=biases)
    return outs


@torch.library.register_fake("llmq::linear_token", lib=LIBRARY)
def _linear_token_like(x: torch.Tensor, weights, scales, biases, threshold: float) -> list[torch.Tensor]:
    return [x.new_empty(weight.shape[0]) for weight in weights]


@torch.library.impl(LIBRARY, "linear_rows", "CompositeExplicitAutograd")
def linear_rows(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias, threshold: float) -> torch.Tensor:
    """Multiply several tokens' activations (rows, in) with int8 `weight` (out, in): (rows, out) in the type of `x`."""
    marks = torch.zeros(x.shape[1], dtype=torch.int8, device=x.device)
    kernels = _kernels(x.device)
    with _current(x.device):
        rows = kernels.plain_rows(_half(x).contiguous(), Noting(threshold, marks))
        return kernels.linear_rows(rows, Int8Weight(weight, scales), bias=bias).to(x.dtype)


@torch.library.register_fake("llmq::linear_rows", lib=LIBRARY)
def _linear_rows_like(x: torch.Tensor, weight, scales, bias, threshold: float) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@cache
def _kernels(device: torch.device):
    return kernels_for(str(device))[0]


def _current(device: torch.device) -> AbstractContextManager:
    """As `backend.current`, which takes longer than to see that there is nothing to do."""
    here = device.type == "cpu" or device.index == torch.cuda.current_device()
    return nullcontext() if here else current(str(device))


def _split_like(x: torch.Tensor) -> SplitVector:
    """Room for the decomposition of one token; two allocations, for their time is what an eager step waits for."""
    width, listed = x.shape[-1], max(x.shape[-1], LISTED)
    numbers = torch.empty(2 * listed + 2, dtype=torch.int32, device=x.device)
    index, value, count, absmax = numbers.split((listed, listed, 1, 1))
    codes = torch.empty(width, dtype=torch.int8, device=x.device)
    return SplitVector(codes, absmax.view(torch.float32), count, index, value.view(torch.float32))


def _half(x: torch.Tensor) -> torch.Tensor:
    """In 16 bit, as bitsandbytes takes it."""
    return x.half() if x.dtype == torch.float32 else x
