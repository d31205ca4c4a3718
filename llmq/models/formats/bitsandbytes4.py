"""bitsandbytes' NF4: the codes and, beside them, their scales and what transformers needs to rebuild the layer. Reading
is transformers' own; here it is told what they are, and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmq.errors import ModelUnavailable
from llmq.methods.nf4 import Nf4
from llmq.models.formats.base import Format

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods import Method


class Bitsandbytes4(Format):
    name = "bitsandbytes"

    def is_layer(self, module: nn.Module) -> bool:
        return getattr(getattr(module, "weight", None), "quant_state", None) is not None

    def describes(self, settings: Mapping) -> bool:
        return bool(settings.get("load_in_4bit"))

    def methods(self, settings: Mapping) -> list[Method]:
        if settings.get("bnb_4bit_quant_type") != "nf4":
            raise ModelUnavailable(f"{settings.get('bnb_4bit_quant_type')} weights are not read here; NF4 are")
        return [Nf4()]

    def holds(self, method: Method) -> bool:
        return isinstance(method, Nf4)

    def settings(self, method: Method, layers: Mapping[str, nn.Module]) -> dict:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=method.dtype
        ).to_dict()

    def write(self, layer: nn.Module, settings: Mapping) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
