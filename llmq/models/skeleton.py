"""A model's tensors without storage; a LLaMA's are made without transformers, whose import takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llmq.models.architecture import Architecture, architecture_of
from llmq.models.config import PlainConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def meta_model(config: PretrainedConfig | PlainConfig) -> nn.Module:
    """Build the model of `config` on the meta device: shapes and no storage."""
    with torch.device("meta"):
        if isinstance(config, PlainConfig):
            return Skeleton(architecture_of(config.to_dict()), config)
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


class Skeleton(nn.Module):
    """Parameters and buffers to count, under a LLaMA's names; `config` is kept, as in transformers."""

    def __init__(self, a: Architecture, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = _bare(nn.Embedding, a.vocab_size, a.hidden_size)
        self.model.layers = nn.ModuleList(_layer(a) for _ in range(a.layers))
        self.model.norm = nn.Parameter(torch.empty(a.hidden_size))
        self.register_buffer("inv_freq", torch.empty(a.head_dim // 2))
        self.register_buffer("original_inv_freq", torch.empty(a.head_dim // 2))
        self.lm_head = _bare(nn.Linear, a.vocab_size, a.hidden_size)
        if a.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def _layer(a: Architecture) -> nn.Module:
    made = nn.Module()
    made.self_attn, made.mlp = nn.Module(), nn.Module()
    for name, heads in (("q_proj", a.heads), ("k_proj", a.kv_heads), ("v_proj", a.kv_heads)):
        setattr(made.self_attn, name, _bare(nn.Linear, heads * a.head_dim, a.hidden_size, bias=a.qkv_bias))
    made.self_attn.o_proj = _bare(nn.Linear, a.hidden_size, a.heads * a.head_dim, bias=a.output_bias)
    made.mlp.gate_proj = _bare(nn.Linear, a.intermediate_size, a.hidden_size)
    made.mlp.up_proj = _bare(nn.Linear, a.intermediate_size, a.hidden_size)
    made.mlp.down_proj = _bare(nn.Linear, a.hidden_size, a.intermediate_size)
    made.input_layernorm = nn.Parameter(torch.empty(a.hidden_size))
    made.post_attention_layernorm = nn.Parameter(torch.empty(a.hidden_size))
    return made


def _bare(kind: type[nn.Module], out_features: int, in_features: int, *, bias: bool = False) -> nn.Module:
    """A module without its initialisation: drawing numbers for the meta device makes torch import its compiler, which
    takes two seconds."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.weight = nn.Parameter(torch.empty(out_features, in_features))
    made.bias = nn.Parameter(torch.empty(out_features)) if bias else None
    made.out_features, made.in_features = out_features, in_features
    return made
