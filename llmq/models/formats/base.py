"""What a format of quantized checkpoints says: which methods it can hold, the tensors of a layer, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods import Method


class Format:
    """One format. `name`: as people type it; `parts`: a quantized layer's tensors, by their names after the dot;
    the first is `mark`, which no other layer has. None: transformers reads them."""

    name: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()
    layer: type  # of the layers it holds

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, self.layer)

    @property
    def mark(self) -> str:
        return self.parts[0] if self.parts else ""

    def describes(self, settings: Mapping) -> bool:
        """Whether `quantization_config` in a config.json is this format's."""
        raise NotImplementedError

    def methods(self, settings: Mapping) -> list[Method]:
        """The methods whose layers a checkpoint with these settings holds: the first by its name where it says so.
        Raises ModelUnavailable for settings that nothing here computes."""
        raise NotImplementedError

    def read(self, tensors: Mapping[str, torch.Tensor], settings: Mapping) -> nn.Module:
        """A layer without its bias, from its tensors by their names after the dot."""
        raise NotImplementedError

    def holds(self, method: Method) -> bool:
        """Whether layers of `method` can be written."""
        raise NotImplementedError

    def settings(self, method: Method, layers: Mapping[str, nn.Module]) -> dict:
        """`quantization_config` for a model with these layers. Raises BadChoice naming a layer that cannot be
        written."""
        raise NotImplementedError

    def write(self, layer: nn.Module, settings: Mapping) -> dict[str, torch.Tensor]:
        """The tensors of a layer, its bias left out."""
        raise NotImplementedError


def as_words(packed: torch.Tensor, numbers: int, bits: int) -> torch.Tensor:
    """uint8 (rows, ...) of `numbers` codes of `bits` bits a row -> int32 (rows, ceil(numbers · bits / 32)): the same
    bits, the first code in the lowest ones of the first word."""
    import torch
    from torch.nn import functional

    width = -(-numbers * bits // 32) * 4
    return functional.pad(packed, (0, width - packed.shape[1])).contiguous().view(torch.int32)


def as_bytes(words: torch.Tensor, numbers: int, bits: int) -> torch.Tensor:
    """int32 (rows, ...) -> uint8 (rows, ceil(numbers / 8) · bits), as `packed_linear.pack` packs codes."""
    import torch
    from torch.nn import functional

    packed = words.contiguous().view(torch.uint8)
    return functional.pad(packed, (0, -(-numbers // 8) * bits - packed.shape[1]))
