"""NF4 by bitsandbytes: 4-bit codes that stand for 16 quantiles of a normal distribution, a scale for 64 numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from llmq.methods.base import Method, WeightBytes
from llmq.methods.rounding import NF4_BLOCK as BLOCK
from llmq.methods.rounding import NormalFloat, Rounding

if TYPE_CHECKING:
    import torch
    from torch import nn

PACKED_ROWS = 32  # of a weight, which bitsandbytes keeps together on a CPU that multiplies BF16


@dataclass(frozen=True)
class Nf4(Method):
    name, label = "nf4", "NF4 · bitsandbytes"
    about = (
        "4-bit weights whose 16 values are quantiles of a normal distribution, with a scale for every 64 numbers, "
        "unpacked to 16 bit where they are multiplied."
    )
    source = "Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3"
    bits = 4
    dtype = "bfloat16"

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        return "NF4 linear weights, unpacked to BF16; BF16 embedding, norms, head and activations"

    def load_arguments(self, device: str) -> dict[str, Any]:
        """On a GPU bitsandbytes quantizes weight by weight on the way in."""
        import torch
        from transformers import BitsAndBytesConfig

        if device.startswith("cpu"):
            return super().load_arguments(device)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        return super().load_arguments(device) | {"quantization_config": config}

    def quantize_(self, model: nn.Module, device: str, statistics: Mapping[str, torch.Tensor] | None = None):
        """As every method does, unless bitsandbytes did on the way in."""
        import bitsandbytes as bnb

        done = any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
        return model.eval() if done else super().quantize_(model, device, statistics)

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        """A Linear4bit with the weight of `linear`."""
        import bitsandbytes as bnb
        import torch

        with torch.device("meta"):
            made = _linear_class()(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.bfloat16
            )
        made.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=False,
            quant_type="nf4",
            blocksize=BLOCK,
            module=made,
        ).to(linear.weight.device)
        made.bias = linear.bias
        return made.eval()

    def rounding(self, *, weight: bool) -> Rounding | None:
        return NormalFloat() if weight else None

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        numbers = shape[0] * shape[1]
        return WeightBytes(-(-numbers // 2), 4 * -(-numbers // BLOCK))

    def scale_bytes(self, model: nn.Module) -> int:
        states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
        return sum(state.absmax.nbytes for state in states if state is not None)


@cache
def _linear_class() -> type:
    import bitsandbytes as bnb
    import torch

    class Nf4Linear(bnb.nn.LinearNF4):
        """Right for every shape on a CPU, too: bitsandbytes 0.50 unpacks rows that are no whole blocks wrongly with
        AVX-512, and asserts that rows come in packs where it multiplies BF16."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.is_cuda or not (self.in_features % BLOCK or self.out_features % PACKED_ROWS):
                return super().forward(x)
            flat = copy.copy(self.weight.quant_state)
            flat.shape = torch.Size([self.weight.quant_state.shape.numel()])
            weight = bnb.functional.dequantize_4bit(self.weight.data, flat).view(self.out_features, self.in_features)
            y = torch.nn.functional.linear(x.to(weight.dtype), weight)
            return (y if self.bias is None else y + self.bias).to(x.dtype)

    return Nf4Linear


def levels() -> torch.Tensor:
    """The 16 numbers that a code of 4 bits stands for, before its scale, ascending, as bitsandbytes has them."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device="cpu")
