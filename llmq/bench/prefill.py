"""Prefill speed: the time to read a prompt of a given length and sample the first token."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from llmq.bench.setup import Bench
from llmq.contestants import Contestant
from llmq.engine.interface import Engine
from llmq.engine.residents import Key, Residents
from llmq.engine.sampling import SamplingSettings


def bench_prefill(bench: Bench, report: Callable[[str], None] = lambda line: None) -> dict:
    """Median seconds of each method's prefill after an uncounted one of the same prompt."""
    setup = bench.prepare(report)
    results = []
    for contestant, key in setup.entries:
        results.append(_measure(bench, contestant, key, setup.prompt_ids))
        report(f"{contestant.label}: {results[-1]['seconds'] * 1e3:.1f} ms")
    return bench.result("prefill", setup, results)


def _measure(bench: Bench, contestant: Contestant, key: Key, prompt_ids: list[int]) -> dict:
    residents = Residents()
    engine, _ = residents.get(key)
    if contestant.threshold is not None:
        engine.set_threshold(contestant.threshold)
    engine.warm_up(prompt_ids)
    seconds, workspace = zip(*(_once(engine, prompt_ids) for _ in range(bench.repeats)), strict=True)
    row = {
        "method": contestant.label,
        "engine": engine.name,
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "tokens_per_second": len(prompt_ids) / statistics.median(seconds),
        "weight_bytes": engine.weight_bytes,
        "workspace_bytes": max(workspace),
    }
    del engine
    return row | {"memory_freed": residents.drop(key).verified}


def _once(engine: Engine, prompt_ids: list[int]) -> tuple[float, int]:
    """Seconds of one prefill, and the bytes it needed beyond weights and cache."""
    generation = engine.start(prompt_ids, SamplingSettings(max_new_tokens=1))
    seconds = generation.prefill().seconds
    generation.close()
    return seconds, generation.workspace_bytes
