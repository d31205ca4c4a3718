"""A GPU that the host lends for seconds, to a process that it forks for one question.

The page's process never computes: who may run and who is to stop is decided there, and what a question needs from
elsewhere is fetched there, before the GPU is asked for. The fork loads, computes and samples the memory, since nothing
else sees the device.
"""

from __future__ import annotations

import itertools
import math
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

from llmq.engine.base import Interrupted
from llmq.errors import UserError
from llmq.events import Loading, Waiting
from llmq.machine.door import Lease, Machine, Question

START_SECONDS = 15  # the fork, its CUDA context, kernels compiled for the first time (1 and 17 s, measured on an H200)
LOAD_SECONDS = 6  # of one method; the weights' files are in memory
TOKEN_SECONDS = 0.1  # of one token of the slowest method (bitsandbytes, stored: 0.085 on an H100)
LAB_SECONDS = 90  # of a question that is not about new tokens
MOST_SECONDS = 120  # what a visitor without an account has in a day
MARGIN_SECONDS = 3  # before the host ends the fork, the question ends with what it has
FLAGS = 4096  # as many runs may be under way at once
RELAY_SECONDS = 0.05

Lend = Callable[[Callable[..., Iterator], Callable[..., int]], Callable[..., Iterator]]


def seconds_for(question: Question, *_) -> int:
    """Tell for how long `question` needs the GPU: more tokens and more methods take longer."""
    if not (sampling := getattr(question, "sampling", None)):
        return LAB_SECONDS
    each = LOAD_SECONDS + math.ceil(sampling.max_new_tokens * TOKEN_SECONDS)
    return min(MOST_SECONDS, START_SECONDS + len(question.contestants) * each)


@dataclass(frozen=True)
class Flag:
    """A stop that both processes see: one byte of memory that the fork shares. It is set, too, when time is up."""

    flags: mmap.mmap
    number: int
    ends_at: float = math.inf

    def set(self) -> None:
        self.flags[self.number] = 1

    def is_set(self) -> bool:
        return bool(self.flags[self.number]) or self.late

    @property
    def late(self) -> bool:
        return time.monotonic() > self.ends_at


class LentMachine(Machine):
    """Asks each question in a fork of this process. `lend(function, seconds)` is the host's: it returns a function that
    yields what `function` yields in a fork with a GPU, asked for as long as `seconds` says of the same arguments."""

    def __init__(self, lend: Lend, **options):
        super().__init__(**options)
        self._flags = mmap.mmap(-1, FLAGS)
        self._numbers = itertools.count()
        self._answers = lend(self._in_the_fork, seconds_for)

    def run(self, question: Question, stop: threading.Event | None = None, address: str = "") -> Iterator[object]:
        """Yield as `Machine.run` does; what the fork refuses is raised here. `address` stands in no line: the host has
        its own."""
        stop = stop or threading.Event()
        yield Waiting(seconds=0.0)
        yield from self._fetched(question, stop)
        if stop.is_set():
            return
        number = next(self._numbers) % FLAGS
        with closing(self._answers(question, number)) as items, self._relayed(stop, number):
            for item in items:
                if isinstance(item, UserError):
                    raise item
                yield item

    def _fetched(self, question: Question, stop: threading.Event) -> Iterator[Loading]:
        """Fetch what is missing of the models that the question is about."""
        lease, random = Lease(self, question.device, stop), getattr(question, "random_weights", False)
        with suppress(Interrupted):
            for name in getattr(question, "models", (question.model,)):
                yield from lease.open(name, random_weights=random)

    @contextmanager
    def _relayed(self, stop: threading.Event, number: int) -> Iterator[None]:
        """Raise flag `number` when `stop` is set, or when the block is left: the host's `close` waits for the fork."""
        self._flags[number] = 0
        flag, over = Flag(self._flags, number), threading.Event()

        def relay() -> None:
            while not (stop.wait(RELAY_SECONDS) or over.is_set()):
                pass
            flag.set()

        relaying = threading.Thread(target=relay, name="relay-stop", daemon=True)
        relaying.start()
        try:
            yield
        finally:
            flag.set()
            over.set()
            relaying.join()

    def _in_the_fork(self, question: Question, number: int) -> Iterator[object]:
        """Yield what the question yields. A refusal is yielded, too: of what is raised the host passes on the class."""
        lent = seconds_for(question)
        stop = Flag(self._flags, number, time.monotonic() + lent - MARGIN_SECONDS)
        try:
            yield from self.compute(question, stop)
        except UserError as error:
            yield error
        if stop.late:
            yield UserError(f"the {lent} seconds for which the GPU was lent are over; ask for fewer tokens or methods")
