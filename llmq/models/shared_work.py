"""Work that takes long and that several may wait for: one thread for each, asked to end once nobody waits any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from llmq.events import Progress

LOOK_SECONDS = 0.5  # between two looks at what is going on
Work = Callable[[threading.Event], Any]  # raises Abandoned soon after the event is set, where it can be ended at all


class Abandoned(Exception):
    """Work ended because nobody waited for it."""


@dataclass(eq=False)
class Going:
    """Work that is going on, and how many wait for it."""

    stop: threading.Event = field(default_factory=threading.Event)
    done: Future = field(default_factory=Future)
    waiting: int = 0


class SharedWork:
    """What is going on, by name: whoever asks for it while it goes on waits for the same."""

    def __init__(self):
        self._lock = threading.Lock()
        self._going: dict[Hashable, Going] = {}

    def patiently(self, name: Hashable, work: Work, what: str) -> Generator[Progress, None, Any]:
        """Yield how long `what` has been going on, and return what `work` makes."""
        started = time.monotonic()
        while True:
            with self._joined(name, work) as going:
                while wait([going.done], timeout=LOOK_SECONDS).not_done:
                    yield Progress(f"{what} ({time.monotonic() - started:.0f} s)", 0.0)
            if not isinstance(going.done.exception(), Abandoned):  # by others, just before this one came
                return going.done.result()

    @contextmanager
    def _joined(self, name: Hashable, work: Work) -> Iterator[Going]:
        with self._lock:
            if (going := self._going.get(name)) is None:
                going = self._going[name] = Going()
                # A daemon: neither a stop nor the end of the program waits for it.
                threading.Thread(target=self._run, args=(name, work), name="hub-download", daemon=True).start()
            going.waiting += 1
            going.stop.clear()
        try:
            yield going
        finally:
            with self._lock:
                going.waiting -= 1
                if not going.waiting:
                    going.stop.set()

    def _run(self, name: Hashable, work: Work) -> None:
        going = self._going[name]
        try:
            going.done.set_result(work(going.stop))
        except BaseException as error:  # handed to whoever waits
            going.done.set_exception(error)
        finally:
            with self._lock:
                del self._going[name]


@cache
def shared_work() -> SharedWork:
    """What is going on in this process."""
    return SharedWork()
