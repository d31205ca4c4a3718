"""The line in front of the device: one at a time, and among those who wait whoever's address used it least comes first.

A web server's queue is not enough: a stopped run may still be inside a slow step when the next one begins. Here the
next run starts when the one before has really left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HALF_LIFE = 300.0  # seconds after which half of what an address has used is forgotten
LEAST_KEPT = 0.01  # seconds; less than that is forgotten at once


class DeviceQueue:
    """Hands the device to one `turn()` after the other: as they were asked for where they come from one address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._line: list[Turn] = []
        self._holder: Turn | None = None
        self._used: dict[str, tuple[float, float]] = {}  # address -> seconds, and when that was counted
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """How many stand in line, whoever has the device included."""
        return len(self._line)

    @contextmanager
    def turn(self, address: str = "") -> Iterator[Turn]:
        """Stand in line; inside, call `wait` until it says True. Leaving the block leaves the line."""
        turn = Turn(self, address)
        with self._changed:
            self._line.append(turn)
            self._hand_over()
        try:
            yield turn
        finally:
            with self._changed:
                self._line.remove(turn)
                if self._holder is turn:
                    self._count(turn)
                    self._holder = None
                    self._hand_over()
                self._changed.notify_all()

    def wake(self) -> None:
        """Let everybody who waits look again."""
        with self._changed:
            self._changed.notify_all()

    def _hand_over(self) -> None:
        if self._holder is None and self._line:
            self._holder = self._order()[0]
            self._holder.since = self._clock()

    def _order(self) -> list[Turn]:
        now = self._clock()
        waiting = sorted(self._line, key=lambda turn: self._seconds(turn.address, now))
        return sorted(waiting, key=lambda turn: turn is not self._holder)

    def _seconds(self, address: str, now: float) -> float:
        """What an address has used until `now`, old use counting less."""
        seconds, then = self._used.get(address, (0.0, 0.0))
        return seconds * 0.5 ** ((now - then) / HALF_LIFE)

    def _count(self, turn: Turn) -> None:
        now = self._clock()
        seconds = {address: self._seconds(address, now) for address in {*self._used, turn.address}}
        seconds[turn.address] += now - turn.since
        self._used = {address: (used, now) for address, used in seconds.items() if used >= LEAST_KEPT}


class Turn:
    """One place in the line."""

    def __init__(self, queue: DeviceQueue, address: str):
        self._queue, self.address, self.since = queue, address, 0.0

    @property
    def position(self) -> int:
        """How many are in front, the one running included; 0 when it is our turn."""
        return 0 if self._queue._holder is self else self._queue._order().index(self)

    def wait(self, timeout: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait at most `timeout` seconds, or until `until()`; whether it is our turn."""
        changed = self._queue._changed
        with changed:
            changed.wait_for(lambda: self.position == 0 or until(), timeout)
            return self.position == 0
