"""One token through a LLaMA: a fixed sequence of kernels over fixed buffers, so that a GPU can replay it as a graph;
and the whole prompt in one call: products of many rows, for the library's matrix products.

Nothing in a step depends on the host: the token, the position and the length are read on the device, and the chosen
token is where the next step looks for it. A prompt is read in one call, not in chunks: LLM.int8() pools outlier columns
over the rows of a call, so chunks would change results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from llmq.engine.base import Interrupted
from llmq.engine.llama import rope_table
from llmq.engine.llama_weights import LlamaWeights, Weight
from llmq.kernels.buffers import TALLY, Cache, NotedVector, Noting, Partials, SplitVector
from llmq.kernels.primitives import Int8Weight
from llmq.models.architecture import Architecture


class Decoder:
    """The buffers of a generation of up to `capacity` positions, and the step that fills them.

    `threshold`: float for LLM.int8(), None where activations keep their 16 bits.
    """

    can_be_captured = True  # as a graph: nothing in a step asks the host

    def __init__(self, weights: LlamaWeights, kernels, *, capacity: int, threshold: float | None, device: str):
        self.weights, self.kernels = weights, kernels
        self.capacity, self.threshold, self.device = capacity, threshold, device
        a, dtype = weights.architecture, weights.dtype

        def zeros(size: int | tuple[int, ...], kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=kind, device=device)

        shape = (a.kv_heads, capacity, a.head_dim)
        self.caches = [Cache(zeros(shape), zeros(shape)) for _ in range(a.layers)]
        self.rope = rope_table(a, capacity, device)
        self.token, self.position = zeros(1, torch.int64), zeros(1, torch.int64)
        self.chosen = zeros(2, torch.float64)
        self.logits = zeros(a.vocab_size, torch.float32)
        self._hidden, self._normed = zeros(a.hidden_size), zeros(a.hidden_size)
        self._qkv, attended, inner = map(zeros, (a.qkv_rows, a.heads * a.head_dim, a.intermediate_size))
        self._scratch = Partials.empty(a.heads, a.head_dim, capacity, device)
        self._split = self._tallies = None
        if threshold is not None:
            self._split, self._tallies = SplitVector.empty(a.hidden_size, device), zeros((2, TALLY), torch.int32)
            attended = NotedVector.empty(attended, threshold, self._tallies[0])
            inner = NotedVector.empty(inner, threshold, self._tallies[1])
        self._attended, self._inner = attended, inner

    @property
    def kv_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @property
    def workspace_bytes(self) -> int:
        buffers = [self.rope, self.logits, self._hidden, self._normed, self._qkv, self._attended, self._inner]
        return sum(part.nbytes for part in (*buffers, self._scratch, *filter(None, (self._split,))))

    def step(self) -> None:
        """Feed `token` at `position`; afterwards `logits` are the next token's and `position` is one more."""
        kernels, weights = self.kernels, self.weights
        hidden = self._hidden
        kernels.embed(weights.embedding, self.token, hidden.view(1, -1))
        for layer, cache in zip(weights.layers, self.caches, strict=True):
            x = self._norm(hidden, layer.attention_norm, layer.qkv, empty=self._tallies)
            kernels.product(x, layer.qkv, self._qkv, bias=layer.qkv_bias)
            attended = self._for(layer.output, self._attended)
            kernels.attend(self._qkv, cache, self.rope, self.position, attended, self._scratch)
            kernels.product(attended, layer.output, hidden, bias=layer.output_bias, residual=hidden)
            x = self._norm(hidden, layer.mlp_norm, layer.gate_up)
            inner = self._for(layer.down, self._inner)
            kernels.product(x, layer.gate_up, inner, gated=True)
            kernels.product(inner, layer.down, hidden, residual=hidden)
        self.score(hidden)
        self.position.add_(1)  # torch's, so that no kernel of the next step reads an old one: see `triton.launch`

    def read(
        self, ids: torch.Tensor, *, used: torch.Tensor | None = None, stopped: Callable[[], bool] | None = None
    ) -> None:
        """Fill the empty caches from a prompt, as `read_prompt` does; afterwards `logits` are the next token's."""
        hidden = read_prompt(
            self.weights, self.kernels, ids, self.caches, self.rope,
            threshold=self.threshold, used=used, stopped=stopped,
        )  # fmt: skip
        if used is None:
            self.score(hidden[-1])
            self.position.fill_(len(ids))
        else:
            self.score(hidden.index_select(0, used - 1).view(-1))
            self.position.copy_(used)

    def score(self, hidden: torch.Tensor) -> None:
        """Compute `logits` from the last layer's output (hidden_size,)."""
        head = self.weights.head
        x = self._norm(hidden, self.weights.norm, head)
        self.kernels.product(x, head, self.logits)

    def _splits(self, weight: Weight) -> bool:
        """Whether what `weight` is multiplied with is decomposed."""
        return self.threshold is not None and isinstance(weight, Int8Weight)

    def _norm(
        self, x: torch.Tensor, norm_weight: torch.Tensor, weight: Weight, *, empty: torch.Tensor | None = None
    ) -> torch.Tensor | SplitVector:
        """RMSNorm, in the form that `weight` is multiplied with; `empty` as in `reference.norm`."""
        eps = self.weights.architecture.eps
        if self._splits(weight):
            self.kernels.norm_split(x, norm_weight, eps, self.threshold, self._split, empty=empty)
            return self._split
        self.kernels.norm(x, norm_weight, eps, self._normed, empty=empty)
        return self._normed

    def _for(self, weight: Weight, x: torch.Tensor | NotedVector) -> torch.Tensor | NotedVector:
        """What is written to be multiplied with `weight`: with notes, or the activations alone."""
        return x.x if isinstance(x, NotedVector) and not self._splits(weight) else x


