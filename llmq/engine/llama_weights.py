"""A LLaMA's weights as the lean loop needs them: q, k, v in one matrix, gate and up in one, int8 where the method says.

Tensors come one at a time from a source and go straight to their final place, so that the device never holds more than
the finished model and the tensor in hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from llmq.errors import ModelUnavailable
from llmq.kernels.primitives import Int8Weight
from llmq.methods import Method
from llmq.models.architecture import Architecture, matrices

Weight = torch.Tensor | Int8Weight


class Form:
    """How finished matrices and vectors are stored: as they are, or in another layout where `library.Packing` stands in
    its place. `paired`: gate rows, then up rows."""

    def matrix(self, weight: Weight, *, paired: bool = False) -> Weight:
        return weight

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        return values


class Tensors(Protocol):
    """Where weights come from, by their names in the checkpoint."""

    def __contains__(self, name: str) -> bool: ...
    def get(self, name: str, device: str) -> torch.Tensor:
        """Return the tensor on `device`, contiguous; not kept by the source."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `qkv`: (qkv_rows, hidden_size); `gate_up`: (2·intermediate_size, hidden_size), gate first."""

    attention_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    output: Weight
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: Weight
    down: Weight

    @property
    def matrices(self) -> tuple[Weight, ...]:
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True)
class LlamaWeights:
    """`embedding`, `head`: (vocab_size, hidden_size); one object where they are tied."""

    architecture: Architecture
    embedding: Weight
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.norm.dtype

    def parts(self) -> Iterator[Weight]:
        """Yield every weight once; a tied head is the embedding."""
        yield self.embedding
        for layer in self.layers:
            yield from (part for part in vars(layer).values() if part is not None)
        yield self.norm
        if self.head is not self.embedding:
            yield self.head

    @property
    def weight_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts()) - self.scale_bytes

    @property
    def scale_bytes(self) -> int:
        scales = (getattr(part, "absmax", None) for part in self.parts())
        return sum(scale.nbytes for scale in scales if scale is not None)

    @property
    def read_bytes_per_token(self) -> int:
        """Bytes of weights and scales that one decode step reads; of an untied input embedding it reads one row."""
        apart = 0 if self.head is self.embedding else self.embedding.nbytes
        return self.weight_bytes + self.scale_bytes - apart


def load_weights(
    source: Tensors,
    architecture: Architecture,
    method: Method,
    device: str,
    *,
    kernels,
    form: Form | None = None,
) -> LlamaWeights:
    """Build the weights from `source` under `method`, tensor by tensor. `kernels` offers `quantize_rows`."""
    dtype, int8 = getattr(torch, method.dtype), method.packed == "int8"
    a, prefix = architecture, "model." if "model.norm.weight" in source else ""  # none in a decoder saved by itself
    parts = [matrices(f"{prefix}layers.{i}.") for i in range(a.layers)]
    kept = frozenset(method.kept(name for layer in parts for names in layer for name in names))
    made = _Maker(source, dtype, int8, device, kernels, form or Form(), kept)
    ends = replace(made, int8=method.int8_head)
    names = _ends(source, prefix + "embed_tokens", device if architecture.tied else None)
    embedding, *head = [ends.linear([name], a.vocab_size, a.hidden_size) for name in names]
    layers = tuple(_layer(made, f"{prefix}layers.{i}.", a) for i in range(a.layers))
    norm = made.vector(prefix + "norm.weight", size=a.hidden_size)
    return LlamaWeights(a, embedding, layers, norm, head[0] if head else embedding)


def _ends(source: Tensors, embedding: str, tied_on: str | None) -> list[str]:
    """The names of embedding and head; one where they are tied (compared on the device `tied_on`): as in transformers,
    a tied pair may be there under either name, and one whose halves differ is none."""
    there = [name for name in (embedding, "lm_head") if f"{name}.weight" in source]
    if tied_on is None or not there:
        return [embedding, "lm_head"]
    same = len(there) == 2 and torch.equal(*(source.get(f"{name}.weight", tied_on) for name in there))
    return there[:1] if same else there


def _layer(made: _Maker, prefix: str, architecture: Architecture) -> Layer:
    a = architecture
    qkv, output, gate_up, down = matrices(prefix)
    qkv_biases, output_bias = [f"{name}.bias" for name in qkv], f"{output[0]}.bias"
    return Layer(
        attention_norm=made.vector(prefix + "input_layernorm.weight", size=a.hidden_size),
        qkv=made.linear(qkv, a.qkv_rows, a.hidden_size),
        qkv_bias=made.vector(*qkv_biases, size=a.qkv_rows) if a.qkv_bias else None,
        output=made.linear(output, a.hidden_size, a.heads * a.head_dim),
        output_bias=made.vector(output_bias, size=a.hidden_size) if a.output_bias else None,
        mlp_norm=made.vector(prefix + "post_attention_layernorm.weight", size=a.hidden_size),
        gate_up=made.linear(gate_up, 2 * a.intermediate_size, a.hidden_size, paired=True),
        down=made.linear(down, a.hidden_size, a.intermediate_size),
    )


@dataclass(frozen=True)
class _Maker:
    source: Tensors
    dtype: torch.dtype
    int8: bool
    device: str
    kernels: object
    form: Form
    kept: frozenset[str]  # names of linear layers that are not int8

    def vector(self, *names: str, size: int) -> torch.Tensor:
        """Concatenate the named vectors, `size` numbers together."""
        parts = [self.source.get(name, self.device).to(self.dtype) for name in names]
        if (found := sum(part.numel() for part in parts)) != size:
            raise ModelUnavailable(f"{', '.join(names)}: {found} numbers; the configuration says {size}")
        return self.form.vector(parts[0] if len(parts) == 1 else torch.cat(parts))

    def linear(self, names: list[str], rows: int, in_features: int, *, paired: bool = False) -> Weight:
        return self.form.matrix(self._joined(names, rows, in_features), paired=paired)

    def _joined(self, names: list[str], rows: int, in_features: int) -> Weight:
        """The named matrices below one another: all of them int8, or none."""
        if not self.int8 or self.kept.issuperset(names):
            if len(names) == 1:
                [(_, part, _)] = self._placed(names, rows, in_features)
                return part.to(self.dtype)
            made = torch.empty(rows, in_features, dtype=self.dtype, device=self.device)
            for place, part, _ in self._placed(names, rows, in_features):
                made[place] = part
            return made
        codes = torch.empty(rows, in_features, dtype=torch.int8, device=self.device)
        absmax = torch.empty(rows, dtype=torch.float32, device=self.device)
        for place, part, name in self._placed(names, rows, in_features):
            if part.dtype == torch.int8:  # a checkpoint of int8 weights has the scales beside them
                codes[place] = part
                absmax[place].copy_(self.source.get(f"{name}.SCB", self.device).view(len(part)))
            else:
                self.kernels.quantize_rows(part, Int8Weight(codes[place], absmax[place]))
        return Int8Weight(codes, absmax)

    def _placed(self, names: list[str], rows: int, in_features: int) -> Iterator[tuple[slice, torch.Tensor, str]]:
        at, stated = 0, f"the configuration says ({rows}, {in_features})"
        for name in names:
            part = self.source.get(f"{name}.weight", self.device)
            if part.shape[1] != in_features or at + part.shape[0] > rows:
                raise ModelUnavailable(f"{name}.weight is {tuple(part.shape)}; {stated} for {', '.join(names)}")
            yield slice(at, at + part.shape[0]), part, name
            at += part.shape[0]
        if at != rows:
            raise ModelUnavailable(f"{', '.join(names)}: {at} rows; {stated}")
