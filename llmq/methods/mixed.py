"""A method that leaves some layers alone: `llm-int8@6:keep=3.down_proj+5` quantizes all but one module and one layer.

A place is a layer's number or a range of them, a module's name, or both: `5`, `3-5`, `down_proj`, `3-5.down_proj`; `+`
stands between places. `qkv_proj` and `gate_up_proj` are q, k and v, and gate and up, together. What is kept has the
type that the method gives to everything it does not quantize, which is 16 bit for all but the FP32 emulations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from llmq.errors import BadChoice
from llmq.fields import Kind
from llmq.methods.base import Method

if TYPE_CHECKING:
    from torch import nn

PLACE = re.compile(r"(?=.)(?:(\d+)(?:-(\d+))?)?(?:(?:^|(?<=\d)\.)([A-Za-z_][\w.]*))?")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SETTING = "keep="


@dataclass(frozen=True)
class Places(Kind):
    """Layers and modules of a model, as a tuple of places."""

    holds = tuple

    def parse(self, name: str, text: str) -> tuple[str, ...]:
        return self.check(name, tuple(part.strip() for part in text.split("+")))

    def check(self, name: str, value: Any) -> tuple[str, ...]:
        how = "write layers and modules such as 5, 3-5, down_proj or 3.down_proj, with + between them"
        for place in super().check(name, value) or ("",):
            found = PLACE.fullmatch(place) if isinstance(place, str) else None
            if not found:
                raise BadChoice(f"{name} holds {place!r:.80}, which names no layer; {how}")
            first, last, _ = found.groups()
            if last and int(last) < int(first):
                raise BadChoice(f"{name} holds {place!r:.80}, and layers are counted upwards; {how}")
        return value

    def spell(self, value: tuple[str, ...]) -> str:
        return "+".join(value)


@dataclass(frozen=True)
class Mixed:
    """What a method that keeps `keep` does otherwise than the same method without: mixed into its class by `mixed`."""

    keep: Annotated[tuple[str, ...], Places(help="Layers and modules that are not quantized.")] = ()
    plain: ClassVar[type[Method]]
    opens_int8 = False  # what is int8 already cannot be kept

    @property
    def base(self) -> Method:
        """The method without exceptions."""
        return self.plain(**{field.name: getattr(self, field.name) for field in fields(self.plain)})

    @property
    def spelled(self) -> str:
        base = self.base.spelled
        return f"{base}{':' if '@' in base else '@'}{SETTING}{'+'.join(self.keep)}"

    @property
    def calibration(self) -> str:
        return self.base.calibration

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        return f"{super().arithmetic(device, loop, cpu)}; not quantized: {', '.join(self.keep)}"

    def load_arguments(self, device: str) -> dict[str, Any]:
        """Those of the dense model: a library that quantizes on the way in knows nothing of places."""
        return Method.load_arguments(self, device)

    def kept(self, names: Iterable[str]) -> set[str]:
        """Raises BadChoice for a place that is none of the model's, and where nothing is left to quantize."""
        names = list(names)
        found = {place: {name for name in names if is_at(name, place)} for place in self.keep}
        for place, there in found.items():
            if names and not there:
                raise BadChoice(f"keep names {place!r:.80}, and {self.name} quantizes nothing there; {_choices(names)}")
        kept = set().union(*found.values())
        if names and len(kept) == len(set(names)):
            raise BadChoice(f"keep={'+'.join(self.keep):.80} leaves {self.name} nothing to quantize; choose fp16")
        return kept


def mixed(method: Method, keep: str | tuple[str, ...]) -> Method:
    """`method` with the layers at `keep` not quantized, a string of places or a tuple of them. Raises BadChoice for
    what names no layer, and for a method that quantizes none."""
    if method.dense:
        raise BadChoice(f"{method.name} quantizes no layer, so there is none to keep; choose another method")
    base = method.base if isinstance(method, Mixed) else method
    given = {field.name: getattr(base, field.name) for field in fields(base)}
    return _mixed_class(type(base))(**given, keep=Places().parse("keep", keep) if isinstance(keep, str) else keep)


@cache
def _mixed_class(cls: type[Method]) -> type[Method]:
    """`cls` with what `Mixed` does otherwise; its fields, then `keep`."""
    return dataclass(frozen=True)(type(f"Mixed{cls.__name__}", (Mixed, cls), {"__module__": __name__, "plain": cls}))


def is_at(name: str, place: str) -> bool:
    """Whether the module called `name` is at one `place`."""
    first, last, module = PLACE.fullmatch(place).groups()
    layer = layer_of(name)
    within = not first or (layer is not None and int(first) <= layer <= int(last or first))
    ends = (module, *FUSED.get(module, ())) if module else ("",)
    return within and any(f".{name}".endswith(f".{end}" if end else "") for end in ends)


def layer_of(name: str) -> int | None:
    """The first number in a module's path; None without one."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def places(kept: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The fewest places that are the modules `kept` of those called `names`, in the order of layers."""
    kept, layers = set(kept), {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    found: dict[str, list[int]] = {}
    loose = [name for name in layers.pop(None, ()) if name in kept]
    for layer, there in layers.items():
        for module in _modules(kept & set(there), there):
            found.setdefault(module, []).append(layer)
    spans = ((first, last, module) for module, numbers in found.items() for first, last in _runs(numbers))
    return (*(_place(*span) for span in sorted(spans)), *loose)


def _modules(kept: set[str], there: list[str]) -> list[str]:
    """What the `kept` modules of a layer are called: '' is all of them."""
    if kept == set(there):
        return [""]
    short = {name: _shortest(name, there) for name in there if name in kept}
    called = list(short.values())
    for fused, parts in FUSED.items():
        if set(parts) <= set(called):
            called = [fused, *(name for name in called if name not in parts)]
    return called


def _shortest(name: str, there: list[str]) -> str:
    """The shortest end of `name` that no other module of its layer has."""
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in there) == 1)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as first and last of each row without a gap."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        start = runs.pop()[0] if runs and runs[-1][1] == number - 1 else number
        runs.append((start, number))
    return runs


def _place(first: int, last: int, module: str) -> str:
    layers = f"{first}" if first == last else f"{first}-{last}"
    return f"{layers}.{module}" if module else layers


def skip_modules(model: nn.Module, method: Method) -> list[str]:
    """`llm_int8_skip_modules` of transformers' BitsAndBytesConfig for what `method` keeps of a dense `model`, by full
    names, and the head: a list of one's own replaces the default, which is the head alone."""
    from llmq.methods.swap import linear_layers

    kept = method.kept(name for name, _ in linear_layers(model))
    head = model.get_output_embeddings()
    return sorted(kept) + [name for name, module in model.named_modules() if module is head]


def _choices(names: list[str]) -> str:
    layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
    modules = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    numbers = f"layers {layers[0]} to {layers[-1]} and " if layers else ""
    return f"this model has {numbers}{', '.join(modules[:12])}"
