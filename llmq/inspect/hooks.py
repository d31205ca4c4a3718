"""Read the input of every linear layer of a model, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

OnInput = Callable[[str, nn.Module, torch.Tensor], None]

KINDS = {
    "q_proj": "q/k/v",
    "k_proj": "q/k/v",
    "v_proj": "q/k/v",
    "o_proj": "o",
    "gate_proj": "gate/up",
    "up_proj": "gate/up",
    "down_proj": "down",
}


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of `model` by its name in the model, in the order of `named_modules`.

    A linear layer is an `nn.Linear` (bitsandbytes' layers are subclasses) or a module without children that has
    `in_features` and `out_features`, as quantized replacements of `nn.Linear` have.
    """
    return {name: module for name, module in model.named_modules() if _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not any(module.children())


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """The kind of linear layer that a module's name tells, and the first number in its path (None without one)."""
    parts = name.split(".")
    return KINDS.get(parts[-1], parts[-1]), next((int(part) for part in parts if part.isdigit()), None)


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer stores a weight of 8 bits or less an element."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(tensor.element_size() == 1 and tensor.dtype != torch.bool for tensor in tensors)


class LinearInputs:
    """Call `on_input(name, module, x)` before every linear layer of `model` runs, inside the `with` block only.

    `x` is the layer's input, usually (batch, tokens, in_features), detached: it shares memory with the activation, so
    read it or reduce it in the call, and clone what must outlive it. What `on_input` raises ends the forward pass and
    reaches the caller. The hooks are removed when the block ends, also by an exception, and only these hooks: blocks
    nest in any order. One object serves one block at a time (RuntimeError otherwise).
    """

    def __init__(self, model: nn.Module, on_input: OnInput) -> None:
        self._model = model
        self._on_input = on_input
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> LinearInputs:
        if self._handles:
            raise RuntimeError("these hooks are already in place; make a second LinearInputs to nest")
        for name, module in linear_modules(self._model).items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str):
        def before_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if x is not None:
                self._on_input(name, module, x.detach())

        return before_forward
