"""Loading: how long until the first token can be decoded, and the most memory the device held on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from llmq.bench.setup import Bench
from llmq.contestants import Contestant
from llmq.engine.residents import Key, Residents


def bench_load(bench: Bench, report: Callable[[str], None] = lambda line: None) -> dict:
    """Load each method once, in a process that has loaded nothing before the first; `repeats` is not used.

    `ready_seconds` is loading and everything a first token needs besides: kernels compiled or read from their cache,
    the graph captured. `kernel_cache` says which, by whether Triton's cache had anything in it at the start.
    """
    cache = _kernel_cache()
    setup = bench.prepare(report)
    results = []
    for contestant, key in setup.entries:
        results.append(_measure(bench, contestant, key, setup.prompt_ids))
        report(f"{contestant.label}: ready in {results[-1]['ready_seconds']:.1f} s")
    return bench.result("load", setup, results, kernel_cache=cache)


def _kernel_cache() -> str:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache"))
    return "warm" if folder.is_dir() and any(folder.iterdir()) else "cold"


def _measure(bench: Bench, contestant: Contestant, key: Key, prompt_ids: list[int]) -> dict:
    residents, level = Residents(), _restart_peak(bench.device)
    started = time.perf_counter()
    engine, load_seconds = residents.get(key)
    peak = _peak(bench.device)
    engine.warm_up(prompt_ids)
    row = {
        "method": contestant.label,
        "engine": engine.name,
        "load_seconds": load_seconds,
        "ready_seconds": time.perf_counter() - started,
        "weight_bytes": engine.weight_bytes,
        "scale_bytes": engine.scale_bytes,
        "peak_load_bytes": None if peak is None else peak - level,
    }
    del engine
    return row | {"memory_freed": residents.drop(key).verified}


def _restart_peak(device: str) -> int:
    """Bytes the device's allocator holds now; its high-water mark starts here."""
    if not device.startswith("cuda"):
        return 0
    import torch

    torch.cuda.init()  # the first to ask for statistics must not be the first to use the device
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: str) -> int | None:
    """The allocator's high-water mark; None on a CPU, which has none to ask."""
    if not device.startswith("cuda"):
        return None
    import torch

    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
