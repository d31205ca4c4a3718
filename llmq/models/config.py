"""A LLaMA's configuration read from its `config.json` alone, because importing transformers' takes seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmq.models.architecture import Unsupported, architecture_of

# Without one of these transformers would fill in its own, which differ between models and versions.
STATED = {"eos_token_id", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"}
STATED |= {"num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"}


@dataclass(frozen=True)
class PlainConfig:
    """What is asked of a `PretrainedConfig` here: its entries as attributes."""

    values: Mapping

    def __getattr__(self, name: str):
        if name == "values" or name.startswith("__"):  # asked for before there is any, by whoever copies
            raise AttributeError(name)
        if name == "dtype":
            return self.values.get("dtype", self.values.get("torch_dtype"))
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict:
        return dict(self.values)

    def get_text_config(self) -> PlainConfig:
        return self


def plain_config(folder: Path) -> PlainConfig | None:
    """The configuration in `folder` if the lean loop can compute it and it says all it must; else None."""
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
    return PlainConfig(values)
