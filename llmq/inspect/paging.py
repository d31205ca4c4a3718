"""Several requests at once: in one padded batch, and with their keys and values in pages that each takes when it needs
another (Kwon et al. 2023), by transformers' continuous batching. Seconds, bytes, and the block table.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from llmq.engine.base import Interrupted
from llmq.engine.hf import cache_name

if TYPE_CHECKING:
    from llmq.engine.hf import HFEngine

PATIENCE = 0.1  # seconds between two looks at whether somebody pressed Stop
NO_END = -1  # a token that no model writes: every request gets as many tokens as it asked for


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens are to follow it."""

    ids: list[int]
    tokens: int

    @property
    def kept(self) -> int:
        """Tokens whose keys and values are there at the end: the last one is written and never read."""
        return len(self.ids) + self.tokens - 1


@dataclass(frozen=True)
class Served:
    """What every request was written, in `seconds`; tokens that memory was `reserved` for at the fullest moment, and
    of these how many were `filled` by each request. `table`: the pages of each at that moment; a batch has none."""

    written: list[list[int]]
    seconds: float
    reserved: int
    filled: list[int]
    table: list[list[int]] = field(default_factory=list)

    @property
    def used(self) -> int:
        return sum(self.filled)


def requests_of(ids: Sequence[int], number: int, longest: int) -> list[Request]:
    """Cut a text into prompts of 1/16 to 3/4 of `longest` tokens with answers of 1/16 to 1/4: many short ones and few
    long ones, always the same."""
    draw, place, found = random.Random(0), 0, []
    for _ in range(number):
        prompt, tokens = (max(2, round(longest / 16 * high ** draw.random())) for high in (12, 4))
        found.append(Request([ids[(place + k) % len(ids)] for k in range(prompt)], tokens))
        place += prompt
    return found


def in_one_batch(engine: HFEngine, requests: Sequence[Request], stopped: Callable[[], bool]) -> Served:
    """Write all answers as one batch, padded on the left to the longest prompt, until the longest answer is written."""
    engine.settle()
    model, kept = engine.model, DynamicCache(config=engine.model.config)
    widest, most = (max(sizes) for sizes in zip(*((len(r.ids), r.tokens) for r in requests), strict=True))
    new = torch.tensor([[0] * (widest - len(r.ids)) + r.ids for r in requests], device=engine.device)
    mask = torch.tensor([[0] * (widest - len(r.ids)) + [1] * len(r.ids) for r in requests], device=engine.device)
    written, given, started = [], {cache_name(model): kept, "use_cache": True, "logits_to_keep": 1}, time.perf_counter()
    with torch.inference_mode():
        for _ in range(most):
            if stopped():
                raise Interrupted
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
            logits = model(new, attention_mask=mask, position_ids=places, **given).logits
            new = logits[:, -1:].argmax(-1)
            written.append(new)
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        found = torch.cat(written, 1).tolist()
    seconds = time.perf_counter() - started
    each = [tokens[: r.tokens] for tokens, r in zip(found, requests, strict=True)]
    return Served(each, seconds, len(requests) * kept.get_seq_length(), [r.kept for r in requests])


def in_pages(engine: HFEngine, requests: Sequence[Request], page: int, stopped: Callable[[], bool]) -> Served:
    """Write all answers as requests that come and go, with a page for every `page` tokens of each."""
    engine.settle()
    manager = _manager(engine, requests, page)
    try:
        manager.warmup()
        (allocator,) = manager.batch_processor.cache.cache_allocators.values()
        fullest = Fullest.watching(allocator)
        started = time.perf_counter()
        manager.start()
        for number, request in enumerate(requests):
            manager.add_request(request.ids, request_id=str(number), max_new_tokens=request.tokens)
        written = _collected(manager, len(requests), stopped)
        seconds = time.perf_counter() - started
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()
    names = [str(number) for number in range(len(requests))]
    filled, table = (
        [found.get(name, empty) for name in names] for found, empty in ((fullest.filled, 0), (fullest.table, []))
    )
    return Served(written, seconds, fullest.pages * page, filled, table)


@dataclass
class Fullest:
    """The moment when most pages are taken: whose they are, and how many tokens of each are in them."""

    pages: int = 0
    filled: dict[str, int] = field(default_factory=dict)
    table: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def watching(cls, allocator: Any) -> Fullest:
        """Look at an allocator of transformers whenever it gives a request the pages of its next tokens."""
        found, allocate, tokens = cls(), allocator.allocate_cache_to_request, {}

        def watched(request: str, past: int, new: int) -> None:
            allocate(request, past, new)
            tokens[request] = past + new
            if (pages := sum(map(len, allocator.block_table.values()))) >= found.pages:
                found.table = {name: list(blocks) for name, blocks in allocator.block_table.items()}
                found.pages, found.filled = pages, {name: tokens[name] for name in found.table}

        allocator.allocate_cache_to_request = watched
        return found


def _manager(engine: HFEngine, requests: Sequence[Request], page: int):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    needed = sum(-(-(len(r.ids) + r.tokens) // page) for r in requests)
    settings = ContinuousBatchingConfig(
        page_size=page, num_blocks=needed, max_batch_tokens=sum(len(r.ids) for r in requests),
        allow_block_sharing=False, auto_switch_to_flash=False,
    )  # fmt: skip
    return engine.model.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=NO_END), settings)


def _collected(manager, number: int, stopped: Callable[[], bool]) -> list[list[int]]:
    """The answers in the order of the requests."""
    found: dict[int, list[int]] = {}
    while len(found) < number:
        if stopped():
            raise Interrupted
        if (result := manager.get_result(timeout=PATIENCE)) is not None:
            if result.error:
                raise RuntimeError(result.error)
            found[int(result.request_id)] = list(result.generated_tokens)
        elif not manager.is_running():
            raise RuntimeError("transformers' continuous batching ended early") from (
                manager.background_thread_status.fatal_error
            )
    return [found[place] for place in range(number)]
