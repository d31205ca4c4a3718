"""A model by its configuration alone, to count bytes with: no weights, no tokenizer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import ModelUnavailable
from llmq.models import hub
from llmq.models.config import PlainConfig, plain_config
from llmq.models.loading import Source, blamed_on, config_in
from llmq.models.presets import PRESETS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

MOST_LAYERS = 1000  # of a configuration from anywhere, which would be built layer by layer


def described_config(source: Source) -> PretrainedConfig | PlainConfig:
    """Return the configuration to count bytes with, where the weights need not be here: of a hub's repository its
    config.json alone is fetched. Raises ModelUnavailable as `load_config`."""
    if source.kind == "random":
        return PlainConfig(model_type="llama", **asdict(PRESETS[source.location].shape))
    on_hub = (source.location, source.revision, source.fetching)
    folder = hub.settings(*on_hub) if source.kind == "hub" else Path(source.location)
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(f"{source.name} holds no model: it has no config.json")
    config = plain_config(folder) or config_in(folder, source)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > MOST_LAYERS:
        raise ModelUnavailable(f"{source.name} says it has {layers:,} layers; up to {MOST_LAYERS:,} are counted")
    return config


def shape_of(source: Source, config: PretrainedConfig | PlainConfig) -> nn.Module:
    """Return the model on the meta device. Raises ModelUnavailable for a configuration that makes none."""
    from llmq.models.skeleton import meta_model

    with blamed_on(source, "build the shape"):
        return meta_model(config)
