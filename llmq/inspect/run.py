"""One prompt through one method with its linear inputs watched: events while it prepares, then the report.

Stands beside `compare`: the same line in front of the device, the same loaded engines.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmq import telemetry
from llmq.contestants import Contestant
from llmq.engine.residents import Key, Residents
from llmq.engine.text import encode_prompt
from llmq.errors import BadChoice, OutOfMemory
from llmq.events import Event, Loaded, Loading
from llmq.inspect.report import OutlierReport
from llmq.models.loading import ids_within, load_config, load_tokenizer, resolve
from llmq.preparation import await_turn, make_ready
from llmq.quant.handler import DEFAULT_THRESHOLD

MAX_NEW_TOKENS = 64
LOWEST_THRESHOLD = 2.0  # how far down a threshold can be moved afterwards; lower ones keep more numbers


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What to watch. `new_tokens` are generated greedily after the prompt; 0 watches the prompt alone."""

    prompt: str
    model: str = "demo"
    contestant: Contestant = Contestant("bnb-int8", DEFAULT_THRESHOLD)
    new_tokens: int = 8
    device: str = "cpu"

    @property
    def threshold(self) -> float:
        """The method's own; the usual one for a method that has none."""
        return DEFAULT_THRESHOLD if self.contestant.threshold is None else self.contestant.threshold

    def __post_init__(self):
        if self.threshold <= 0:
            raise BadChoice(f"threshold is {self.threshold:g}: with the decomposition off there are no outlier columns")
        if not isinstance(self.new_tokens, int) or not 0 <= self.new_tokens <= MAX_NEW_TOKENS:
            raise BadChoice(f"new tokens is {self.new_tokens!r}; choose a whole number from 0 to {MAX_NEW_TOKENS}")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Load what an inspection would, so that its first picture comes soon after the click."""

    model: str = "demo"
    contestant: Contestant = Contestant("bnb-int8", DEFAULT_THRESHOLD)
    device: str = "cpu"


def prepare_engine(
    preparation: Preparation,
    residents: Residents,
    *,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """Load the engine, unless somebody else is computing: then there is no hurry."""
    stop = stop or threading.Event()
    with residents.turnstile.turn() as turn:
        if turn.position == 0:
            yield from residents.thread.run(_load(preparation, residents, stop))


def _load(preparation: Preparation, residents: Residents, stop: threading.Event) -> Iterator[Event]:
    source, contestant = resolve(preparation.model), preparation.contestant
    if (yield from make_ready(source, stop)):
        yield Loading(contestant=contestant.label)
        residents.get(Key(source, contestant.label, contestant.method, preparation.device))


def inspect_outliers(
    inspection: Inspection,
    residents: Residents,
    *,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event | OutlierReport]:
    """Run `inspection`, yielding events, an OutlierReport once the prompt is read, and at last the whole one (none when
    stopped before the model ran)."""
    stop = stop or threading.Event()
    with residents.turnstile.turn() as turn:
        if (yield from await_turn(turn, stop, clock)):
            yield from residents.thread.run(_inspect(inspection, residents, stop))


def _inspect(inspection: Inspection, residents: Residents, stop: threading.Event) -> Iterator[Event | OutlierReport]:
    import torch

    from llmq.inspect.outliers import observe_in_parts

    source = resolve(inspection.model)
    if not (yield from make_ready(source, stop)):
        return
    config, tokenizer, contestant = load_config(source), load_tokenizer(source), inspection.contestant
    context = int(getattr(config, "max_position_embeddings", 2**31)) - inspection.new_tokens
    ids = ids_within(config, encode_prompt(tokenizer, inspection.prompt, context=context))
    key = Key(source, contestant.label, contestant.method, inspection.device)
    yield Loading(contestant=contestant.label)
    resident = key in residents
    try:
        engine, seconds = residents.get(key)
        if contestant.threshold is not None:
            engine.set_threshold(contestant.threshold)
        yield Loaded(contestant=contestant.label, weight_bytes=engine.weight_bytes, seconds=seconds, resident=resident)
        yield from observe_in_parts(
            engine.model,
            torch.tensor([ids], device=inspection.device),
            new_tokens=inspection.new_tokens,
            stop=stop,
            threshold=inspection.threshold,
            lowest_threshold=min(LOWEST_THRESHOLD, inspection.threshold),
            token_text=lambda token: tokenizer.decode([token]),
            name=inspection.model,
            method=contestant.label,
            account=engine.handler.sixteen_bit_columns,
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        error.__traceback__ = None
        residents.drop(key)
        free = telemetry.free_bytes(inspection.device)
        raise OutOfMemory(f"out of memory while watching {contestant.label}; {free:,} bytes are free") from None
