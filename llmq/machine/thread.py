"""One thread for everything that computes, whoever asks.

On a CPU torch's worker threads belong to the thread that calls it. As soon as two threads have called it there are more
workers than cores, and OpenMP's runtime then puts waiting workers to sleep at every barrier instead of letting them
spin: FP16 decode of the demo model on 2 cores falls from 21 to 10 tokens per second, with 23,000 context switches
where there were 180 (measured). A web server hands each call to whichever of its threads is free.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")

_END = object()
LOOK_SECONDS = 0.25  # between two looks at what was put aside, and whether the thread is still there


class ComputeThread:
    """Runs iterators in a thread of its own, which starts with the first and ends with this object."""

    def __init__(self):
        self._tasks: SimpleQueue = SimpleQueue()
        self._worker = threading.Thread(target=_work, args=(self._tasks,), name="compute", daemon=True)
        self._lock = threading.Lock()
        weakref.finalize(self, self._tasks.put, None)

    def run(self, items: Iterator[Item], aside: SimpleQueue | None = None) -> Iterator[Item]:
        """Yield what `items` yields, each item made in the thread when it is asked for, and raise what it raises. What
        is put `aside` while an item is made is yielded before it. Closing the result closes `items`."""
        aside = aside or SimpleQueue()
        try:
            while (item := (yield from self._call(aside, next, items, _END))) is not _END:
                yield item
        finally:
            for _ in self._call(SimpleQueue(), items.close):
                pass

    def _call(self, aside: SimpleQueue, function: Callable, *arguments: Any) -> Generator[Any, None, Any]:
        """What `function` returns or raises in the thread; in this one when the thread has ended, as it has where a
        generator is collected together with this object."""
        with self._lock:
            if self._worker.ident is None:
                self._worker.start()
        future: Future = Future()
        self._tasks.put((future, function, arguments))
        while wait([future], LOOK_SECONDS).not_done:
            yield from _emptied(aside)
            if not self._worker.is_alive() and future.cancel():
                return function(*arguments)
        yield from _emptied(aside)
        return future.result()


def _emptied(aside: SimpleQueue) -> Iterator[Any]:
    while not aside.empty():
        yield aside.get()


def _work(tasks: SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, function, arguments = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # whoever waits gets it
            future.set_exception(error)
        del task, future, function, arguments  # nothing of a finished call is kept until the next
