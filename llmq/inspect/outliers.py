"""Observe a model's activation outliers over one prompt.

`observe` runs the model, `observe_in_parts` says early what the prompt gave; `OutlierRecorder` records whatever the
caller runs; an `OutlierReport` answers the rest from stored numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llmq.engine.base import Interrupted
from llmq.engine.hf import cache_name
from llmq.errors import BadChoice
from llmq.inspect.recorder import OutlierColumns, OutlierRecorder
from llmq.inspect.report import OutlierReport


def observe(model: nn.Module, input_ids: torch.Tensor, **options) -> OutlierReport:
    """Return the whole report of `observe_in_parts`, which has the options."""
    *_, report = observe_in_parts(model, input_ids, **options)
    return report


def observe_in_parts(
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
    outlier_columns: OutlierColumns | None = None,
) -> Iterator[OutlierReport]:
    """Run a prompt and up to `new_tokens` greedy tokens through a Hugging Face causal LM; a report of its outliers as
    soon as the prompt is read, and the whole one.

    `input_ids`: (1, tokens) int64. Every generated token is run through the model, and has its columns; an end-of-text
    token ends the loop and is not run. The head reads the prompt's last position alone, as in writing text, so its
    columns are that one's (demo model: 6, and 35 over a whole prompt). The model runs in eval mode, as bitsandbytes
    quantizes activations only there, and is put back. `stop` ends it within one layer; the report then says `stopped`.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise BadChoice(f"input_ids of shape {tuple(input_ids.shape)} must be (1, tokens)")
    token_ids, stopped = input_ids[0].tolist(), False
    recorder = OutlierRecorder(model, lowest_threshold=lowest_threshold, stop=stop, outlier_columns=outlier_columns)

    def report() -> OutlierReport:
        texts = [token_text(token_id) for token_id in token_ids]
        return recorder.report(model=name, method=method, threshold=threshold, token_texts=texts, stopped=stopped)

    with _eval_mode(model), recorder:
        try:
            for token_id in _greedy(model, input_ids, recorder, new_tokens):
                if token_id is not None:
                    token_ids.append(token_id)
                elif new_tokens:
                    yield report()
        except Interrupted:
            stopped = True
    yield report()


def _greedy(
    model: nn.Module, input_ids: torch.Tensor, recorder: OutlierRecorder, new_tokens: int
) -> Iterator[int | None]:
    """Yield None once the prompt is read, then each generated token's id once it has run through the model; the phases
    are told to `recorder`."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list | tuple) else {ends}
    recorder.phase("prefill")
    with torch.inference_mode():
        out = model(input_ids.to(model.device), use_cache=True, logits_to_keep=1)
    yield None
    for _ in range(new_tokens):
        token_id = out.logits[0, -1].argmax().item()
        if token_id in ends:
            return
        recorder.phase("decode")
        kept = cache_name(model)
        with torch.inference_mode():
            token = torch.tensor([[token_id]], device=model.device)
            out = model(token, **{kept: out[kept]}, use_cache=True, logits_to_keep=1)
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
