"""Engines kept between questions: which are loaded, what they take, and memory that is seen to come back, or not."""

from __future__ import annotations

import pytest
import torch
from scripted import Clock, ScriptedEngine, in_order

from llmq import telemetry
from llmq.engine.loading import Key
from llmq.machine.pool import FreedMemory, Pool
from llmq.methods import METHODS, parse_method

WEIGHTS, SCALES, ROOM = 800, 200, 70


def key(method: str = "fp16", device: str = "cpu") -> Key:
    return Key.of("a model", METHODS[method], device)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(clock) -> Pool:
    def load(key: Key) -> ScriptedEngine:
        clock.take(3.0)
        sizes = {"weight_bytes": WEIGHTS, "scale_bytes": SCALES, "reserved_bytes": ROOM}
        return ScriptedEngine(clock, in_order([]), key.method, **sizes)

    return Pool(load, clock)


def read(monkeypatch, *readings: tuple[int, ...]) -> None:
    waiting = iter(readings)
    monkeypatch.setattr(telemetry, "used_bytes", lambda device: next(waiting))


@pytest.mark.parametrize(
    ("back", "verified"), [(0, False), (1, False), (500, False), (899, False), (900, True), (1000, True), (1400, True)]
)
@pytest.mark.parametrize("way", [0, 1])
def test_memory_counts_as_freed_once_nine_tenths_are_seen_to_come_back(back, verified, way, pool, monkeypatch):
    """In one of the ways in which the machine counts it; the other may show nothing, or even more in use."""
    pool.get(key())
    after = [5000, 5100]
    after[way] = 5000 - back
    read(monkeypatch, (5000, 5000), tuple(after))
    assert pool.drop(key()) == FreedMemory(expected_bytes=1000, freed_bytes=back, verified=verified)
    assert key() not in pool


def test_a_model_that_somebody_holds_is_not_freed_whatever_the_bytes_say(pool, monkeypatch):
    held = pool.get(key())[0].model
    read(monkeypatch, (5000,), (4000,))
    assert pool.drop(key()) == FreedMemory(expected_bytes=1000, freed_bytes=1000, verified=False)
    assert held is not None


@pytest.mark.parametrize(("held", "verified"), [(0, True), (1, False)], ids=["all", "half"])
def test_real_memory_of_which_half_comes_back_is_not_freed(held, verified, clock):
    size = 64 << 20
    halves = [torch.ones(size, dtype=torch.uint8) for _ in range(2)]
    kept = halves[:held]

    class Model:
        def __init__(self):
            self.tensors = list(halves)

    pool = Pool(lambda key: ScriptedEngine(clock, in_order([]), model=Model(), weight_bytes=2 * size))
    pool.get(key())
    halves.clear()
    freed = pool.drop(key())
    assert (freed.expected_bytes, freed.verified) == (2 * size, verified)
    assert freed.freed_bytes == pytest.approx((2 - held) * size, rel=0.05) and len(kept) == held


def test_what_is_not_there_is_free(pool):
    assert pool.drop(key()) == FreedMemory(0, 0, True)


def test_an_engine_is_loaded_once_and_its_seconds_are_those_of_loading(pool):
    engine, seconds = pool.get(key("llm-int8"))
    again, none = pool.get(key("llm-int8"), parse_method("llm-int8@2"))
    assert (seconds, none) == (3.0, 0.0) and again.model is engine.model
    assert (engine.method.threshold, again.method.threshold) == (6.0, 2.0)


def test_bytes_on_a_device_are_everything_its_engines_hold(pool):
    for wanted in (key(), key("fp32"), key("fp16", "cuda:0")):
        pool.get(wanted)
    assert pool.bytes_on("cpu") == 2 * (WEIGHTS + SCALES + ROOM) and pool.bytes_on("cuda:1") == 0
    pool.drop_others({key("fp32"), key("fp16", "cuda:0")})
    assert list(pool) == [key("fp32"), key("fp16", "cuda:0")]
    assert pool.bytes_on("cpu") == pool.bytes_on("cuda:0") == WEIGHTS + SCALES + ROOM
