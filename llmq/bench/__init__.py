"""Repeatable figures of speed and memory, in rounds in which everybody has a turn, through the one door."""

from __future__ import annotations


def bench_named(kind: str) -> type:
    """The benchmark called `kind`."""
    from llmq.bench.batch import BatchBench
    from llmq.bench.energy import EnergyBench
    from llmq.bench.generate import GenerateBench
    from llmq.bench.hooks import HooksBench
    from llmq.bench.peers import PeersBench
    from llmq.bench.speed import DecodeBench, LoadBench, PrefillBench
    from llmq.bench.stages import StagesBench

    benches = (DecodeBench, PrefillBench, LoadBench, PeersBench, HooksBench, GenerateBench, StagesBench, BatchBench)
    return {bench.kind: bench for bench in (*benches, EnergyBench)}[kind]
