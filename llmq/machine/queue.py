"""First come, first served, one at a time: the line in front of the device.

A web server's queue is not enough: a stopped run may still be inside a slow step when the next one begins. Here the
next run starts when the one before has really left.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceQueue:
    """Hands the device to one `turn()` after the other, in the order they were asked for."""

    def __init__(self):
        self._line: list[Turn] = []
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """How many stand in line, whoever has the device included."""
        return len(self._line)

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Stand in line; inside, call `wait` until it says True. Leaving the block leaves the line."""
        turn = Turn(self)
        with self._changed:
            self._line.append(turn)
        try:
            yield turn
        finally:
            with self._changed:
                self._line.remove(turn)
                self._changed.notify_all()


class Turn:
    """One place in the line."""

    def __init__(self, queue: DeviceQueue):
        self._queue = queue

    @property
    def position(self) -> int:
        """How many are in front, the one running included; 0 when it is our turn."""
        return self._queue._line.index(self)

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; whether it is our turn."""
        changed = self._queue._changed
        with changed:
            return changed.wait_for(lambda: self.position == 0, timeout)
