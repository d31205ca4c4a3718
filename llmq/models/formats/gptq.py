"""GPTQ's format, as AutoGPTQ and GPTQModel write it and transformers' GPTQConfig opens it.

A weight (out, in) of `bits` bits in groups along its inputs:
  qweight  int32 (in · bits / 32, out): the codes of an output, one below the other, the first in the lowest bits
  qzeros   int32 (groups, out · bits / 32): the zero-points of a group, side by side
  scales   float16 (groups, out)
  g_idx    int32 (in,): the group of each input
and w = (code - zero) · scale. Format `gptq` stores zero - 1, for which a zero-point of 0 has no number of its own:
GPTQModel lets its -1 borrow from the neighbour. `gptq_v2` stores the zero-point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from llmq.errors import BadChoice, ModelUnavailable
from llmq.methods.gptq import Gptq
from llmq.methods.layers.packed_linear import Grid, PackedLinear, pack, unpack
from llmq.methods.rtn import Grouped
from llmq.models.formats.base import Format, as_bytes, as_words

if TYPE_CHECKING:
    from llmq.methods import Method

BITS = (2, 3, 4, 8)
TILE = 32  # codes: rows and columns are multiples of it
FIRST, SECOND = "gptq", "gptq_v2"


class GptqFormat(Format):
    name, parts = "gptq", ("qweight", "qzeros", "scales", "g_idx")
    layer = PackedLinear

    def describes(self, settings: Mapping) -> bool:
        return settings.get("quant_method") == "gptq"

    def methods(self, settings: Mapping) -> list[Method]:
        bits, group = settings.get("bits"), settings.get("group_size")
        if bits not in BITS or settings.get("dynamic") or _version(settings) not in (FIRST, SECOND):
            raise ModelUnavailable(f"GPTQ of {bits} bits in the format {_version(settings)!r} is not read here")
        return [Gptq(bits=bits, group=max(group, 0), act_order=bool(settings.get("desc_act")))]

    def read(self, tensors: Mapping[str, torch.Tensor], settings: Mapping) -> PackedLinear:
        method = self.methods(settings)[0]
        scale = tensors["scales"].T.contiguous()
        out, columns = len(scale), tensors["qweight"].shape[0] * 32 // method.bits
        codes = as_bytes(tensors["qweight"].T, columns, method.bits)
        zero = unpack(as_bytes(tensors["qzeros"], out, method.bits), method.bits, out).T
        if _version(settings) == FIRST:
            zero = zero + 1 & 2**method.bits - 1
        layer = PackedLinear.over(codes, columns, scale, zero.contiguous(), Grid(method.bits, method.group), None)
        layer.owners = _owners(tensors.get("g_idx"), layer.grid, columns)
        return layer

    def holds(self, method: Method) -> bool:
        return isinstance(method, Grouped) and method.bits in BITS

    def settings(self, method: Method, layers: Mapping[str, PackedLinear]) -> dict:
        for name, layer in layers.items():
            out, columns = layer.out_features, layer.in_features
            if columns % (layer.grid.group or TILE) or columns % TILE or out % TILE:
                raise BadChoice(
                    f"GPTQ's format takes outputs in multiples of {TILE}, inputs in multiples of {TILE} and of the "
                    f"group, and {name} is {out} x {columns} in groups of {layer.grid.group or columns}: choose "
                    "another group or --format compressed-tensors"
                )
        version = SECOND if any((layer.zero == 0).any() for layer in layers.values()) else FIRST
        act_order = getattr(method, "act_order", False)
        return {
            "quant_method": "gptq",
            "bits": method.bits,
            "group_size": method.group or -1,
            "sym": False,
            "desc_act": act_order,
            "static_groups": act_order,
            "checkpoint_format": version,
            "lm_head": False,
        }

    def write(self, layer: PackedLinear, settings: Mapping) -> dict[str, torch.Tensor]:
        bits, out, columns = layer.grid.bits, layer.out_features, layer.in_features
        zero = layer.zero.long() - int(settings["checkpoint_format"] == FIRST)
        return {
            "qweight": as_words(layer.weight.data, columns, bits).T,
            "qzeros": as_words(pack(zero.T, bits), out, bits),
            "scales": layer.scale.T,
            "g_idx": _neighbours(layer.grid, columns),
        }


def _version(settings: Mapping) -> str:
    return settings.get("checkpoint_format") or FIRST


def _neighbours(grid: Grid, columns: int) -> torch.Tensor:
    """The group of each input where a group is `grid.group` neighbours: int32 (in,)."""
    return (torch.arange(columns) // (grid.group or columns)).int()


def _owners(owners: torch.Tensor | None, grid: Grid, columns: int) -> torch.Tensor | None:
    """None where groups are neighbours, as a layer has it."""
    if owners is None or torch.equal(owners.cpu(), _neighbours(grid, columns)):
        return None
    return owners.long()
