"""Prefill speed: the time to read a prompt of a given length and sample the first token."""

from __future__ import annotations

import statistics

from llmq.bench.setup import Bench, Setup
from llmq.contestant import Contestant
from llmq.engine.base import Engine
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.machine.door import Lease


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
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "tokens_per_second": len(setup.prompt_ids) / statistics.median(seconds),
            "weight_bytes": engine.weight_bytes,
            "workspace_bytes": max(workspace),
        }


def _once(engine: Engine, prompt_ids: list[int]) -> tuple[float, int]:
    """Seconds of one prefill, and the bytes it needed beyond weights and cache."""
    generation = engine.start(prompt_ids, SamplingSettings(max_new_tokens=1))
    seconds = generation.prefill().seconds
    generation.close()
    return seconds, generation.workspace_bytes
