"""Prefill and decode speed, memory and bandwidth of several methods on one device, one after the other.

Every figure is a median over repeats of the same generation after an uncounted warm-up; the number of tokens is fixed
(end-of-text does not stop a repeat), so every method does the same work. The read bandwidth is measured in the same
run, because a fraction of a datasheet's figure says nothing about a shared machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmq import memory
from llmq.contestants import Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.interface import Engine, capacity_for
from llmq.engine.residents import Key, Residents
from llmq.engine.sampling import SamplingSettings
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.models.loading import Source, ids_within, load_config, load_tokenizer, prepare, resolve

BANDWIDTH_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
BANDWIDTH_REPEATS = 9


@dataclass(frozen=True, kw_only=True)
class DecodeBench:
    """What to measure. The prompt is `prompt_tokens` tokens of a fixed text, fed as they are."""

    model: str = "demo"
    contestants: tuple[Contestant, ...]
    device: str = "cpu"
    random_weights: bool = False
    prompt_tokens: int = 64
    new_tokens: int = 64
    repeats: int = 5
    engine: str = "auto"

    def __post_init__(self):
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < (2 if name == "new_tokens" else 1):
                raise BadChoice(f"{name} is {value!r}; choose a whole number of at least 1 (2 for new_tokens)")


def bench_decode(bench: DecodeBench, report: Callable[[str], None] = lambda line: None) -> dict:
    """Run `bench`; the result has the stable keys of `bench --json`. `report` gets a line per finished method."""
    source = resolve(bench.model, random_weights=bench.random_weights)
    for progress in prepare(source):
        report(progress.message)
    config = load_config(source)
    prompt_ids = ids_within(config, fixed_prompt(load_tokenizer(source), bench.prompt_tokens))
    bandwidth = read_bandwidth(bench.device)
    results = []
    methods = [contestant.method for contestant in bench.contestants]
    # One after the other and each labelled with its loop: each takes the best it has, also where there are two.
    loops = [choose_engines(bench.engine, [method], config.to_dict(), bench.device)[0] for method in methods]
    for contestant, loop in zip(bench.contestants, loops, strict=True):
        key = Key(source, contestant.label, contestant.method, bench.device, loop)
        results.append(_measure(bench, key, contestant, prompt_ids, bandwidth))
        report(f"{contestant.label}: {results[-1]['tokens_per_second']:.2f} tok/s")
    return {
        "kind": "decode",
        "device": bench.device,
        "model": bench.model,
        "conditions": {
            "random_weights": bench.random_weights,
            "prompt_tokens": bench.prompt_tokens,
            "new_tokens": bench.new_tokens,
            "repeats": bench.repeats,
            "batch": 1,
            "schedule": "in-turn",
            **describe(bench.device, source),
        },
        "read_bandwidth_bytes_per_second": bandwidth,
        "results": results,
    }


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
        "arithmetic": engine.handler.arithmetic(bench.device),
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


def fixed_prompt(tokenizer, tokens: int) -> list[int]:
    """The first `tokens` token ids of the reference text."""
    from llmq.bench.quality import reference_text

    ids = tokenizer(reference_text()[: 20 * tokens + 200], add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise BadChoice(f"prompt_tokens is {tokens}; the reference text gives {len(ids)}")
    return ids[:tokens]


def read_bandwidth(device: str) -> float:
    """Bytes per second this device reads from memory: the median time to sum a tensor much larger than its caches."""
    import torch

    cuda = device.startswith("cuda")
    data = torch.ones(BANDWIDTH_BYTES["cuda" if cuda else "cpu"] // 4, dtype=torch.float32, device=device)
    return data.nbytes / statistics.median(list(_sum_seconds(data, cuda))[2:])


def _sum_seconds(data, cuda: bool) -> Iterator[float]:
    import torch

    for _ in range(BANDWIDTH_REPEATS + 2):  # the first two warm up
        if cuda:
            torch.cuda.synchronize(data.device)
        started = time.perf_counter()
        data.sum().item()
        yield time.perf_counter() - started
