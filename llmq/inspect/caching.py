"""One more token of a text, with what the model kept of the others or by reading all of it again: seconds, operations,
bytes.

Operations are counted by PyTorch on a copy of the model that has shapes and no numbers, with attention by its math
kernel, which multiplies every pair of tokens; kernels that know the mask skip about half of them in a whole text.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmq.engine.hf import HFEngine, cache_name
from llmq.engine.timing import timer_for

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Operations:
    """The formulas of a model. `body`: parameters of the blocks' linear layers; `head`: of the output layer; `width`:
    layers · heads · the width of a head."""

    body: int
    head: int
    width: int

    @classmethod
    def of(cls, model: PreTrainedModel, heads: int, head_dim: int) -> Operations:
        head = model.get_output_embeddings()
        linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head)
        body = sum(module.weight.numel() for module in linear)
        return cls(body, head.weight.numel(), model.config.get_text_config().num_hidden_layers * heads * head_dim)

    def of_token(self, tokens: int, rows: int) -> int:
        """2 for each weight that a row meets, the output layer only for the last; 4 · width for each pair of a row and
        a token: a product for its score and one for its share of the values. With a cache a single row is new."""
        return 2 * (self.body * rows + self.head) + 4 * self.width * rows * tokens


@dataclass(frozen=True)
class Place:
    """The end of a text of which all but the last token was read before. `ids`: (1, tokens); `kept`: of the others."""

    engine: HFEngine
    ids: torch.Tensor
    kept: Cache

    @classmethod
    def after(cls, engine: HFEngine, ids: list[int]) -> Place:
        from transformers import DynamicCache

        tokens, kept = torch.tensor([ids], device=engine.device), DynamicCache(config=engine.model.config)
        with torch.inference_mode():
            engine.model(tokens[:, :-1], **{cache_name(engine.model): kept}, use_cache=True, logits_to_keep=1)
        return cls(engine, tokens, kept)

    def call(self, *, cached: bool) -> tuple[torch.Tensor, float, Cache | None]:
        """(vocabulary,) logits of the next token, the seconds of the call, and the cache after it."""
        model, kept = self.engine.model, copy.deepcopy(self.kept) if cached else None
        given = {cache_name(model): kept} if cached else {}
        with torch.inference_mode(), (timer := timer_for(self.engine.device)):
            logits = model(self.ids[:, -1:] if cached else self.ids, **given, use_cache=cached, logits_to_keep=1).logits
        return logits[0, -1].float(), timer.seconds, kept


def counted(twin: PreTrainedModel, tokens: int, *, cached: bool) -> int:
    """Floating-point operations of one more token, of which all but the last of `tokens` are kept, or none. `twin`: the
    model on the meta device."""
    from transformers import DynamicCache

    ids, kept = torch.zeros(1, tokens, dtype=torch.long, device="meta"), DynamicCache(config=twin.config)
    given = {cache_name(twin): kept, "use_cache": True, "logits_to_keep": 1}
    before = tokens - 1 if cached else 0
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        if before:
            twin(ids[:, :before], **given)
        with FlopCounterMode(display=False) as found:
            twin(ids[:, before:], **given)
    return found.get_total_flops()


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with shapes and no numbers."""
    with torch.device("meta"):
        return type(model)(model.config)


def bytes_of(kept: Cache) -> int:
    """Bytes of the keys and values in a cache."""
    return sum(part.nbytes for layer in kept.layers for part in (layer.keys, layer.values))
