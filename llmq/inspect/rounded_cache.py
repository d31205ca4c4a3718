"""A KV cache in 8 bit: keys and values as codes, with one scale for each token and head."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer

from llmq.kernels.primitives import quantize_rows


class RoundedLayer(DynamicLayer):
    """`keys`, `values`: int8 codes (batch, heads, tokens, width); `scales`: FP16 (2, batch, heads, tokens, 1), the
    largest |x| of each token and head. What it gives back is what the codes stand for."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (x[:, :, :0].to(torch.int8) for x in (key_states, value_states))
        self.scales = key_states.new_empty((2, *key_states.shape[:2], 0, 1), dtype=torch.float16)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Add (batch, heads, new tokens, width) keys and values; return all there are, in their type."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = [_rounded(x) for x in (key_states, value_states)]
        self.keys, self.values = (
            torch.cat([old, codes], -2) for old, (codes, _) in zip((self.keys, self.values), new, strict=True)
        )
        self.scales = torch.cat([self.scales, torch.stack([scale for _, scale in new])], -2)
        kept = zip((self.keys, self.values), self.scales, strict=True)
        return tuple((codes * (scale.float() / 127)).to(key_states.dtype) for codes, scale in kept)


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the shape of x, and the largest |x| of each of its rows."""
    found = quantize_rows(x.reshape(-1, x.shape[-1]))
    return found.codes.view(x.shape), found.absmax.half().view(*x.shape[:-1], 1)


def bytes_kept(cache: Cache) -> int:
    """Bytes of all tensors that the layers of a cache keep."""
    kept = (part for layer in cache.layers for part in vars(layer).values())
    return sum(part.nbytes for part in kept if isinstance(part, torch.Tensor))


CACHES = {"FP16": DynamicLayer, "int8": RoundedLayer}


def read_with(engine, ids: list[int], layer: type[DynamicLayer]) -> tuple[torch.Tensor, int]:
    """(tokens, vocabulary) float32 logits of a text read in one call into a cache of such layers, and its bytes."""
    from llmq.engine.hf import cache_name

    cache = Cache(layer_class_to_replicate=layer)
    with torch.inference_mode():
        tokens = torch.tensor([ids], device=engine.device)
        logits = engine.model(tokens, **{cache_name(engine.model): cache}, use_cache=True).logits[0]
    return logits.float().cpu(), bytes_kept(cache)
