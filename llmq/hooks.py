"""Read what goes into and comes out of the layers of a model, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

OnTensor = Callable[[str, nn.Module, torch.Tensor], None]

KINDS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "q/k/v") | dict.fromkeys(("gate_proj", "up_proj"), "gate/up")
KINDS |= {"o_proj": "o", "down_proj": "down"}


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of `model` by its name in the model, in the order of `named_modules`.

    A linear layer is an `nn.Linear` (bitsandbytes' layers are subclasses) or a module without children that has
    `in_features` and `out_features`, as quantized replacements of `nn.Linear` have.
    """
    return {name: module for name, module in model.named_modules() if _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    replaced = hasattr(module, "in_features") and hasattr(module, "out_features") and not any(module.children())
    return replaced or isinstance(module, nn.Linear)


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """The kind of linear layer that a module's name tells, and the first number in its path (None without one)."""
    parts = name.split(".")
    return KINDS.get(parts[-1], parts[-1]), next((int(part) for part in parts if part.isdigit()), None)


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer stores a weight of 8 bits or less an element."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(tensor.element_size() == 1 and tensor.dtype != torch.bool for tensor in tensors)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The stack of equal blocks that a decoder is made of, by name: the longest list of modules of one class that
    itself is in no other such list. Empty where there is none."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # outer ones come before those inside them
        alike = isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        if alike and not any(name.startswith(f"{outer}." if outer else "") for outer in stacks):
            stacks[name] = module
    name = max(stacks, key=lambda name: (len(stacks[name]), -name.count(".")), default="")
    return {f"{name}.{number}" if name else str(number): block for number, block in enumerate(stacks.get(name, ()))}


class Watched:
    """Call `on_input(name, module, x)` before and `on_output(name, module, y)` after each of `modules` runs, inside the
    `with` block only.

    `x` is the first tensor that the module is given, `y` the (first) tensor that it returns; usually (batch, tokens,
    width), detached: they share memory with the activation, so read or reduce them in the call, and clone what must
    outlive it. What a callback raises ends the forward pass and reaches the caller. The hooks are removed when the
    block ends, also by an exception, and only these hooks: blocks nest in any order. One object serves one block at a
    time (RuntimeError otherwise).
    """

    def __init__(
        self, modules: dict[str, nn.Module], on_input: OnTensor | None = None, on_output: OnTensor | None = None
    ) -> None:
        self._modules, self._on_input, self._on_output = modules, on_input, on_output
        self._handles: dict[tuple[str, str], torch.utils.hooks.RemovableHandle] = {}

    def __enter__(self) -> Watched:
        if self._handles:
            raise RuntimeError("these hooks are already in place; make a second Watched to nest")
        for name, module in self._modules.items():
            if self._on_input:
                hook = partial(self._before, name)
                self._handles[name, "input"] = module.register_forward_pre_hook(hook, with_kwargs=True)
            if self._on_output:
                self._handles[name, "output"] = module.register_forward_hook(partial(self._after, name))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.popitem()[1].remove()

    def skip_output(self, name: str) -> None:
        """Call `on_output` for this module no more in this block; a callback may ask so of its own module."""
        self._handles.pop((name, "output")).remove()

    def _before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        _tell(self._on_input, name, module, (*args, *kwargs.values()))

    def _after(self, name: str, module: nn.Module, args: tuple, output: object) -> None:
        _tell(self._on_output, name, module, output if isinstance(output, tuple | list) else (output,))


def _tell(listener: OnTensor, name: str, module: nn.Module, values: Iterable[object]) -> None:
    """Give `listener` the first tensor among `values`, if there is one."""
    found = next((value for value in values if isinstance(value, torch.Tensor)), None)
    if found is not None:
        listener(name, module, found.detach() if found.requires_grad else found)
