"""One thread for everything that computes, whoever asks.

On a CPU torch's worker threads belong to the thread that calls it. As soon as two threads have called it there are more
workers than cores, and OpenMP's runtime then puts waiting workers to sleep at every barrier instead of letting them
spin: FP16 decode of the demo model on 2 cores falls from 21 to 10 tokens per second, with 23,000 context switches
where there were 180 (measured). A web server hands each call to whichever of its threads is free.

A step that never returns would keep everybody waiting for ever: after `patience` seconds without a sign of life the
thread is given up, and what comes next runs in another.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

from llmq.errors import Ended

Item = TypeVar("Item")

_END = object()
LOOK_SECONDS = 0.25  # between two looks at what was put aside, and whether the thread is still there
END_SECONDS = 5.0  # that a thread which is told to end may take to free what torch keeps for it
PATIENCE = 600.0  # seconds; loading 100 GB from a disk takes as long, and a prefill gives a sign at every layer


_workers: weakref.WeakKeyDictionary[threading.Thread, SimpleQueue] = weakref.WeakKeyDictionary()


@atexit.register
def _see_them_out() -> None:
    """Tell all threads to end and wait for them: what torch keeps for a thread goes with it, and where the interpreter
    had gone before, the process would be aborted. Whose owner was collected has been told before."""
    left = [(worker, tasks) for worker, tasks in _workers.items() if worker.is_alive()]
    for _, tasks in left:
        tasks.put(None)
    for worker, _ in left:
        worker.join(END_SECONDS)


class Stuck(Ended):
    """A step did not return, and its thread was given up."""


class ComputeThread:
    """Runs iterators in a thread of its own, which starts with the first and ends with this object. `niceness`: how
    far it, and the threads it computes with, stand back for the process's others where cores are few (Linux)."""

    def __init__(self, patience: float = PATIENCE, clock: Callable[[], float] = time.monotonic, niceness: int = 0):
        self.patience, self.niceness, self.given_up = patience, niceness, 0
        self._clock, self._lock, self._heard = clock, threading.Lock(), None
        self._start_over()

    def _start_over(self) -> None:
        self._tasks: SimpleQueue = SimpleQueue()
        self._worker = threading.Thread(target=_work, args=(self._tasks, self.niceness), name="compute", daemon=True)
        weakref.finalize(self, self._tasks.put, None)
        _workers[self._worker] = self._tasks

    @property
    def silent_seconds(self) -> float:
        """How long the thread has been computing without a sign of life; 0 while it has nothing to do."""
        heard = self._heard
        return 0.0 if heard is None else self._clock() - heard

    def alive(self) -> None:
        """Note a sign of life; whatever computes gives one where it asks whether to stop."""
        if self._heard is not None:
            self._heard = self._clock()

    def run(self, items: Iterator[Item], aside: SimpleQueue | None = None) -> Iterator[Item]:
        """Yield what `items` yields, each item made in the thread when it is asked for, and raise what it raises; Stuck
        where the thread was given up. What is put `aside` while an item is made is yielded before it. Closing the
        result closes `items`."""
        aside, close = aside or SimpleQueue(), items.close
        try:
            while (item := (yield from self._call(aside, next, items, _END))) is not _END:
                yield item
        except Stuck:
            close = None  # it is still running
            raise
        finally:
            if close:
                for _ in self._call(SimpleQueue(), close):
                    pass

    def _call(self, aside: SimpleQueue, function: Callable, *arguments: Any) -> Generator[Any, None, Any]:
        """What `function` returns or raises in the thread; in this one when the thread has ended, as it has where a
        generator is collected together with this object."""
        with self._lock:
            tasks, worker = self._tasks, self._worker
            if worker.ident is None:
                worker.start()
        future: Future = Future()
        self._heard = self._clock()
        tasks.put((future, function, arguments))
        try:
            while wait([future], min(LOOK_SECONDS, self.patience)).not_done:
                yield from _emptied(aside)
                if not worker.is_alive() and future.cancel():
                    return function(*arguments)
                if self.silent_seconds >= self.patience:
                    self._give_up()
        finally:
            self._heard = None
        yield from _emptied(aside)
        return future.result()

    def _give_up(self) -> None:
        with self._lock:
            self._tasks.put(None)
            self._start_over()
            self.given_up += 1
        raise Stuck(
            f"a step did not come back for {self.patience:.0f} s and was given up. The next question starts anew; "
            "if that hangs too, the server has to be started again"
        )


def _emptied(aside: SimpleQueue) -> Iterator[Any]:
    while not aside.empty():
        yield aside.get()


def _work(tasks: SimpleQueue, niceness: int) -> None:
    if niceness and sys.platform == "linux":  # where a thread has one of its own, which those it starts inherit
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
    while (task := tasks.get()) is not None:
        future, function, arguments = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # whoever waits gets it
            future.set_exception(error)
        del task, future, function, arguments  # nothing of a finished call is kept until the next
