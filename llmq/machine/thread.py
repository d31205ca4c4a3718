"""One thread for everything that computes, whoever asks.

On a CPU torch's worker threads belong to the thread that calls it. As soon as two threads have called it there are more
workers than cores, and OpenMP's runtime then puts waiting workers to sleep at every barrier instead of letting them
spin: FP16 decode of the demo model on 2 cores falls from 21 to 10 tokens per second, with 23,000 context switches
where there were 180 (measured). A web server hands each call to whichever of its threads is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")

_END = object()


class ComputeThread:
    """Runs iterators in a thread of its own, which starts with the first."""

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute")

    def run(self, items: Iterator[Item]) -> Iterator[Item]:
        """What `items` yields or raises, each item when it is asked for. Closing the result closes `items`."""
        try:
            while (item := self._executor.submit(next, items, _END).result()) is not _END:
                yield item
        finally:
            self._executor.submit(items.close).result()
