"""From a key to an engine: one model under one method on one device, for one loop."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmq.cache import cache_folder
from llmq.engine.base import Engine
from llmq.engine.hf import HFEngine
from llmq.methods import METHODS, Method
from llmq.methods.calibrate import FOLDER, file_name
from llmq.models.config import quantization_of
from llmq.models.loading import folder_of, load_model
from llmq.models.opening import Model
from llmq.models.quantized import require_method
from llmq.models.reference_text import CALIBRATION, WINDOW, fingerprint

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
        return _load_hf(key)


def _load_hf(key: Key) -> HFEngine:
    from safetensors.torch import load_file

    if key.device == "cpu":
        import torch

        from llmq.engine.llama_cpu import usable_threads

        torch.set_num_threads(usable_threads())
    statistics = load_file(statistics_file(key)) if needs_statistics(key) else None
    return HFEngine(load_model(key.model.source, key.method, key.device, statistics), key.method, key.device)


def loading_bytes(key: Key) -> int:
    """Tell how large the 16-bit model is that stands on a GPU while the method's weights are made of it; 0 where they
    come as they are, or are made one after the other on the way in, as in our own loop and by bitsandbytes."""
    method, source = key.method, key.model.source
    if key.loop != "hf" or not key.device.startswith("cuda") or method.dense or quantization_of(key.model.config):
        return 0
    if source.kind != "random" and "quantization_config" in method.load_arguments(key.device):
        return 0
    dense = next(one for one in METHODS.values() if one.dense and one.dtype == method.dtype)
    return dense.predict(key.model.shape).weights


def needs_statistics(key: Key) -> bool:
    """Whether the method is calibrated and there is something to quantize."""
    return key.method.calibrated and not quantization_of(key.model.config)


def statistics_file(key: Key) -> Path:
    """Tell where the statistics of a calibrated method are, or will be: beside a checkpoint that brings them, else in
    the cache, by checkpoint, text and what is collected."""
    if key.model.source.kind in ("folder", "hub"):
        brought = folder_of(key.model.source) / FOLDER / file_name(key.method)
        if brought.is_file():
            return brought
    text = f"{fingerprint(CALIBRATION)}-{key.method.calibration_windows}x{WINDOW}"
    return cache_folder() / FOLDER / f"{key.model.fingerprint}-{text}" / file_name(key.method)


def _load_lean(key: Key) -> Engine:
    from llmq.engine.llama_weights import load_weights
    from llmq.models.architecture import architecture_of

    method, eos_ids = key.method, key.model.eos_ids
    wanted = (key.model.tensors(), architecture_of(key.model.config.to_dict()), method, key.device)
    if key.device == "cpu":
        from llmq.engine.llama_cpu import CpuLlama
        from llmq.kernels.cpu import library

        weights = load_weights(*wanted, kernels=library, form=library.Packing())
        return CpuLlama(weights, method, eos_ids=eos_ids)
    from llmq.engine.llama_cuda import CudaLlama
    from llmq.kernels.backend import kernels_for

    kernels, slower = kernels_for(key.device)
    if slower:
        log.warning("%s", slower)
    weights = load_weights(*wanted, kernels=kernels)
    return CudaLlama(weights, method, key.device, kernels=kernels, eos_ids=eos_ids)


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
