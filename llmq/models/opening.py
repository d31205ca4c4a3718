"""A model opened once: everything that a name stands for, to compute with it or to count its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from llmq.events import Progress
from llmq.models import described, loading
from llmq.models.checkpoint import stamps
from llmq.models.config import context_of, ignored_settings
from llmq.models.edits import Edit
from llmq.models.loading import Source
from llmq.models.presets import PRESETS
from llmq.models.text import encode_prompt

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from llmq.models.config import PlainConfig

BLOCK_BYTES = 1 << 24  # read at a time


def open_model(name: str, *, random_weights: bool = False) -> Model:
    """Find the model that `name` means: a preset, a hub id or a local folder; with `random_weights` a preset's shape.

    Its files are read when they are asked for; `prepare()` fetches what is missing. Raises BadChoice for a name that
    means nothing.
    """
    return Model(loading.resolve(name, random_weights=random_weights))


def describe_model(name: str) -> Model:
    """Find a model to count its bytes, weights or no weights: a preset's shape, or the configuration of a hub id or a
    local folder. Raises BadChoice as `open_model`."""
    name = str(name or "").strip()
    return Model(loading.resolve(name, random_weights=name in PRESETS), described=True)


@dataclass(frozen=True)
class Model:
    """One model. Equal where source and edit are; everything else is read once. `described`: by its configuration
    alone, to count and not to run."""

    source: Source
    described: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    def prepare(self) -> Iterator[Progress]:
        """Fetch or convert what is missing, yielding progress. Raises UserError naming what to do."""
        return loading.prepare(self.source)

    def read_ahead(self) -> None:
        """Read the weights' files once, so that the system has them in memory when they are loaded."""
        for path in loading.folder_of(self.source).glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.read(BLOCK_BYTES):
                    pass

    def edited(self, edit: Edit | None) -> Model:
        """Return the same model with changed weights."""
        return Model(replace(self.source, edit=edit))

    @cached_property
    def config(self) -> PretrainedConfig | PlainConfig:
        """The configuration. Raises ModelUnavailable where the files are missing or make no model."""
        return (described.described_config if self.described else loading.load_config)(self.source)

    @property
    def fingerprint(self) -> str:
        """A name for exactly these weights: the same files, the same edit."""
        facts = [self.source, loading.revision_of(self.source)]
        if self.source.kind == "folder":
            facts += stamps(sorted(loading.folder_of(self.source).glob("*.safetensors")))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def context(self) -> int:
        """The most tokens, prompt and answer together, that the model's positions allow."""
        return context_of(self.config)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return loading.load_tokenizer(self.source)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return loading.eos_ids_of(self.source, self.config)

    @property
    def ignored_settings(self) -> tuple[str, ...]:
        """Generation settings that our answers do not follow, such as 'repetition_penalty 1.05'."""
        return () if self.source.kind == "random" else ignored_settings(loading.folder_of(self.source))

    def encode(self, prompt: str, *, new_tokens: int = 0) -> list[int]:
        """Return token ids of `prompt` as the user's turn of the chat template. Raises BadChoice where it is empty or
        leaves no room for `new_tokens` in the context."""
        ids = encode_prompt(self.tokenizer, prompt, context=self.context - new_tokens)
        return loading.ids_within(self.config, ids)

    def tokenize(self, text: str) -> list[int]:
        """Return token ids of `text` as it is, without a template or special tokens."""
        return loading.ids_within(self.config, self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def tensors(self):
        """Return the weights, one at a time, by their names in the checkpoint: `name in t`, `t.get(name, device)`."""
        return loading.open_tensors(self.source)

    @cached_property
    def shape(self) -> nn.Module:
        """The model on the meta device: shapes and no storage."""
        return described.shape_of(self.source, self.config)
