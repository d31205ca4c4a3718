"""compressed-tensors, which llm-compressor writes and vLLM and transformers open: three of its formats.

pack-quantized   codes of a few bits, w = (code - zero) · scale
  weight_packed      int32 (out, ceil(in · bits / 32)): the first code in the lowest bits, no bit left over between
  weight_scale       16 bit (out, groups)
  weight_zero_point  int32 (ceil(out · bits / 32), groups), packed along the outputs; absent where all are 2^(bits-1)
  weight_shape       int64 (2,)
  weight_g_idx       int32 (in,), the group of each input, where they are no neighbours
int-quantized    weight int8 (out, in), weight_scale (out, 1); activations int8, a scale a row when they come
float-quantized  weight E4M3 (out, in), weight_scale (out, 1), or (1,) for the tensor; activations likewise
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from llmq.errors import BadChoice, ModelUnavailable
from llmq.methods import METHODS
from llmq.methods.fp8 import Fp8
from llmq.methods.layers.fp8_linear import Fp8Linear
from llmq.methods.layers.naive_linear import NaiveLinear
from llmq.methods.layers.packed_linear import Grid, PackedLinear, pack, unpack
from llmq.methods.naive import Vectorwise
from llmq.methods.rtn import Grouped
from llmq.models.formats.base import Format, as_bytes, as_words

if TYPE_CHECKING:
    from torch import nn

    from llmq.methods import Method

ROWS, TENSOR = "channel", "tensor"  # strategies: what shares a scale
DYNAMIC = {"num_bits": 8, "symmetric": True, "dynamic": True}  # activations, whose scales come with them


class CompressedTensors(Format):
    name = "compressed-tensors"
    kind = ""  # of its formats

    def describes(self, settings: Mapping) -> bool:
        return settings.get("quant_method") == self.name and settings.get("format") == self.kind

    def settings(self, method: Method, layers: Mapping[str, nn.Module]) -> dict:
        weights, activations = self.arguments(method)
        if activations:
            activations = DYNAMIC | activations
        scheme = {"targets": ["Linear"], "weights": weights | {"dynamic": False}, "input_activations": activations}
        return {
            "quant_method": self.name,
            "format": self.kind,
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme | {"output_activations": None, "format": self.kind}},
            "ignore": ["lm_head"],
        }

    def arguments(self, method: Method) -> tuple[dict, dict | None]:
        """How weights are quantized, and how activations are, in the words of compressed-tensors."""
        raise NotImplementedError


class PackQuantized(CompressedTensors):
    kind, layer = "pack-quantized", PackedLinear
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def methods(self, settings: Mapping) -> list[Method]:
        """Any method of such codes: the format does not say which made them."""
        weights = _weights(settings, "int", activations=False)
        bits, group = weights["num_bits"], weights.get("group_size") or 0
        found = (type(method) for method in METHODS.values() if isinstance(method, Grouped))
        given = {"bits": bits, "group": max(group, 0)}
        return [cls(**given | ({"folded": True} if hasattr(cls, "folded") else {})) for cls in found]

    def read(self, tensors: Mapping[str, torch.Tensor], settings: Mapping) -> PackedLinear:
        method, scale = self.methods(settings)[0], tensors["weight_scale"]
        bits, columns = method.bits, tensors["weight_shape"].tolist()[1]
        codes = as_bytes(tensors["weight_packed"], columns, bits)
        zero = _zero(tensors.get("weight_zero_point"), scale, bits)
        layer = PackedLinear.over(codes, columns, scale, zero, Grid(bits, method.group), None)
        if (owners := tensors.get("weight_g_idx")) is not None:
            layer.owners = owners.long()
        return layer

    def holds(self, method: Method) -> bool:
        return isinstance(method, Grouped)

    def settings(self, method: Method, layers: Mapping[str, PackedLinear]) -> dict:
        for name, layer in layers.items():
            if layer.in_features % (layer.grid.group or 1):
                raise BadChoice(
                    f"groups of {layer.grid.group} do not divide the {layer.in_features} inputs of {name}, as "
                    "compressed-tensors has it: choose a group that does, or 0 for a row"
                )
        # Without this transformers takes the zero-points for unpacked ones (compressed-tensors 0.18 to 0.20).
        return super().settings(method, layers) | {"dequantize": True}

    def arguments(self, method: Method) -> tuple[dict, None]:
        grouped = {"strategy": "group", "group_size": method.group} if method.group else {"strategy": ROWS}
        return {"type": "int", "num_bits": method.bits, "symmetric": False} | grouped, None

    def write(self, layer: PackedLinear, settings: Mapping) -> dict[str, torch.Tensor]:
        bits, out, columns = layer.grid.bits, layer.out_features, layer.in_features
        return {
            "weight_packed": as_words(layer.weight.data, columns, bits),
            "weight_scale": layer.scale,
            "weight_zero_point": as_words(pack(layer.zero.T, bits), out, bits).T,
            "weight_shape": torch.tensor([out, columns]),
        }


class IntQuantized(CompressedTensors):
    kind, layer, parts = "int-quantized", NaiveLinear, ("weight_scale", "weight")

    def methods(self, settings: Mapping) -> list[Method]:
        if _weights(settings, "int", activations=True)["strategy"] != ROWS:
            raise ModelUnavailable("int8 weights with anything but a scale a row are not read here")
        return [Vectorwise()]

    def read(self, tensors: Mapping[str, torch.Tensor], settings: Mapping) -> NaiveLinear:
        return NaiveLinear(tensors["weight"], tensors["weight_scale"].float() * 127, None, Vectorwise())

    def holds(self, method: Method) -> bool:
        return isinstance(method, Vectorwise)

    def arguments(self, method: Method) -> tuple[dict, dict]:
        weights = {"type": "int", "num_bits": 8, "symmetric": True, "strategy": ROWS}
        return weights, {"type": "int", "strategy": "token"}

    def write(self, layer: NaiveLinear, settings: Mapping) -> dict[str, torch.Tensor]:
        return {"weight": layer.weight.data, "weight_scale": layer.absmax / 127}


class FloatQuantized(CompressedTensors):
    kind, layer, parts = "float-quantized", Fp8Linear, ("weight_scale", "weight")

    def methods(self, settings: Mapping) -> list[Method]:
        strategy = _weights(settings, "float", activations=True)["strategy"]
        if strategy not in (ROWS, TENSOR):
            raise ModelUnavailable(f"FP8 weights with a scale a {strategy} are not read here")
        return [Fp8(scale="row" if strategy == ROWS else "tensor")]

    def read(self, tensors: Mapping[str, torch.Tensor], settings: Mapping) -> Fp8Linear:
        by_row = self.methods(settings)[0].scale == "row"
        return Fp8Linear.over(tensors["weight"], tensors["weight_scale"].float().view(-1, 1), None, by_row=by_row)

    def holds(self, method: Method) -> bool:
        return isinstance(method, Fp8)

    def arguments(self, method: Method) -> tuple[dict, dict]:
        weights, activations = (ROWS, "token") if method.scale == "row" else (TENSOR, TENSOR)
        return (
            {"type": "float", "num_bits": 8, "symmetric": True, "strategy": weights},
            {"type": "float", "strategy": activations},
        )

    def write(self, layer: Fp8Linear, settings: Mapping) -> dict[str, torch.Tensor]:
        return {"weight": layer.weight.data, "weight_scale": layer.scale if layer.by_row else layer.scale.view(1)}


def _weights(settings: Mapping, kind: str, *, activations: bool) -> Mapping:
    """How the weights of a checkpoint are quantized. Raises ModelUnavailable unless all its layers are quantized alike,
    in numbers of this `kind`, and their inputs when they come, or not at all."""
    schemes = list(settings["config_groups"].values())
    weights, inputs = schemes[0]["weights"], schemes[0].get("input_activations")
    if len(schemes) > 1 or weights["type"] != kind or bool(inputs) != activations:
        raise ModelUnavailable(f"{settings['format']} of several kinds of layers is not read here")
    if inputs and not (inputs.get("dynamic") and inputs["num_bits"] == weights["num_bits"] == 8):
        raise ModelUnavailable("activations with scales that are fixed beforehand are not read here")
    return weights


def _zero(packed: torch.Tensor | None, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero-points uint8 (out, groups); versions before 0.9 stored them as they are, less 2^(bits-1)."""
    middle = 2 ** (bits - 1)
    if packed is None:
        return torch.full(scale.shape, middle, dtype=torch.uint8, device=scale.device)
    if packed.dtype == torch.int8:
        return (packed.int() + middle).to(torch.uint8)
    return unpack(as_bytes(packed.T, len(scale), bits), bits, len(scale)).T.contiguous()
