"""Observe a model's activation outliers over one prompt; the whole public interface of outlier statistics.

`observe` runs the model; `OutlierRecorder` records whatever the caller runs; an `OutlierReport` answers the rest from
stored numbers. The report and its views import no torch: take them from their own modules where that matters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llmq.errors import BadChoice
from llmq.inspect.recorder import Account, OutlierRecorder, Stopped
from llmq.inspect.report import THRESHOLDS, ModuleOutliers, OutlierReport, PhaseStatistics, TokenMap
from llmq.inspect.views import ChannelMap, StrongChannel, layer_channel_map, strongest_channels

__all__ = [
    "THRESHOLDS",
    "ChannelMap",
    "ModuleOutliers",
    "OutlierRecorder",
    "OutlierReport",
    "PhaseStatistics",
    "Stopped",
    "StrongChannel",
    "TokenMap",
    "layer_channel_map",
    "observe",
    "strongest_channels",
]


def observe(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    new_tokens: int = 0,
    stop: threading.Event | None = None,
    threshold: float = 6.0,
    lowest_threshold: float = 2.0,
    token_text: Callable[[int], str] = str,
    name: str = "",
    method: str = "",
    account: Account | None = None,
) -> OutlierReport:
    """Run a prompt and up to `new_tokens` greedy tokens through a Hugging Face causal LM and report its outliers.

    `input_ids`: (1, tokens) int64. Every generated token is run through the model, and has its columns; an end-of-text
    token ends the loop and is not run. The model runs in eval mode, as bitsandbytes quantizes activations only there,
    and is put back. `stop` ends it within one layer; the report then says `stopped`.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise BadChoice(f"input_ids of shape {tuple(input_ids.shape)} must be (1, tokens)")
    stopped = False
    token_ids = input_ids[0].tolist()
    with _eval_mode(model), torch.inference_mode():
        with OutlierRecorder(model, lowest_threshold=lowest_threshold, stop=stop, account=account) as recorder:
            try:
                for token_id in _greedy(model, input_ids, recorder, new_tokens):
                    token_ids.append(token_id)
            except Stopped:
                stopped = True
    texts = [token_text(token_id) for token_id in token_ids]
    return recorder.report(model=name, method=method, threshold=threshold, token_texts=texts, stopped=stopped)


def _greedy(model: nn.Module, input_ids: torch.Tensor, recorder: OutlierRecorder, new_tokens: int) -> Iterator[int]:
    """Yield each generated token's id once it has run through the model; the phases are told to `recorder`."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list | tuple) else {ends}
    recorder.phase("prefill")
    out = model(input_ids.to(model.device), use_cache=True, logits_to_keep=1)
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        token_id = token.item()
        if token_id in ends:
            return
        recorder.phase("decode")
        out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        yield token_id


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
