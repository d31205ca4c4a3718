"""What every method's handler answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT_THRESHOLD = 6.0  # LLM.int8() paper, section 3.2; also the default of bitsandbytes through transformers


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model under a method: `weights` counts parameters and buffers, `scales` what is kept beside them."""

    weights: int
    scales: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.scales


class Handler(Protocol):
    """One method's way with weights. `device` is a torch device string such as 'cpu' or 'cuda:0'."""

    has_threshold: bool
    dtype: str  # torch dtype name of embeddings, norms, head and activations
    default_threshold: float | None
    lean_weights: str | None  # 'dense' or 'int8': what the lean loop stores for this method; None: it cannot run it
    int8_head: bool  # whether embedding and head are int8 too
    opens_int8: bool  # whether it can start from a checkpoint of bitsandbytes' int8 weights
    converts: bool  # whether a model loaded with `load_arguments` still has to go through `convert_`

    def arithmetic(self, device: str, loop: str = "hf") -> str:
        """One plain sentence: what is stored in which type, and in which type it is multiplied on this device in this
        loop ('hf' or 'lean')."""

    def check_threshold(self, threshold: float) -> None:
        """Raises BadChoice where there is no threshold to set."""

    def load_arguments(self, device: str) -> dict[str, Any]:
        """Keyword arguments for `AutoModelForCausalLM.from_pretrained`."""

    def convert_(self, model: nn.Module, device: str) -> nn.Module:
        """Turn a dense model already on `device` into this method's, in place (models without a checkpoint)."""

    def set_threshold(self, model: nn.Module, threshold: float) -> None:
        """Change the outlier threshold of a loaded model; 0 turns the decomposition off."""

    def sixteen_bit_columns(self, module: nn.Module) -> torch.Tensor | None:
        """The columns of the input that `module`, a layer of a model of this method, multiplied in 16 bit in its last
        call, by its own account: int64, ascending, on its device. None for a layer that keeps no such account."""

    def scale_bytes(self, model: nn.Module) -> int:
        """Bytes of quantization scales that are neither parameters nor buffers of `model`."""

    def predict(self, meta_model: nn.Module) -> WeightBytes:
        """Bytes this method will need, from a dense model on the meta device."""


def stored_tensors(model: nn.Module):
    """Every parameter and buffer once; tied weights are one tensor."""
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied weights counted once."""
    return sum(tensor.nbytes for tensor in stored_tensors(model))


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point parameters and leave the buffers: rotary frequencies stay in FP32, as in a checkpoint."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def non_head_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, linear) of every linear but the output head, which LLM.int8() as transformers integrates it leaves out."""
    from torch import nn

    head = model.get_output_embeddings()
    return ((name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not head)


def int8_bytes(meta_model: nn.Module, *, head: bool = False, int8_size: int = 1, other_size: int = 2) -> WeightBytes:
    """`int8_size` bytes a weight of `non_head_linears`, with `head` of embedding and head too, and an FP32 scale a row;
    `other_size` bytes for every other parameter."""
    layers = [linear for _, linear in non_head_linears(meta_model)]
    if head:
        layers += [meta_model.get_input_embeddings(), meta_model.get_output_embeddings()]
    int8 = {id(layer.weight): layer.weight for layer in layers}
    weights = sum(
        tensor.numel() * (int8_size if id(tensor) in int8 else other_size) if tensor.requires_grad else tensor.nbytes
        for tensor in stored_tensors(meta_model)
    )
    return WeightBytes(weights, sum(4 * weight.shape[0] for weight in int8.values()))
