"""Loading: how long until the first token can be decoded, and the most memory the device held on the way."""

from __future__ import annotations

import os
from pathlib import Path

from llmq.bench.setup import Bench, Setup
from llmq.contestant import Contestant
from llmq.engine.loading import Key
from llmq.machine.door import Lease


class LoadBench(Bench):
    """Load each method once, in a process that has loaded nothing before the first; `repeats` is not used.

    `ready_seconds` is loading and everything a first token needs besides: kernels compiled or read from their cache,
    the graph captured. `kernel_cache` says which, by whether Triton's cache had anything in it at the start.
    """

    kind = "load"
    columns = ("method", "engine", "load_seconds", "ready_seconds", "weight_bytes", "peak_load_bytes")

    def conditions(self) -> dict:
        return {"kernel_cache": _kernel_cache()}

    def told(self, row: dict) -> str:
        return f"ready in {row['ready_seconds']:.1f} s"

    def measure(self, lease: Lease, contestant: Contestant, key: Key, setup: Setup) -> dict:
        level = _restart_peak(self.device)
        started = lease.clock()
        engine, load_seconds = lease.pool.get(key, contestant.method)
        peak = _peak(self.device)
        engine.warm_up(setup.prompt_ids)
        return {
            "engine": engine.name,
            "load_seconds": load_seconds,
            "ready_seconds": lease.clock() - started,
            "weight_bytes": engine.weight_bytes,
            "scale_bytes": engine.scale_bytes,
            "peak_load_bytes": None if peak is None else peak - level,
        }


def _kernel_cache() -> str:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache"))
    return "warm" if folder.is_dir() and any(folder.iterdir()) else "cold"


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
