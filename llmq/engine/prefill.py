"""The whole prompt through a LLaMA in one call: products of many rows, for the library's matrix products.

One call, not chunks: LLM.int8() pools outlier columns over the rows of a call, so chunks would change results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from llmq.engine.base import Interrupted
from llmq.engine.llama_weights import LlamaWeights
from llmq.kernels.buffers import Cache, Noting
from llmq.models.architecture import Architecture


def read_prompt(
    weights: LlamaWeights,
    architecture: Architecture,
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

    `stopped` is asked before every layer, so a long prompt can be given up (raises Interrupted). `outlier_marks`:
    int8 zeros (4·layers, widest input): 1 where a column of the inputs of q/k/v, output, gate/up and down of each layer
    in turn is multiplied in 16 bit.
    """
    a = architecture
    hidden = torch.empty(len(ids), a.hidden_size, dtype=weights.dtype, device=ids.device)
    kernels.embed(weights.embedding, ids, hidden)
    outlier_marks = outlier_marks_for(a, ids.device) if outlier_marks is None else outlier_marks
    noting = (Noting(threshold, marks, used) for marks in outlier_marks)
    for layer, cache in zip(weights.layers, caches, strict=True):
        if stopped and stopped():
            raise Interrupted
        rows = kernels.norm_rows(hidden, layer.attention_norm, a.eps, next(noting))
        qkv = kernels.linear_rows(rows, layer.qkv, bias=layer.qkv_bias)
        attended = _attend(*kernels.append_rows(qkv, cache, rope, 0))
        rows = kernels.plain_rows(attended, next(noting))
        kernels.linear_rows(rows, layer.output, bias=layer.output_bias, residual=hidden)
        rows = kernels.norm_rows(hidden, layer.mlp_norm, a.eps, next(noting))
        rows = kernels.gate_rows(kernels.linear_rows(rows, layer.gate_up), next(noting))
        kernels.linear_rows(rows, layer.down, residual=hidden)
    return hidden


def outlier_marks_for(architecture: Architecture, device: torch.device | str) -> torch.Tensor:
    """Return zeros for the `outlier_marks` of a prompt."""
    a = architecture
    widest = max(a.hidden_size, a.intermediate_size, a.heads * a.head_dim)
    return torch.zeros(4 * a.layers, widest, dtype=torch.int8, device=device)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attend causally: (heads, rows, head_dim), twice (kv_heads, rows, head_dim) -> (rows, heads·head_dim)."""
    y = functional.scaled_dot_product_attention(
        queries[None], keys[None], values[None], is_causal=True, enable_gqa=keys.shape[0] != queries.shape[0]
    )
    return y[0].transpose(0, 1).reshape(queries.shape[1], -1)
