"""How often an address may guess a password: a few at once, then one every few seconds. No gradio."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

AT_ONCE = 10
EVERY_SECONDS = 2.0
ADDRESSES = 10_000  # remembered; the one not heard of for the longest is forgotten


class Guesses:
    """Counts the guesses of every address that are not known to be right. `clock` gives seconds."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, at_once: int = AT_ONCE,
        every_seconds: float = EVERY_SECONDS,
    ):  # fmt: skip
        self._clock, self._at_once, self._every_seconds = clock, at_once, every_seconds
        self._free_at: OrderedDict[str, float] = OrderedDict()  # when every guess so far is forgotten

    def take(self, address: str) -> float:
        """Count one guess and return 0.0; too many, and it is not counted: the seconds until the next may come."""
        now = self._clock()
        free_at = max(self._free_at.get(address, now), now)
        if (early := free_at - now - (self._at_once - 1) * self._every_seconds) > 0:
            return early
        self._free_at[address] = free_at + self._every_seconds
        self._free_at.move_to_end(address)
        while len(self._free_at) > ADDRESSES:
            self._free_at.popitem(last=False)
        return 0.0

    def give_back(self, address: str) -> None:
        """It was right."""
        if address in self._free_at:
            self._free_at[address] -= self._every_seconds
