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
    """Parameters and buffers to count; `config` is kept for whoever asks."""

    def __init__(self, a: Architecture, config):
        super().__init__()
        self.config = config
        self.embed_tokens = _bare(nn.Embedding, a.vocabulary, a.hidden)
        self.layers = nn.ModuleList(_Layer(a) for _ in range(a.layers))
        self.norm = nn.Parameter(torch.empty(a.hidden))
        self.register_buffer("inv_freq", torch.empty(a.width // 2))
        self.register_buffer("original_inv_freq", torch.empty(a.width // 2))
        self.lm_head = _bare(nn.Linear, a.vocabulary, a.hidden)
        if a.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class _Layer(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        for name, heads in (("q_proj", a.heads), ("k_proj", a.groups), ("v_proj", a.groups)):
            setattr(self, name, _bare(nn.Linear, heads * a.width, a.hidden, bias=a.qkv_bias))
        self.o_proj = _bare(nn.Linear, a.hidden, a.heads * a.width, bias=a.output_bias)
        self.gate_proj = _bare(nn.Linear, a.inner, a.hidden)
        self.up_proj = _bare(nn.Linear, a.inner, a.hidden)
        self.down_proj = _bare(nn.Linear, a.hidden, a.inner)
        self.input_layernorm = nn.Parameter(torch.empty(a.hidden))
        self.post_attention_layernorm = nn.Parameter(torch.empty(a.hidden))


def _bare(kind: type[nn.Module], rows: int, width: int, *, bias: bool = False) -> nn.Module:
    """A module without its initialisation: drawing numbers for the meta device makes torch import its compiler, which
    takes two seconds."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.weight = nn.Parameter(torch.empty(rows, width))
    made.bias = nn.Parameter(torch.empty(rows)) if bias else None
    made.out_features, made.in_features = rows, width
    return made
