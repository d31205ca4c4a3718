"""Repeatable figures of speed and memory, in rounds in which everybody has a turn, through the one door."""

from __future__ import annotations


def bench_named(kind: str) -> type:
    """The benchmark called `kind`."""
    from llmq.bench.generate import GenerateBench
    from llmq.bench.hooks import HooksBench
    from llmq.bench.peers import PeersBench
    from llmq.bench.speed import DecodeBench, LoadBench, PrefillBench

    benches = (DecodeBench, PrefillBench, LoadBench, PeersBench, HooksBench, GenerateBench)
    return {bench.kind: bench for bench in benches}[kind]
