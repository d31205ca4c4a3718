"""A LLaMA's configuration read from `config.json` alone, because importing transformers' takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from llmq.models.architecture import Unsupported, architecture_of

ENDLESS = 2**31  # positions of a model whose configuration states no limit

# Without one of these transformers would fill in its own, which differ between models and versions.
STATED = {"eos_token_id", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"}
STATED |= {"num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"}

# What changes the tokens that transformers' `generate` writes, and nothing here looks at.
REWRITING = {"repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"}
REWRITING |= {"forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens", "sequence_bias"}
REWRITING |= {"guidance_scale", "penalty_alpha", "stop_strings", "min_p", "typical_p", "num_beams"}


class PlainConfig(SimpleNamespace):
    """The part of a `PretrainedConfig` that is used here: its entries as attributes."""

    def to_dict(self) -> dict:
        return dict(vars(self))

    def get_text_config(self) -> PlainConfig:
        return self


def plain_config(folder: Path) -> PlainConfig | None:
    """Return the configuration in `folder` if the lean loop can compute it and it says all it must; else None."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not STATED <= values.keys():
            return None
        if not (values.get("rope_theta") or (values.get("rope_parameters") or {}).get("rope_theta")):
            return None
        if values.get("model_type") == "mistral" and "sliding_window" not in values:
            return None
        architecture_of(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, Unsupported):
        return None  # whatever is wrong with it, transformers says so
    return PlainConfig(**{"dtype": values.get("torch_dtype")} | values)


def quantization_of(config) -> dict:
    """Return what a configuration says of quantized weights; {} where they are not quantized."""
    settings = getattr(config, "quantization_config", None) or {}
    return settings if isinstance(settings, dict) else settings.to_dict()


def context_of(config) -> int:
    """Return the most tokens that a model's positions allow; without end where its configuration states no limit."""
    return int(getattr(config, "max_position_embeddings", ENDLESS))


def heads_of(config) -> tuple[int, int, int]:
    """Return how many heads ask, how many of keys and values they share (GQA: fewer), and the width of each. Raises
    AttributeError, KeyError or RuntimeError where the layers differ in them."""
    heads = config.num_attention_heads
    alone = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    kv_heads = 1 if alone else getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def generation_settings(folder: Path) -> dict:
    """Return what `generation_config.json` in `folder` says, {} without one. Raises ValueError if it is not JSON."""
    path = folder / "generation_config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def ignored_settings(folder: Path) -> tuple[str, ...]:
    """Return the generation settings of the model in `folder` that no engine here follows, as 'repetition_penalty
    1.05': with one of them, greedy tokens need not be those of transformers' `generate`."""
    found = ((name, value) for name, value in generation_settings(folder).items() if name in REWRITING)
    return tuple(f"{name} {value}" for name, value in found if value not in (None, 0, 1, [], {}))
