"""Decode and prefill speed, loading, memory and bandwidth of several methods on one device, one after the other.

Every figure of decoding is a median over repeats of the same generation after an uncounted warm-up; the number of
tokens is fixed (end-of-text does not stop a repeat), so every method does the same work. The read bandwidth is measured
in the same run, because a fraction of a datasheet's figure says nothing about a shared machine: before the first method
and again after each, and the faster one counts.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from llmq import memory
from llmq.bench.setup import Bench, Setup, bandwidth_fraction, read_bandwidth, require_whole, spread
from llmq.contestant import Contestant
from llmq.engine.base import Engine, capacity_for
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.machine.door import Lease
from llmq.models.opening import Model


@dataclass(frozen=True, kw_only=True)
class DecodeBench(Bench):
    """The prompt is `prompt_tokens` tokens of a fixed text, fed as they are; `new_tokens` follow."""

    kind = "decode"
    columns = ("method", "engine", "tokens_per_second", "prefill_seconds", "bandwidth_fraction", "weight_bytes")
    columns += ("peak_bytes",)
    new_tokens: int = 64

    def __post_init__(self):
        super().__post_init__()
        require_whole("new_tokens", self.new_tokens, 2)

    @property
    def positions(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def conditions(self) -> dict:
        return {"new_tokens": self.new_tokens, "schedule": "in-turn"}

    def facts(self) -> dict:
        return {"read_bandwidth_bytes_per_second": read_bandwidth(self.device)}

    def told(self, row: dict) -> str:
        return f"{row['tokens_per_second']:.2f} tok/s"

    def measure(self, lease: Lease, contestant: Contestant, key: Key, setup: Setup) -> dict:
        started = lease.clock()
        engine, load_seconds = lease.pool.get(key, contestant.method)
        engine.warm_up(setup.prompt_ids)
        ready_seconds = lease.clock() - started
        runs = [_Repeat.of(engine, setup.prompt_ids, self.new_tokens, lease.clock) for _ in range(self.repeats)]
        speeds = [run.tokens_per_second for run in runs]
        itemsize = 4 if engine.method.dtype == "float32" else 2
        halfway = self.prompt_tokens + self.new_tokens // 2  # positions in use, whose keys and values are read
        kv = memory.kv_bytes(setup.model.config, tokens=halfway, itemsize=itemsize)
        bytes_per_token = None if kv is None else engine.read_bytes_per_token + kv
        bandwidth = max(setup.facts["read_bandwidth_bytes_per_second"], read_bandwidth(self.device))
        return {
            "engine": engine.name,
            "arithmetic": engine.method.arithmetic(self.device, engine.name),
            **spread("tokens_per_second", speeds),
            "wall_tokens_per_second": statistics.median(run.wall_tokens_per_second for run in runs),
            "prefill_seconds": statistics.median(run.prefill_seconds for run in runs),
            "bytes_per_token": bytes_per_token,
            "bandwidth_fraction": bandwidth_fraction(bytes_per_token, statistics.median(speeds), bandwidth),
            "weight_bytes": engine.weight_bytes,
            "scale_bytes": engine.scale_bytes,
            "kv_bytes": runs[0].kv_bytes,
            "workspace_bytes": max(run.workspace_bytes for run in runs),
            "peak_bytes": engine.weight_bytes + engine.scale_bytes + max(run.peak_bytes for run in runs),
            "load_seconds": load_seconds,
            "ready_seconds": ready_seconds,
            **_allocation(engine, setup.model, setup.prompt_ids),
        }


@dataclass(frozen=True)
class _Repeat:
    prefill_seconds: float
    tokens_per_second: float
    wall_tokens_per_second: float  # by the host's clock over all steps: whatever lies between steps counts too
    kv_bytes: int
    workspace_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, engine: Engine, prompt_ids: list[int], new_tokens: int, clock: Callable[[], float]) -> _Repeat:
        with closing(engine.start(prompt_ids, SamplingSettings(max_new_tokens=new_tokens))) as generation:
            prefill = generation.prefill()
            started = clock()
            seconds = [generation.step().seconds for _ in range(new_tokens - 1)]
            speeds = len(seconds) / sum(seconds), len(seconds) / (clock() - started)
            kept = generation.kv_bytes, generation.workspace_bytes, generation.peak_bytes
        return cls(prefill.seconds, *speeds, *kept)


def _allocation(engine: Engine, model: Model, prompt_ids: list[int]) -> dict:
    """With the prompt in the cache: the bytes predicted from the configuration, and torch's own count.

    `library_workspace_bytes` is scratch that cuBLAS keeps inside torch's allocator (about 32 MB a process, whatever
    the model), told apart by asking torch to drop it.
    """
    tokens = capacity_for(len(prompt_ids) + 1, engine.context) if engine.name == "lean" else len(prompt_ids)
    predicted = memory.predict(model.shape, engine.method, tokens=tokens)
    known = predicted.kv is not None
    found = {"predicted_bytes": predicted.weights + predicted.scales + predicted.kv if known else None}
    if not engine.device.startswith("cuda"):
        return found | {"allocated_bytes": None, "library_workspace_bytes": None}
    import torch

    with closing(engine.start(prompt_ids, SamplingSettings(max_new_tokens=1))) as generation:
        generation.prefill()
        before = torch.cuda.memory_allocated(engine.device)
        torch._C._cuda_clearCublasWorkspaces()
        after = torch.cuda.memory_allocated(engine.device)
    return found | {"allocated_bytes": after, "library_workspace_bytes": before - after}


class PrefillBench(Bench):
    """Median seconds of each method's prefill after an uncounted one of the same prompt."""

    kind = "prefill"
    columns = ("method", "engine", "seconds", "tokens_per_second", "workspace_bytes")

    def told(self, row: dict) -> str:
        return f"{row['seconds'] * 1e3:.1f} ms"

    def measure(self, lease: Lease, contestant: Contestant, key: Key, setup: Setup) -> dict:
        engine = lease.get(key, contestant.method)
        engine.warm_up(setup.prompt_ids)
        seconds, workspace = zip(*(_once(engine, setup.prompt_ids) for _ in range(self.repeats)), strict=True)
        return {
            "engine": engine.name,
            **spread("seconds", seconds),
            "tokens_per_second": len(setup.prompt_ids) / statistics.median(seconds),
            "weight_bytes": engine.weight_bytes,
            "workspace_bytes": max(workspace),
        }


def _once(engine: Engine, prompt_ids: list[int]) -> tuple[float, int]:
    """Seconds of one prefill, and the bytes it needed beyond weights and cache."""
    with closing(engine.start(prompt_ids, SamplingSettings(max_new_tokens=1))) as generation:
        return generation.prefill().seconds, generation.workspace_bytes


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
