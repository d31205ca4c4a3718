"""Repeatable figures of speed and memory, one method after the other, through the same door as everything else."""

from __future__ import annotations


def bench_named(kind: str) -> type:
    """The benchmark called `kind`."""
    from llmq.bench.generate import GenerateBench
    from llmq.bench.hooks import HooksBench
    from llmq.bench.peers import PeersBench
    from llmq.bench.speed import DecodeBench, LoadBench, PrefillBench

    benches = (DecodeBench, PrefillBench, LoadBench, PeersBench, HooksBench, GenerateBench)
    return {bench.kind: bench for bench in benches}[kind]
