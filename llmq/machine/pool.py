"""Engines kept in memory between questions, and their memory given back and seen to be given back."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llmq import telemetry
from llmq.devices import share_on
from llmq.engine.base import Engine
from llmq.engine.loading import Key, load_engine
from llmq.methods import Method

VERIFIED_SHARE = 0.9  # of the expected bytes that must be seen to come back before memory counts as freed
SHARE_OF_FREE = {"cuda": 0.9, "cpu": 0.6}  # of what is free at first, which the pool takes unless it is told how much


@dataclass(frozen=True)
class FreedMemory:
    expected_bytes: int
    freed_bytes: int
    verified: bool


class Pool:
    """The engines in memory. `load(key)` makes one, timed by `clock`; tests pass their own.

    `most_bytes` on each device: before more is loaded, the least recently used go, but for those that the question
    under way has asked for (since `begin`). None: a share of what is free there when the first one is loaded.
    """

    def __init__(
        self,
        load: Callable[[Key], Engine] | None = None,
        clock: Callable[[], float] = time.monotonic,
        most_bytes: int | None = None,
    ):
        self._load, self._clock, self.most_bytes = load or load_engine, clock, most_bytes
        self._engines: dict[Key, Engine] = {}  # the least recently used first
        self._in_use: set[Key] = set()
        self._shares: dict[str, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._engines

    def bytes_on(self, device: str) -> int:
        """What would come back there if every engine on `device` were dropped; one that is spread lies evenly."""
        return sum(int(share_on(device, key.device) * _bytes(engine)) for key, engine in self._engines.items())

    def limit_on(self, device: str) -> int:
        """The most bytes that engines between questions take on `device`."""
        if self.most_bytes is not None:
            return self.most_bytes
        if device not in self._shares:
            share = SHARE_OF_FREE[device.partition(":")[0]]
            self._shares[device] = int(share * (telemetry.free_bytes(device) + self.bytes_on(device)))
        return self._shares[device]

    def begin(self) -> None:
        """Another question begins: nothing is in use."""
        self._in_use = set()

    def make_room(self, device: str, needed: int) -> None:
        """Drop the least recently used engines that are not in use until `needed` bytes more are within the limit."""
        for key in [key for key in self if share_on(device, key.device) and key not in self._in_use]:
            if self.bytes_on(device) + needed <= self.limit_on(device):
                return
            self.drop(key)

    def emptied(self) -> Pool:
        """Another one like this, with nothing in it."""
        return Pool(self._load, self._clock, self.most_bytes)

    def forget(self) -> None:
        """Let go of every engine without waiting for its memory: something that hangs may hold it."""
        self._engines.clear()

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._engines))

    def get(self, key: Key, method: Method | None = None) -> tuple[Engine, float]:
        """The engine for `key`, loaded if need be, under `method` where live fields differ from the key's, and the
        seconds that loading took (0 when it was there)."""
        seconds = 0.0
        self._in_use.add(key)
        engine = self._engines.pop(key, None)
        if engine is None:
            started = self._clock()
            engine = self._load(key)
            seconds = self._clock() - started
        self._engines[key] = engine
        self.make_room(key.device, 0)  # what its prediction or nobody foresaw
        return engine.under(method or key.method), seconds

    def drop_others(self, wanted: set[Key]) -> None:
        """Free every engine that is not wanted."""
        for key in [key for key in self._engines if key not in wanted]:
            self.drop(key)

    def drop(self, key: Key) -> FreedMemory:
        """Free one engine and look whether the memory came back: the model object dead, and the bytes seen again."""
        engine = self._engines.get(key)
        if engine is None:
            reclaim(key.device)
            return FreedMemory(0, 0, True)
        expected, model = engine.weight_bytes + engine.scale_bytes, weakref.ref(engine.model)
        del engine
        freed = watched_release(key.device, expected, lambda: self._engines.pop(key))
        return replace(freed, verified=freed.verified and model() is None)


def watched_release(device: str, expected: int, release: Callable[[], object]) -> FreedMemory:
    """Let go of something and look whether its bytes are seen to come back."""
    before = telemetry.used_bytes(device)
    release()
    reclaim(device)
    freed = max(b - a for b, a in zip(before, telemetry.used_bytes(device), strict=True))
    return FreedMemory(expected, freed, freed >= VERIFIED_SHARE * expected)


def _bytes(engine: Engine) -> int:
    return engine.weight_bytes + engine.scale_bytes + engine.reserved_bytes


def reclaim(device: str) -> None:
    """Give memory nobody refers to back to the device or the system."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps freed blocks; with this most of them go back to the system.
        ctypes.CDLL(None).malloc_trim(0)
