"""Engines kept in memory between questions, and their memory given back and seen to be given back."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmq import telemetry
from llmq.engine.base import Engine
from llmq.engine.loading import Key, load_engine
from llmq.methods import Method

VERIFIED_SHARE = 0.9  # of the expected bytes that must be seen to come back before memory counts as freed


@dataclass(frozen=True)
class FreedMemory:
    expected_bytes: int
    freed_bytes: int
    verified: bool


class Pool:
    """The engines in memory. `load(key)` makes one, timed by `clock`; tests pass their own."""

    def __init__(self, load: Callable[[Key], Engine] | None = None, clock: Callable[[], float] = time.monotonic):
        self._load, self._clock = load or load_engine, clock
        self._engines: dict[Key, Engine] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._engines

    def bytes_on(self, device: str) -> int:
        """What would come back if every engine on `device` were dropped."""
        engines = [engine for key, engine in self._engines.items() if key.device == device]
        return sum(e.weight_bytes + e.scale_bytes + e.reserved_bytes for e in engines)

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._engines))

    def get(self, key: Key, method: Method | None = None) -> tuple[Engine, float]:
        """The engine for `key`, loaded if need be, under `method` where live fields differ from the key's, and the
        seconds that loading took (0 when it was there)."""
        seconds = 0.0
        if key not in self._engines:
            started = self._clock()
            self._engines[key] = self._load(key)
            seconds = self._clock() - started
        return self._engines[key].under(method or key.method), seconds

    def drop_others(self, wanted: set[Key]) -> None:
        """Free every engine that is not wanted."""
        for key in [key for key in self._engines if key not in wanted]:
            self.drop(key)

    def drop(self, key: Key) -> FreedMemory:
        """Free one engine and look whether the memory came back: the model object dead, and the bytes seen again."""
        engine = self._engines.pop(key, None)
        if engine is None:
            reclaim(key.device)
            return FreedMemory(0, 0, True)
        expected = engine.weight_bytes + engine.scale_bytes
        model = weakref.ref(engine.model)
        before = telemetry.used_bytes(key.device)
        del engine
        reclaim(key.device)
        after = telemetry.used_bytes(key.device)
        freed = max(b - a for b, a in zip(before, after, strict=True))
        return FreedMemory(expected, freed, model() is None and freed >= VERIFIED_SHARE * expected)


def reclaim(device: str) -> None:
    """Give memory nobody refers to back to the device or the system."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps freed blocks; with this most of them go back to the system.
        ctypes.CDLL(None).malloc_trim(0)
