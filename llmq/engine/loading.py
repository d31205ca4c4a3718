"""From a key to an engine: one model under one method on one device, for one loop."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmq.engine.hf import HFEngine
from llmq.engine.interface import Engine
from llmq.methods import Method
from llmq.models.loading import load_model, require_method
from llmq.models.opening import Model

log = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@dataclass(frozen=True)
class Key:
    """What makes two loaded engines interchangeable. `method` has its live fields at their defaults, so contestants
    that differ in a threshold only share their weights. `loop`: 'hf' (transformers) or 'lean' (our own)."""

    model: Model
    method: Method
    device: str
    loop: str = "hf"

    @classmethod
    def of(cls, model: Model, method: Method, device: str, loop: str = "hf") -> Key:
        return cls(model, method.stored(), device, loop)


def load_engine(key: Key) -> Engine:
    """Load one model under one method on one device, for one loop."""
    require_method(key.model.source, key.model.config, key.method)
    from llmq.kernels.backend import current

    with _mapped_blocks(), current(key.device):
        if key.loop == "lean":
            return _load_lean(key)
        return HFEngine(load_model(key.model.source, key.method, key.device), key.method, key.device)


def _load_lean(key: Key) -> Engine:
    import torch

    from llmq.engine.llama_weights import load_weights
    from llmq.models.architecture import architecture_of

    method = key.method
    architecture, eos_ids = architecture_of(key.model.config.to_dict()), key.model.eos_ids
    wanted = {
        "dtype": getattr(torch, method.dtype),
        "int8": method.packed == "int8",
        "int8_head": method.int8_head,
        "device": key.device,
    }
    tensors = key.model.tensors()
    if key.device == "cpu":
        from llmq.engine.native import NativeEngine
        from llmq.kernels.cpu import library

        weights = load_weights(tensors, architecture, **wanted, kernels=library, form=library.Packing())
        return NativeEngine(weights, architecture, method, eos_ids=eos_ids)
    from llmq.engine.llama import LeanEngine
    from llmq.kernels.backend import kernels_for

    kernels, slower = kernels_for(key.device)
    if slower:
        log.warning("%s", slower)
    weights = load_weights(tensors, architecture, **wanted, kernels=kernels)
    return LeanEngine(weights, architecture, method, key.device, kernels=kernels, eos_ids=eos_ids)


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
