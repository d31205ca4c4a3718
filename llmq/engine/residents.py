"""Loaded engines, kept between runs, the line in front of the device they are on, and the thread they run in."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmq import telemetry
from llmq.engine.hf import HFEngine
from llmq.engine.interface import Engine
from llmq.engine.thread import ComputeThread
from llmq.engine.turns import Turnstile
from llmq.models.loading import Source, eos_ids_of, load_config, load_model, open_tensors, require_method
from llmq.quant import Handler, method_named

log = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
VERIFIED_SHARE = 0.9  # of the expected bytes that must be seen to come back before memory counts as freed


@dataclass(frozen=True)
class Key:
    """What makes two loaded models interchangeable. Two contestants with one method and two thresholds are two keys."""

    source: Source
    label: str
    method: str
    device: str
    engine: str = "hf"


@dataclass(frozen=True)
class FreedMemory:
    expected_bytes: int
    freed_bytes: int
    verified: bool


class Residents:
    """The engines in memory. `load(key)` makes one; tests pass their own."""

    def __init__(self, load: Callable[[Key], Engine] | None = None):
        self._load = load or load_engine
        self._engines: dict[Key, Engine] = {}
        self.turnstile, self.thread = Turnstile(), ComputeThread()

    def __contains__(self, key: Key) -> bool:
        return key in self._engines

    def bytes_on(self, device: str) -> int:
        """What would come back if every engine on `device` were dropped."""
        engines = [engine for key, engine in self._engines.items() if key.device == device]
        return sum(e.weight_bytes + e.scale_bytes + e.room_bytes for e in engines)

    def get(self, key: Key) -> tuple[Engine, float]:
        """The engine for `key`, loaded if need be, and the seconds that took (0 when it was resident)."""
        if engine := self._engines.get(key):
            return engine, 0.0
        started = time.perf_counter()
        engine = self._engines[key] = self._load(key)
        return engine, time.perf_counter() - started

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


def load_engine(key: Key) -> Engine:
    """Load one model under one method on one device, for one loop."""
    handler = method_named(key.method).handler
    require_method(key.source, load_config(key.source), handler)
    from llmq.kernels.backend import current

    with _mapped_blocks(), current(key.device):
        if key.engine == "lean":
            return _load_lean(key, handler)
        return HFEngine(load_model(key.source, handler, key.device), handler, key.device)


def _load_lean(key: Key, handler: Handler) -> Engine:
    import torch

    from llmq.engine.llama_weights import load_weights
    from llmq.models.architecture import architecture_of

    config = load_config(key.source)
    architecture, eos_ids = architecture_of(config.to_dict()), eos_ids_of(key.source, config)
    wanted = {
        "dtype": getattr(torch, handler.dtype),
        "int8": handler.lean_weights == "int8",
        "int8_head": handler.int8_head,
        "device": key.device,
    }
    tensors = open_tensors(key.source)
    if key.device == "cpu":
        from llmq.engine.native import NativeEngine
        from llmq.kernels.cpu import library

        weights = load_weights(tensors, architecture, **wanted, kernels=library, form=library.Packing())
        return NativeEngine(weights, architecture, handler, eos_ids=eos_ids)
    from llmq.engine.llama import LeanEngine
    from llmq.kernels.backend import kernels_for

    kernels, slower = kernels_for(key.device)
    if slower:
        log.warning("%s", slower)
    weights = load_weights(tensors, architecture, **wanted, kernels=kernels)
    return LeanEngine(weights, architecture, handler, key.device, kernels=kernels, eos_ids=eos_ids)


@contextmanager
def _mapped_blocks() -> Iterator[None]:
    """While inside, glibc maps every block of 64 KiB or more by itself, so that a freed weight goes back at once.

    By default it raises that limit as large blocks are freed and never trims the tops of its threads' heaps: up to two
    thirds of a freed model stayed resident (measured). Afterwards the limit is glibc's highest, 32 MiB, so that the
    short-lived blocks of a forward pass are reused and not mapped anew.
    """
    if sys.platform != "linux":
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 * 1024 * 1024)


def reclaim(device: str) -> None:
    """Give memory nobody refers to back to the device or the system."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps freed blocks; with this most of them go back to the system.
        ctypes.CDLL(None).malloc_trim(0)
