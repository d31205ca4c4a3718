"""Engines kept between questions: which are loaded, what they take, and memory that is seen to come back, or not."""

from __future__ import annotations

import pytest
import torch
from scripted import Clock, ScriptedEngine, in_order

from llmq import telemetry
from llmq.engine.loading import Key
from llmq.machine.pool import FreedMemory, Pool
from llmq.methods import METHODS, parse_method

WEIGHTS, SCALES, RESERVED = 800, 200, 70


def key(method: str = "fp16", device: str = "cpu") -> Key:
    return Key.of("a model", METHODS[method], device)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(clock) -> Pool:
    def load(key: Key) -> ScriptedEngine:
        clock.take(3.0)
        sizes = {"weight_bytes": WEIGHTS, "scale_bytes": SCALES, "reserved_bytes": RESERVED}
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
    assert pool.bytes_on("cpu") == 2 * (WEIGHTS + SCALES + RESERVED) and pool.bytes_on("cuda:1") == 0
    pool.drop_others({key("fp32"), key("fp16", "cuda:0")})
    assert list(pool) == [key("fp32"), key("fp16", "cuda:0")]
    assert pool.bytes_on("cpu") == pool.bytes_on("cuda:0") == WEIGHTS + SCALES + RESERVED


def keys_of(*names: str) -> list[Key]:
    return [Key.of(name, METHODS["fp16"], "cpu") for name in names]


def held(pool: Pool) -> list[str]:
    return [key.model for key in pool]


def test_the_least_recently_used_goes_when_the_limit_is_reached(pool):
    pool.most_bytes = 3 * (WEIGHTS + SCALES + RESERVED)
    a, b, c, d = keys_of("a", "b", "c", "d")
    for wanted in (a, b, c, a):
        pool.begin()
        pool.get(wanted)
    pool.begin()
    pool.get(d)
    assert held(pool) == ["c", "a", "d"]


def test_what_the_question_under_way_uses_stays_whatever_the_limit(pool):
    pool.most_bytes = 1
    for wanted in keys_of("a", "b", "c"):
        pool.get(wanted)
    assert held(pool) == ["a", "b", "c"]
    pool.begin()
    pool.get(*keys_of("d"))
    assert held(pool) == ["d"]


def test_room_is_made_before_something_is_loaded(pool):
    pool.most_bytes = 2 * (WEIGHTS + SCALES + RESERVED)
    for wanted in keys_of("a", "b"):
        pool.get(wanted)
    pool.begin()
    pool.make_room("cpu", WEIGHTS + SCALES + RESERVED)
    assert held(pool) == ["b"]
    pool.make_room("cuda:0", 10**9)
    assert held(pool) == ["b"], "another device's models are not in the way"


def test_two_hundred_thresholds_are_one_model(pool):
    for tenths in range(200):
        pool.begin()
        method = parse_method(f"llm-int8@{tenths / 10}")
        assert pool.get(Key.of("a model", method, "cpu"), method)[0].method == method
    assert pool.bytes_on("cpu") == WEIGHTS + SCALES + RESERVED


def test_without_a_limit_the_pool_takes_a_share_of_what_is_free(pool, monkeypatch):
    monkeypatch.setattr(telemetry, "free_bytes", lambda device: 10_000)
    assert (pool.limit_on("cpu"), pool.limit_on("cuda:0")) == (6_000, 9_000)
    monkeypatch.setattr(telemetry, "free_bytes", lambda device: 1)
    assert pool.limit_on("cpu") == 6_000, "the share of what was free at first"
