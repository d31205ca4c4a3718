"""Two methods, one text: generate what is to be read, let both read it, and hand out the comparison.

Both run through transformers, because there each layer can be looked into and replaced afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq import telemetry
from llmq.contestants import Contestant
from llmq.engine.interface import Engine, Interrupted
from llmq.engine.residents import Key, Residents
from llmq.engine.sampling import SamplingSettings
from llmq.engine.text import encode_prompt, require_text
from llmq.errors import BadChoice, OutOfMemory, unknown
from llmq.events import Event, Loaded, Loading
from llmq.inspect.agreement import Agreement, Drift, compare_logits, margins_at, parting
from llmq.models.loading import ids_within, load_config, load_tokenizer, resolve
from llmq.preparation import Working, await_turn, make_ready
from llmq.quant.handler import DEFAULT_THRESHOLD

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TEXTS = ("continuation", "prompt", "text")
LONGEST_TEXT = 512  # tokens; two float32 tables of so many rows, each as wide as the vocabulary, are held
MAX_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What both read: the `baseline`'s greedy 'continuation' of the prompt, the 'prompt' itself, or a given 'text'.

    `prompt` goes through the chat template; a given text is read as it is, from `prompt`. `new_tokens`: of a
    continuation.
    """

    prompt: str
    text: str = "continuation"
    model: str = "demo"
    baseline: Contestant = Contestant("fp16")
    contestant: Contestant = Contestant("bnb-int8", DEFAULT_THRESHOLD)
    new_tokens: int = 32
    device: str = "cpu"

    def __post_init__(self):
        if self.text not in TEXTS:
            raise unknown("text to read", self.text, TEXTS)
        if self.baseline.label == self.contestant.label:
            raise BadChoice(f"both methods are {self.baseline.label}; choose two different ones")
        if isinstance(self.new_tokens, bool) or not isinstance(self.new_tokens, int):
            raise BadChoice(f"new tokens is {self.new_tokens!r}; choose a whole number from 1 to {MAX_NEW_TOKENS}")
        if not 1 <= self.new_tokens <= MAX_NEW_TOKENS:
            raise BadChoice(f"new tokens is {self.new_tokens}; choose a whole number from 1 to {MAX_NEW_TOKENS}")


@dataclass(frozen=True)
class Read:
    """The result, with what it takes to show it: `texts`, one for each token of the text."""

    reading: Reading
    agreement: Agreement
    texts: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def text_of(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id])


def read_both(
    reading: Reading,
    residents: Residents,
    *,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event | Read]:
    """Yields events and at last a Read (none when stopped first)."""
    stop = stop or threading.Event()
    with residents.turnstile.turn() as turn:
        if (yield from await_turn(turn, stop, clock)):
            yield from residents.thread.run(_read_both(reading, residents, stop))


def _read_both(reading: Reading, residents: Residents, stop: threading.Event) -> Iterator[Event | Read]:
    import torch

    pair = yield from engines_of(reading, residents, stop)
    if pair is None:
        return
    source = resolve(reading.model)
    tokenizer, config = load_tokenizer(source), load_config(source)
    ids = ids_within(config, _ids(reading, tokenizer, pair[0].context))
    try:
        drift, continuation = None, None
        if reading.text == "continuation":
            continuation = len(ids)
            drift = yield from _drift(pair, ids, reading, stop)
            ids = ids + list(drift.baseline_ids)
        yield Working(f"{reading.baseline.label} and {reading.contestant.label} read {len(ids)} tokens", 0.8)
        logits = [engine.logits(ids, stop.is_set).float() for engine in pair]
    except Interrupted:
        return
    except (torch.OutOfMemoryError, MemoryError) as error:
        error.__traceback__ = None
        raise OutOfMemory("out of memory while both methods read the text; choose a shorter one") from None
    agreement = Agreement(tuple(ids), tuple(compare_logits(*logits, ids)), continuation, drift)
    yield Read(reading, agreement, tuple(tokenizer.decode([token]) for token in ids), tokenizer)


def _ids(reading: Reading, tokenizer: PreTrainedTokenizerBase, context: int) -> list[int]:
    if reading.text == "text":
        require_text(reading.prompt, "text", "paste a few sentences")
        ids = tokenizer(reading.prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = encode_prompt(tokenizer, reading.prompt, context=context)
    longest = min(LONGEST_TEXT, context) - (reading.new_tokens if reading.text == "continuation" else 0)
    if len(ids) > longest:
        raise BadChoice(f"the text is {len(ids):,} tokens long; give at most {longest:,} tokens")
    if reading.text != "continuation" and len(ids) < 2:
        raise BadChoice(f"the text has {len(ids)} token; at least 2 are needed, the first predicts the second")
    return ids


def _drift(
    pair: tuple[Engine, Engine], ids: list[int], reading: Reading, stop: threading.Event
) -> Generator[Working, None, Drift]:
    """Both write freely."""
    texts, tables = [], []
    for side, (engine, contestant) in enumerate(zip(pair, (reading.baseline, reading.contestant), strict=True)):
        written: list[int] = []
        logits: list[torch.Tensor] = []
        generation = engine.start(ids, SamplingSettings(max_new_tokens=reading.new_tokens))
        try:
            while len(written) < reading.new_tokens:
                if stop.is_set():
                    raise Interrupted
                token = generation.step() if written else generation.prefill(stop.is_set)
                logits.append(generation.logits.float().cpu())
                if token.token_id in engine.eos_ids:
                    break
                written.append(token.token_id)
                share = (side + len(written) / reading.new_tokens) * 0.4
                yield Working(f"{contestant.label} writes token {len(written)} of {reading.new_tokens}", share)
        finally:
            generation.close()
        texts.append(written)
        tables.append(logits)
    if not texts[0]:
        ends = f"{reading.baseline.label} ends the text at once"
        raise BadChoice(f"{ends}, so there is no continuation to read; try another prompt")
    at = parting(*texts)
    margins = None if at is None else margins_at(*(table[at] for table in tables), (texts[0][at], texts[1][at]))
    return Drift(tuple(texts[0]), tuple(texts[1]), at, margins)


def engines_of(
    reading, residents: Residents, stop: threading.Event
) -> Generator[Event, None, tuple[Engine, Engine] | None]:
    """The two transformers engines of a job with a `model`, a `baseline`, a `contestant` and a `device`; None when
    stopped. Raises OutOfMemory."""
    import torch

    source = resolve(reading.model)
    if not (yield from make_ready(source, stop)):
        return None
    engines = []
    for contestant in (reading.baseline, reading.contestant):
        if stop.is_set():
            return None
        key = Key(source, contestant.label, contestant.method, reading.device)
        yield Loading(contestant=contestant.label)
        resident = key in residents
        try:
            engine, seconds = residents.get(key)
        except (torch.OutOfMemoryError, MemoryError) as error:
            error.__traceback__ = None
            residents.drop(key)
            free = telemetry.free_bytes(reading.device)
            raise OutOfMemory(f"out of memory while loading {contestant.label}; {free:,} bytes are free") from None
        if contestant.threshold is not None:
            engine.set_threshold(contestant.threshold)
        yield Loaded(contestant=contestant.label, weight_bytes=engine.weight_bytes, seconds=seconds, resident=resident)
        engines.append(engine)
    return tuple(engines)
