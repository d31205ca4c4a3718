"""The steps of a bitsandbytes int8 layer, told apart inside its own code.

While `marked` lasts, what `MatMul8bitLt.forward` calls one after the other is replaced by functions that tell which
step begins and then call the same, so that a layer computes as ever (bitsandbytes 0.50: autograd/_functions.py,
backends/cuda/ops.py, backends/default/ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

Mark = Callable[[str], None]

STEPS = {
    "search": "find the outlier columns; the host waits for what was found",
    "quantize": "round the other columns to int8, with a scale per row",
    "gather": "copy the outlier columns of input and weight, and dequantize those of the weight",
    "int8_product": "multiply the int8 matrices into int32",
    "scale": "turn int32 into FP16 with the scales of row and column",
    "outlier_product": "multiply the outlier columns in FP16 and add them",
    "dispatch": "the layer's own Python, its autograd function and operators that call operators",
}
OF_OUTLIERS = ("gather", "outlier_product")  # without outliers all that these have is `dispatch`


@contextmanager
def marked(device: str, mark: Mark) -> Iterator[None]:
    """A block in which every int8 layer of bitsandbytes calls `mark` with the name of each step as it begins; what
    comes before the first is `dispatch`, and so is what comes last."""
    import torch
    from bitsandbytes import functional

    operators = torch.ops.bitsandbytes
    quantizer = _quantizer(device)
    places = (
        (functional, "int8_vectorwise_quant", "search", ""),
        (*quantizer, "quantize", ""),
        (operators, "int8_mixed_scaled_mm", "gather", "dispatch"),
        (operators.int8_scaled_mm, "default", "dispatch", ""),
        (operators.int8_linear_matmul, "default", "int8_product", "scale"),
        (operators.int8_mm_dequant, "default", "", "outlier_product"),
    )
    with ExitStack() as replaced:
        for owner, name, begins, follows in places:
            replaced.enter_context(_replaced(owner, name, _telling(getattr(owner, name), begins, follows, mark)))
        yield


def _quantizer(device: str) -> tuple[Any, str]:
    """Where the rows are rounded once the search is over: the CUDA kernel; on a CPU the maxima of the rows come
    first."""
    if device.startswith("cuda"):
        from bitsandbytes.backends.cuda.ops import lib

        return lib, "cint8_vector_quant"
    import torch

    return torch, "max"


def _telling(call: Callable, begins: str, follows: str, mark: Mark) -> Callable:
    def telling(*args, **named):
        if begins:
            mark(begins)
        result = call(*args, **named)
        if follows:
            mark(follows)
        return result

    return telling


@contextmanager
def _replaced(owner: Any, name: str, value: Callable) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
