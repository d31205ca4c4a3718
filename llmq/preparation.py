"""What every job on the device does first, as events: stand in line, then fetch what the model still needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass

from llmq.engine.turns import Turn
from llmq.events import Loading, Waiting
from llmq.models.loading import Source, prepare

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Working:
    """How far a long job is: what it does now, and the share of it that is done (0 to 1; None where nobody knows)."""

    message: str
    fraction: float | None = None


def await_turn(turn: Turn, stop: threading.Event, clock: Callable[[], float]) -> Generator[Waiting, None, bool]:
    """Yield until it is our turn; returns False when stopped first.

    The first event comes before any waiting, so that whoever listens can already stop us.
    """
    started = clock()
    yield Waiting(seconds=0.0, position=turn.position)
    while not turn.wait(POLL_SECONDS):
        if stop.is_set():
            return False
        yield Waiting(seconds=round(clock() - started, 1), position=turn.position)
    return not stop.is_set()


def make_ready(source: Source, stop: threading.Event) -> Generator[Loading, None, bool]:
    """Download or convert the model if need be; returns False when stopped first."""
    for progress in prepare(source):
        if stop.is_set():
            return False
        yield Loading(contestant="", message=f"{progress.message} · {progress.fraction:.0%}")
    return True
