"""Prefill and decode speed, memory and bandwidth of several methods on one device, one after the other.

Every figure is a median over repeats of the same generation after an uncounted warm-up; the number of tokens is fixed
(end-of-text does not stop a repeat), so every method does the same work. The read bandwidth is measured in the same
run, because a fraction of a datasheet's figure says nothing about a shared machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmq import memory
from llmq.bench.setup import Bench, read_bandwidth, require_whole
from llmq.contestants import Contestant
from llmq.engine.interface import Engine, capacity_for
from llmq.engine.residents import Key, Residents
from llmq.engine.sampling import SamplingSettings
from llmq.models.loading import Source, load_config


@dataclass(frozen=True, kw_only=True)
class DecodeBench(Bench):
    """The prompt is `prompt_tokens` tokens of a fixed text, fed as they are; `new_tokens` follow."""

    new_tokens: int = 64

    def __post_init__(self):
        super().__post_init__()
        require_whole("new_tokens", self.new_tokens, 2)


def bench_decode(bench: DecodeBench, report: Callable[[str], None] = lambda line: None) -> dict:
    """Run `bench`; the result has the stable keys of `bench --json`. `report` gets a line per finished method."""
    setup = bench.prepare(report, positions=bench.prompt_tokens + bench.new_tokens)
    bandwidth = read_bandwidth(bench.device)
    results = []
    for contestant, key in setup.entries:
        results.append(_measure(bench, key, contestant, setup.prompt_ids, bandwidth))
        report(f"{contestant.label}: {results[-1]['tokens_per_second']:.2f} tok/s")
    conditions = {"new_tokens": bench.new_tokens, "schedule": "in-turn"}
    return bench.result("decode", setup, results, **conditions) | {"read_bandwidth_bytes_per_second": bandwidth}


def _measure(bench: DecodeBench, key: Key, contestant: Contestant, prompt_ids: list[int], bandwidth: float) -> dict:
    residents = Residents()
    started = time.perf_counter()
    engine, load_seconds = residents.get(key)
    if contestant.threshold is not None:
        engine.set_threshold(contestant.threshold)
    engine.warm_up(prompt_ids)
    ready_seconds = time.perf_counter() - started
    runs = [_Repeat.of(engine, prompt_ids, bench.new_tokens) for _ in range(bench.repeats)]
    speeds = [run.tokens_per_second for run in runs]
    bytes_per_token = engine.read_bytes_per_token + _mean_kv_bytes(bench, key.source, engine)
    result = {
        "method": contestant.label,
        "engine": engine.name,
        "arithmetic": engine.handler.arithmetic(bench.device, engine.name),
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_min": min(speeds),
        "tokens_per_second_max": max(speeds),
        "wall_tokens_per_second": statistics.median(run.wall_tokens_per_second for run in runs),
        "prefill_seconds": statistics.median(run.prefill_seconds for run in runs),
        "bytes_per_token": bytes_per_token,
        "bandwidth_fraction": bytes_per_token * statistics.median(speeds) / bandwidth,
        "weight_bytes": engine.weight_bytes,
        "scale_bytes": engine.scale_bytes,
        "kv_bytes": runs[0].kv_bytes,
        "workspace_bytes": max(run.workspace_bytes for run in runs),
        "peak_bytes": engine.weight_bytes + engine.scale_bytes + max(run.peak_bytes for run in runs),
        "load_seconds": load_seconds,
        "ready_seconds": ready_seconds,
    }
    result |= _allocation(engine, key.source, prompt_ids)
    del engine
    freed = residents.drop(key)
    return result | {"memory_freed": freed.verified}


@dataclass(frozen=True)
class _Repeat:
    prefill_seconds: float
    tokens_per_second: float
    wall_tokens_per_second: float  # by the host's clock over all steps: whatever lies between steps counts too
    kv_bytes: int
    workspace_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, engine: Engine, prompt_ids: list[int], new_tokens: int) -> _Repeat:
        generation = engine.start(prompt_ids, SamplingSettings(max_new_tokens=new_tokens))
        prefill = generation.prefill()
        started = time.perf_counter()
        seconds = [generation.step().seconds for _ in range(new_tokens - 1)]
        wall = time.perf_counter() - started
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


def _mean_kv_bytes(bench: DecodeBench, source: Source, engine: Engine) -> int:
    """Bytes of keys and values read per token: those of the positions in use, halfway through the new tokens."""
    itemsize = 4 if engine.handler.dtype == "float32" else 2
    return memory.kv_bytes(load_config(source), tokens=bench.prompt_tokens + bench.new_tokens // 2, itemsize=itemsize)


def _allocation(engine: Engine, source: Source, prompt_ids: list[int]) -> dict:
    """With the prompt in the cache: the bytes predicted from the configuration, and torch's own count.

    `library_workspace_bytes` is scratch that cuBLAS keeps inside torch's allocator (about 32 MB a process, whatever
    the model), told apart by asking torch to drop it.
    """
    tokens = capacity_for(len(prompt_ids) + 1, engine.context) if engine.name == "lean" else len(prompt_ids)
    predicted = memory.predict(memory.meta_model(load_config(source)), engine.handler, tokens=tokens)
    found = {"predicted_bytes": predicted.weights + predicted.scales + predicted.kv}
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
