"""Repeatable figures of speed and memory, one method after the other, through the same door as everything else."""

from __future__ import annotations


def bench_named(kind: str) -> type:
    """The benchmark called `kind`."""
    from llmq.bench.hooks import HooksBench
    from llmq.bench.peers import PeersBench
    from llmq.bench.speed import DecodeBench, LoadBench, PrefillBench

    return {bench.kind: bench for bench in (DecodeBench, PrefillBench, LoadBench, PeersBench, HooksBench)}[kind]
