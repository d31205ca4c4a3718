"""What a method is: a frozen record whose fields are its settings, and what follows from them.

A method says how one linear layer is quantized and what that weighs; the walk over the model, the names people type,
the controls and the JSON are written once, here and in `swap`. It knows nothing about prompts, caches or timing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llmq.errors import BadChoice
from llmq.fields import Number, check_fields, fields_of
from llmq.methods import swap

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.calibrate import ChannelMaximum
    from llmq.methods.rounding import Rounding

DEFAULT_THRESHOLD = 6.0  # LLM.int8() paper, section 3.2; also the default of bitsandbytes through transformers
LARGEST_FP16 = 65504  # nothing a 16-bit activation holds is above it
THRESHOLD = Number(
    0,
    LARGEST_FP16,
    help="Columns of a layer's input with any |x| of at least this stay in 16 bit. 0 is off.",
    label="Outlier threshold",
    infinite=True,
    zero="off",
    shown=20,
    step=0.1,
)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes under a method: `weights` counts parameters and buffers, `scales` what is kept beside them."""

    weights: int
    scales: int = 0


@dataclass(frozen=True)
class Method:
    """One method with its settings. A subclass sets the class attributes, declares fields, and overrides what differs.

    `name`: what people type; `label`, `about`, `source`: for readers. `bits`: of a stored linear weight. `dtype`: torch
    dtype name of embeddings, norms, head and activations. `packed`: what our own loops store for it, 'dense' or 'int8'
    (None: it runs through transformers only). `int8_head`: embedding and head are int8 too. `opens_int8`: it can start
    from a checkpoint of int8 weights. `live`: fields that may change on a loaded model. `dense`: weights stay in
    floating point. `emulated`: its numbers are right and its speed means nothing.
    """

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    about: ClassVar[str] = ""
    source: ClassVar[str] = ""
    bits: ClassVar[int] = 8
    dtype: ClassVar[str] = "float16"
    packed: ClassVar[str | None] = None
    int8_head: ClassVar[bool] = False
    opens_int8: ClassVar[bool] = False
    live: ClassVar[frozenset[str]] = frozenset()
    dense: ClassVar[bool] = False
    emulated: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    calibration_windows: ClassVar[int] = 4  # of the text for it
    by_row: ClassVar[bool] = False  # whether each row of a call has outliers of its own
    threshold: ClassVar[float | None] = None  # a method with outlier columns has a field of this name instead

    def __post_init__(self):
        check_fields(self)

    # What people type and read

    @classmethod
    def parse(cls, settings: str, defaults: Mapping[str, Any]) -> Self:
        """`6` or `threshold=6:bits=4`: settings after the `@` of a name; a bare value is the first field's. `defaults`
        holds values for fields that are not given; names it has no field for are ignored."""
        known = {field.name: field for field in fields_of(cls)}
        given = {name: value for name, value in defaults.items() if name in known}
        for number, part in enumerate(settings.split(":") if settings else ()):
            name, equals, text = part.partition("=")
            if not equals:
                name, text = (next(iter(known), ""), part) if number == 0 else (part, "")
            if name not in known:
                choices = f"its settings are {', '.join(known)}" if known else "it has no settings"
                raise BadChoice(f"{cls.name} cannot be set to {part!r}; {choices}")
            given[name] = known[name].kind.parse(known[name].named, text)
        return cls(**given)

    @classmethod
    def explanation(cls) -> str:
        """One screen of Markdown: what it does, its formula with an example, its source, what it needs and when it
        fails. Stands in `explained` under the method's name; without one it is the class's above, or `about`."""
        folder = files("llmq.methods") / "explained"
        named = (folder / f"{base.name}.md" for base in cls.__mro__ if getattr(base, "name", ""))
        found = next((file for file in named if file.is_file()), None)
        return found.read_text(encoding="utf-8") if found else f"**What.** {cls.about}\n\n**Source.** {cls.source}\n"

    @property
    def settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields_of(type(self))}

    @property
    def spelled(self) -> str:
        """The name as people type it, with the settings that differ from their defaults."""
        parts = []
        for number, field in enumerate(fields_of(type(self))):
            if (value := getattr(self, field.name)) != field.default:
                parts.append(("" if number == 0 else f"{field.name}=") + field.kind.spell(value))
        return self.name + ("@" + ":".join(parts) if parts else "")

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        """One plain sentence: what is stored in which type, and in which type it is multiplied on this device in this
        loop ('hf' or 'lean'). `cpu`: torch's name of the processor's capability, such as 'AVX512'; '' is unknown."""
        raise NotImplementedError

    def emulated_on(self, device: str) -> bool:
        """Whether a speed on this device says nothing about the method."""
        return self.emulated

    # What becomes of a model

    def load_arguments(self, device: str) -> dict[str, Any]:
        """Keyword arguments for `AutoModelForCausalLM.from_pretrained`."""
        return {"dtype": self.dtype, "device_map": {"": device}}

    def rounding(self, *, weight: bool) -> Rounding | None:
        """How this method rounds a weight, or an input, by that tensor alone; None for one that does not, or that asks
        a calibration too."""
        return None

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        """The replacement of one linear layer, on its device; `statistics` of its input where it is calibrated."""
        raise NotImplementedError

    def quantize_(self, model: nn.Module, device: str, statistics: Mapping[str, torch.Tensor] | None = None):
        """Turn a 16- or 32-bit model into this method's, in place, in eval mode; returns it. Every linear layer but the
        head is replaced; of a model out of an int8 checkpoint those that are int8 there, and it is not moved. Raises
        BadChoice where there is nothing to replace."""
        import torch

        opened = swap.opened_int8(model)
        swap.cast_parameters_(model if opened else swap.moved_(model, device), getattr(torch, self.dtype))
        if not self.dense:
            swap.replace_(model, opened or self.layers(model), self.quantize, statistics or {})
        if self.int8_head:
            from llmq.methods.layers.int8_linear import convert_ends_

            convert_ends_(model, self.threshold)
        self.apply_(model)
        return model.eval()

    def kept(self, names: Iterable[str]) -> set[str]:
        """Those of the linear layers called `names` that stay as they are."""
        return set()

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(name, layer) of the linear layers of a dense model that are replaced."""
        found = dict(swap.linear_layers(model))
        kept = self.kept(found)
        return [(name, layer) for name, layer in found.items() if name not in kept]

    def apply_(self, model: nn.Module) -> None:
        """Set the live fields of a loaded model, in its layers."""

    def stored(self) -> Self:
        """The method with its live fields at their defaults: equal where the loaded models are equal."""
        defaults = {field.name: field.default for field in fields_of(type(self)) if field.name in self.live}
        return replace(self, **defaults)

    def observer(self, linear: nn.Module) -> ChannelMaximum:
        """What collects the statistics of one layer's input during calibration: `update(x)` with every input
        (..., in_features), then `result()`, a tensor on the host."""
        raise NotImplementedError

    @property
    def calibration(self) -> str:
        """Names the statistics: methods whose statistics are equal share them."""
        return self.spelled

    def outlier_columns(self, module: nn.Module) -> torch.Tensor | None:
        """The columns of the input that `module` multiplied in 16 bit in its last call, by its own account: int64,
        ascending, on its device. None for a layer that keeps no such account."""
        return None

    # What it weighs

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        """Bytes of one linear weight of `shape` (out, in); in 8 bit it has a scale a row."""
        return WeightBytes(shape[0] * shape[1] * self.bits // 8, 4 * shape[0] if self.bits == 8 else 0)

    def predict(self, meta_model: nn.Module, rest: str = "") -> WeightBytes:
        """Bytes this method will need, from a dense model on the meta device; tied weights count once, buffers keep
        their type. `rest`: the dtype of what it leaves, where that is not as it is computed with."""
        import torch

        replaced = {
            id(layer.weight): self.bytes(swap.shape_of(layer)) for layer in swap.replaced_layers(meta_model, self)
        }
        itemsize = getattr(torch, rest or self.dtype).itemsize
        left = sum(
            tensor.numel() * itemsize if tensor.requires_grad else tensor.nbytes
            for tensor in swap.stored_tensors(meta_model)
            if id(tensor) not in replaced
        )
        return WeightBytes(left + sum(b.weights for b in replaced.values()), sum(b.scales for b in replaced.values()))

    def scale_bytes(self, model: nn.Module) -> int:
        """Bytes of quantization scales that are neither parameters nor buffers of a loaded model."""
        scales = {id(m.absmax): m.absmax for m in model.modules() if getattr(m, "absmax", None) is not None}
        return sum(scale.nbytes for scale in scales.values())


def subclasses(cls: type[Method]) -> Iterator[type[Method]]:
    """Every class below `cls`, in the order of definition."""
    for below in cls.__subclasses__():
        yield below
        yield from subclasses(below)
