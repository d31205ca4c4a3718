"""Which implementation of the operations a device gets: found once, in one place, and replaceable in tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

from llmq.devices import first
from llmq.kernels import reference

if TYPE_CHECKING:
    import torch

    from llmq.kernels.primitives import Int8Weight

LOWEST_CAPABILITY = (7, 5)  # of a GPU; what the kernels are compile-checked for
TENSOR_CORES = (8, 0)  # from here on Triton multiplies int8 matrices; before, a prompt takes torch's operations
# They hand each other what only Triton's use.
MANY_ROWS = {"gate_rows", "gated_rows", "linear_rows", "norm_rows", "plain_rows", "scores"}


def kernels_for(device: str) -> tuple[ModuleType | SimpleNamespace, str]:
    """Return the operations for `device`, and why they are slower than they could be ('' where they are not)."""
    if not device.startswith("cuda"):
        return reference, ""
    if reason := _why_not_triton(device):
        return reference, f"{reason}, so the lean loop runs on torch's own operations, which is slower"
    import torch

    from llmq.kernels import triton

    names = set(triton.__all__)
    if torch.cuda.get_device_capability(device) < TENSOR_CORES:
        names -= MANY_ROWS
    found = {**vars(reference), **{name: getattr(triton, name) for name in names}}
    return SimpleNamespace(**found | {"prompts_can_be_captured": names >= MANY_ROWS}), ""


def quantizer_for(device: str) -> Callable[[torch.Tensor, Int8Weight], None]:
    """Return the quickest `quantize_rows` for weights on `device`; all give the same codes and scales."""
    if device.startswith("cuda"):
        return kernels_for(device)[0].quantize_rows
    from llmq.kernels.cpu import library
    from llmq.kernels.cpu.build import why_not_native

    return reference.quantize_rows if why_not_native() else library.quantize_rows


def current(device: str) -> AbstractContextManager:
    """Return a `with` block in which kernels are launched on the GPU `device`, the first of several; it does nothing
    for a CPU."""
    if not device.startswith("cuda"):
        return nullcontext()
    import torch

    return torch.cuda.device(first(device))


def _why_not_triton(device: str) -> str:
    import torch

    if torch.cuda.get_device_capability(device) < LOWEST_CAPABILITY:
        return f"this GPU is older than compute capability {'.'.join(map(str, LOWEST_CAPABILITY))}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return ""
