"""The chain of cause of one token as a job: the same two engines as a reading, then `patching.explain_token`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmq.contestants import Contestant
from llmq.engine.residents import Residents
from llmq.errors import BadChoice, OutOfMemory
from llmq.events import Event
from llmq.inspect.cause import Cause
from llmq.inspect.reading import engines_of
from llmq.preparation import Working, await_turn
from llmq.quant import METHODS, method_named
from llmq.quant.handler import DEFAULT_THRESHOLD


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Which token of which text to explain. `token_ids`: the text; `position`: of the token that is forecast from those
    before it; `patch`: whether every module is tried in 16 bit."""

    token_ids: tuple[int, ...]
    position: int
    model: str = "demo"
    baseline: Contestant = Contestant("fp16")
    contestant: Contestant = Contestant("bnb-int8", DEFAULT_THRESHOLD)
    patch: bool = True
    device: str = "cpu"

    def __post_init__(self):
        if not is_dense(self.baseline.method):
            dense = ", ".join(name for name in METHODS if is_dense(name))
            raise BadChoice(f"{self.baseline.method} has no 16-bit modules to put back; choose one of {dense}")

    @property
    def threshold(self) -> float:
        """What counts as an outlier: the method's own threshold, the usual one where it has none."""
        return DEFAULT_THRESHOLD if self.contestant.threshold is None else self.contestant.threshold


def is_dense(method: str) -> bool:
    """Whether a method keeps its weights in floating point."""
    return method_named(method).handler.lean_weights == "dense" or method == "fp32"


def explain(
    explanation: Explanation,
    residents: Residents,
    *,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event | Working | Cause]:
    """Yields events, progress, and a Cause whenever more is known; the last one is whole unless it says `stopped`."""
    stop = stop or threading.Event()
    with residents.turnstile.turn() as turn:
        if (yield from await_turn(turn, stop, clock)):
            yield from residents.thread.run(_explain(explanation, residents, stop))


def _explain(
    explanation: Explanation, residents: Residents, stop: threading.Event
) -> Iterator[Event | Working | Cause]:
    import torch

    from llmq.inspect.patching import explain_token

    pair = yield from engines_of(explanation, residents, stop)
    if pair is None:
        return
    try:
        yield from explain_token(
            pair[0].model,
            pair[1].model,
            list(explanation.token_ids),
            explanation.position,
            threshold=explanation.threshold,
            patch=explanation.patch,
            stop=stop,
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        error.__traceback__ = None
        raise OutOfMemory("out of memory while a token was explained; choose a shorter text") from None
