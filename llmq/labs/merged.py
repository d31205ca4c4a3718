"""Several iterators at the same time, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _End:
    """A stream is over; `error` is what it raised."""

    error: BaseException | None = None


def merged(streams: Sequence[Iterator[Item]]) -> Iterator[Item]:
    """Yield the items of generators as they come; a single one is not given a thread. What one raises is raised here,
    once every other is closed; closing this closes all."""
    if len(streams) == 1:
        yield from streams[0]
        return
    heard, over = SimpleQueue(), threading.Event()
    threads = [threading.Thread(target=_run, args=(stream, heard, over), daemon=True) for stream in streams]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            item = heard.get()
            if not isinstance(item, _End):
                yield item
                continue
            running -= 1
            if item.error:
                raise item.error
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _run(stream: Iterator, heard: SimpleQueue, over: threading.Event) -> None:
    try:
        with closing(stream):
            for item in stream:
                if over.is_set():
                    break
                heard.put(item)
    except BaseException as error:
        heard.put(_End(error))
    else:
        heard.put(_End())
