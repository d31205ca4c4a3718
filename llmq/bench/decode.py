"""Prefill and decode speed, memory and bandwidth of several methods on one device, one after the other.

Every figure is a median over repeats of the same generation after an uncounted warm-up; the number of tokens is fixed
(end-of-text does not stop a repeat), so every method does the same work. The read bandwidth is measured in the same
run, because a fraction of a datasheet's figure says nothing about a shared machine: before the first method and again
after each, and the faster one counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from llmq import memory
from llmq.bench.setup import Bench, Setup, bandwidth_fraction, read_bandwidth, require_whole
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
        kv = self._mean_kv_bytes(setup.model, engine)
        bytes_per_token = None if kv is None else engine.read_bytes_per_token + kv
        bandwidth = max(setup.facts["read_bandwidth_bytes_per_second"], read_bandwidth(self.device))
        return {
            "engine": engine.name,
            "arithmetic": engine.method.arithmetic(self.device, engine.name),
            "tokens_per_second": statistics.median(speeds),
            "tokens_per_second_min": min(speeds),
            "tokens_per_second_max": max(speeds),
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

    def _mean_kv_bytes(self, model: Model, engine: Engine) -> int | None:
        """Bytes of keys and values read per token: those of the positions in use, halfway through the new tokens."""
        itemsize = 4 if engine.method.dtype == "float32" else 2
        return memory.kv_bytes(model.config, tokens=self.prompt_tokens + self.new_tokens // 2, itemsize=itemsize)


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
        generation = engine.start(prompt_ids, SamplingSettings(max_new_tokens=new_tokens))
        prefill = generation.prefill()
        started = clock()
        seconds = [generation.step().seconds for _ in range(new_tokens - 1)]
        wall = clock() - started
        repeat = cls(
            prefill.seconds,
            len(seconds) / sum(seconds),
            len(seconds) / wall,
            generation.kv_bytes,
            generation.workspace_bytes,
            generation.peak_bytes,
        )
        generation.close()
        return repeat


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

    generation = engine.start(prompt_ids, SamplingSettings(max_new_tokens=1))
    generation.prefill()
    before = torch.cuda.memory_allocated(engine.device)
    torch._C._cuda_clearCublasWorkspaces()
    after = torch.cuda.memory_allocated(engine.device)
    generation.close()
    return found | {"allocated_bytes": after, "library_workspace_bytes": before - after}