def read_prompt(
    weights: LlamaWeights,
    kernels,
    ids: torch.Tensor,
    caches: Sequence[Cache],
    rope: torch.Tensor,
    *,
    threshold: float | None,
    used: torch.Tensor | None = None,
    stopped: Callable[[], bool] | None = None,
    outlier_marks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill empty `caches` from `ids` (tokens,); returns what the final norm gets, (tokens, hidden).

    `used`: int32 (1,), how many of `ids` are the prompt's where the rest only fills a captured graph's shape: those
    rows mean nothing and change nothing else.

    `stopped` is asked in every layer, so a long prompt can be given up (raises Interrupted). `outlier_marks`:
    int8 zeros (4·layers, widest input): 1 where a column of the inputs of q/k/v, output, gate/up and down of each layer
    in turn is multiplied in 16 bit.
    """
    outlier_marks = outlier_marks_for(weights.architecture, ids.device) if outlier_marks is None else outlier_marks
    assert len(weights.layers) == len(caches) == len(outlier_marks) / 4
    layers = iter(caches)

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        if stopped and stopped():
            raise Interrupted
        return _attend(*kernels.append_rows(qkv, next(layers), rope, 0))

    noting = (Noting(threshold, marks, used) for marks in outlier_marks)
    return through_layers(weights, kernels, ids, noting, attend)


def through_layers(
    weights: LlamaWeights,
    kernels,
    ids: torch.Tensor,
    noting: Iterator[Noting],
    attend: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Take `ids` (rows,) through the layers, as many rows in each call; returns what the final norm gets, (rows,
    hidden). `noting`: of the inputs of q/k/v, output, gate/up and down of each layer in turn, where their weights are
    int8. `attend`: from the queries, keys and values of a layer, (rows, qkv_rows), to (rows, heads·head_dim)."""
    a = weights.architecture
    hidden = torch.empty(len(ids), a.hidden_size, dtype=weights.dtype, device=ids.device)
    kernels.embed(weights.embedding, ids, hidden)

    def noted(weight: Weight) -> Noting:
        found = next(noting)
        return found if isinstance(weight, Int8Weight) else replace(found, threshold=None)

    for layer in weights.layers:
        rows = kernels.norm_rows(hidden, layer.attention_norm, a.eps, noted(layer.qkv))
        attended = attend(kernels.linear_rows(rows, layer.qkv, bias=layer.qkv_bias))
        rows = kernels.plain_rows(attended, noted(layer.output))
        kernels.linear_rows(rows, layer.output, bias=layer.output_bias, residual=hidden)
        rows = kernels.norm_rows(hidden, layer.mlp_norm, a.eps, noted(layer.gate_up))
        rows = kernels.gated_rows(rows, layer.gate_up, noted(layer.down))
        kernels.linear_rows(rows, layer.down, residual=hidden)
    return hidden


def outlier_marks_for(architecture: Architecture, device: torch.device | str) -> torch.Tensor:
    """Return zeros for the `outlier_marks` of a prompt."""
    a = architecture
    return torch.zeros(4 * a.layers, a.widest_input, dtype=torch.int8, device=device)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attend causally: (heads, rows, head_dim), twice (kv_heads, rows, head_dim) -> (rows, heads·head_dim)."""
    y = functional.scaled_dot_product_attention(
        queries[None], keys[None], values[None], is_causal=True, enable_gqa=keys.shape[0] != queries.shape[0]
    )
    return y[0].transpose(0, 1).reshape(queries.shape[1], -1)
