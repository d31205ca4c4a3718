"""What a benchmark makes of known times: engines that follow a script, a clock that moves only with them."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from planted import hooks_left
from scripted import Clock, Script, ScriptedEngine, in_order

from llmq.bench import setup, speed
from llmq.bench.hooks import HooksBench
from llmq.bench.setup import bandwidth_fraction, read_bandwidth
from llmq.bench.speed import DecodeBench, LoadBench, PrefillBench
from llmq.contestant import Contestant
from llmq.events import Progress
from llmq.inspect.recorder import OutlierRecorder
from llmq.labs.thresholds import Thresholds, decode_seconds
from llmq.machine.door import Lease, Machine

KV_BYTES_A_TOKEN = {"fp16": 128, "fp32": 256}  # of the tiny model
REPEATS = [  # three repeats of a prompt of 5 and 5 new tokens, the first of which belongs to the prefill
    Script(3.0, (0.0625,) * 4, between=0.4375, kv_bytes=7, workspace_bytes=30, peak_bytes=400),
    Script(1.0, (0.5, 0.75, 0.25, 0.5), between=0.5, kv_bytes=8, workspace_bytes=10, peak_bytes=900),
    Script(8.0, (0.125, 0.5, 0.125, 0.25), kv_bytes=9, workspace_bytes=20, peak_bytes=200),
]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def machine_of(clock: Clock, scripts, *, load_seconds: float = 0.0, **engine) -> Machine:
    """Every engine that it loads takes `load_seconds` to load and then follows `scripts` from the first on."""

    def make(key):
        clock.take(load_seconds)
        return ScriptedEngine(clock, in_order(scripts), key.method, **engine)

    return Machine(make, clock=clock)


def measured(bench, machine: Machine) -> tuple[dict, list[str]]:
    """The result, and what was told on the way."""
    seen = list(machine.run(bench))
    return seen[-1], [item.message for item in seen if isinstance(item, Progress)]


def settings(folder, methods: str = "fp16", **more) -> dict:
    contestants = tuple(Contestant.parse(name) for name in methods.split(","))
    return {"model": str(folder), "contestants": contestants, "prompt_tokens": 5, "repeats": 3, "engine": "hf", **more}


def test_decode_figures_are_those_of_the_steps(tiny_folder, clock, monkeypatch):
    readings = iter([100_000.0, 20_000.0, 200_000.0])  # before everything, after each method: the fastest so far counts
    monkeypatch.setattr(speed, "read_bandwidth", lambda device: next(readings))
    sizes = {"weight_bytes": 3000, "scale_bytes": 200, "read_bytes_per_token": 10_000}
    machine = machine_of(clock, REPEATS, load_seconds=3.0, warm_up_seconds=5.0, **sizes)
    result, told = measured(DecodeBench(**settings(tiny_folder, "fp16,fp32", new_tokens=5)), machine)
    assert result["read_bandwidth_bytes_per_second"] == 100_000 and result["conditions"]["new_tokens"] == 5
    assert [message for message in told if "tok/s" in message] == ["fp16: 4.00 tok/s", "fp32: 4.00 tok/s"]
    for row, bandwidth in zip(result["results"], (100_000, 200_000), strict=True):
        read = 10_000 + KV_BYTES_A_TOKEN[row["method"]] * (5 + 2)  # halfway through the new tokens
        expected = {
            "tokens_per_second": 4.0,  # of 16, 2 and 4
            "tokens_per_second_min": 2.0,
            "tokens_per_second_max": 16.0,
            "wall_tokens_per_second": 2.0,  # of 2, 1 and 4
            "prefill_seconds": 3.0,
            "bytes_per_token": read,
            "bandwidth_fraction": read * 4.0 / bandwidth,
            "weight_bytes": 3000,
            "scale_bytes": 200,
            "kv_bytes": 7,
            "workspace_bytes": 30,
            "peak_bytes": 3000 + 200 + 900,
            "load_seconds": 3.0,
            "ready_seconds": 8.0,
        }
        assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize(("name", "tokens"), [("hf", 5), ("lean", 128)], ids=["hf", "lean"])
def test_predicted_bytes_have_the_cache_that_the_loop_allocates(name, tokens, tiny_folder, clock, monkeypatch):
    monkeypatch.setattr(speed, "read_bandwidth", lambda device: 1e9)
    bench = DecodeBench(**settings(tiny_folder, new_tokens=5))
    row = measured(bench, machine_of(clock, REPEATS, name=name))[0]["results"][0]
    model = tiny_llama()
    weights = sum(p.nbytes // 2 for p in model.parameters()) + sum(buffer.nbytes for buffer in model.buffers())
    assert row["predicted_bytes"] == weights + KV_BYTES_A_TOKEN["fp16"] * tokens
    assert row["allocated_bytes"] is None, "a CPU has no allocator to ask"


def test_prefill_figures_are_those_of_the_prefill(tiny_folder, clock):
    scripts = [replace(script, steps=()) for script in REPEATS]
    result, told = measured(PrefillBench(**settings(tiny_folder)), machine_of(clock, scripts, warm_up_seconds=99.0))
    expected = {"seconds": 3.0, "seconds_min": 1.0, "seconds_max": 8.0, "tokens_per_second": 5 / 3.0}
    row = result["results"][0]
    assert {name: row[name] for name in expected} == expected and row["workspace_bytes"] == 30
    assert "fp16: 3000.0 ms" in told


def test_load_figures_have_everything_before_the_first_token(tiny_folder, clock):
    machine = machine_of(clock, [], load_seconds=3.0, warm_up_seconds=5.0)
    result, told = measured(LoadBench(**settings(tiny_folder)), machine)
    row = result["results"][0]
    assert (row["load_seconds"], row["ready_seconds"], row["peak_load_bytes"]) == (3.0, 8.0, None)
    assert "fp16: ready in 8.0 s" in told


def test_the_peak_of_loading_is_over_what_was_there_before(clock, monkeypatch):
    """On a GPU: its high-water mark starts at loading and is read before the warm-up, which is no part of loading."""
    marks = {"now": 40, "highest": 5000}
    machine = Machine(lambda key: ScriptedEngine(clock, in_order([])), clock=clock)
    for name, answer in {
        "init": lambda: None,
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: marks["now"],
        "reset_peak_memory_stats": lambda device: marks.update(highest=marks["now"]),
        "max_memory_allocated": lambda device: marks["highest"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(machine.pool, "get", lambda key, method: (loaded(), 0.0))
    monkeypatch.setattr(ScriptedEngine, "warm_up", lambda engine, ids: marks.update(highest=9999))

    def loaded():
        marks["highest"] = max(marks["highest"], 1040)
        return ScriptedEngine(clock, in_order([]))

    lease = Lease(machine, "cuda:0", threading.Event())
    bench = LoadBench(contestants=(Contestant.parse("fp16"),), device="cuda:0")
    row = bench.measure(lease, bench.contestants[0], None, SimpleNamespace(prompt_ids=[1]))
    assert row["peak_load_bytes"] == 1000


@pytest.mark.parametrize(("files", "said"), [([], "cold"), (["kernel.cubin"], "warm"), (None, "cold")])
def test_a_kernel_cache_is_warm_when_something_is_in_it(files, said, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    if files is not None:
        folder.mkdir()
    for name in files or ():
        (folder / name).touch()
    assert LoadBench(contestants=()).conditions() == {"kernel_cache": said}


class Summed:
    """A tensor whose sum takes 2 seconds on the device and 1 more to reach the host."""

    device = "cuda:0"

    def __init__(self, clock: Clock):
        self.clock = clock

    def sum(self):
        self.clock.take(2.0)
        return self

    def item(self):
        self.clock.take(1.0)


@pytest.mark.parametrize("cuda", [False, True])
def test_a_reading_is_timed_until_the_sum_is_on_the_host(cuda, clock, monkeypatch):
    monkeypatch.setattr(setup, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.take(50.0))  # what ran before is not counted
    assert list(setup._sum_seconds(Summed(clock), cuda)) == [3.0] * (9 + 2)


def test_the_read_bandwidth_is_the_bytes_over_the_median_of_the_counted_readings(monkeypatch):
    monkeypatch.setitem(setup.BANDWIDTH_BYTES, "cpu", 1 << 20)
    seen = []

    def seconds(data, cuda):
        seen.append((data.nbytes, cuda))
        return iter([80.0, 90.0, 1.0, 2.0, 4.0, 16.0, 32.0])  # the first two warm up; the mean of the others is 11

    monkeypatch.setattr(setup, "_sum_seconds", seconds)
    assert read_bandwidth("cpu") == (1 << 20) / 4.0 and seen == [(1 << 20, False)]


def test_a_share_of_the_bandwidth_over_one_is_not_shown():
    assert bandwidth_fraction(10, 5.0, 100.0) == 0.5 and bandwidth_fraction(10, 10.0, 100.0) == 1.0
    assert bandwidth_fraction(10, 10.1, 100.0) is None


def test_decode_seconds_are_those_of_the_steps_alone(clock):
    script = Script(100.0, (0.5, 0.25, 2.0), between=7.0)
    engine = ScriptedEngine(clock, in_order([script]), warm_up_seconds=1000.0)
    assert decode_seconds(engine, [1, 2], 3, lambda: False) == 2.75


def test_the_speed_at_a_threshold_is_sixteen_tokens_over_their_seconds(tiny_folder, clock):
    """By the median of three rounds, in each of which every threshold decodes once."""
    seconds = {0.0: [1.0, 4.0, 0.5], 6.0: [2.0, 0.25, 8.0]}
    asked = []

    def script(engine: ScriptedEngine) -> Script:
        asked.append(engine.method.threshold)
        return Script(50.0, (seconds[engine.method.threshold].pop(0) / 16,) * 16)

    machine = Machine(lambda key: ScriptedEngine(clock, script, key.method, share=0.125), clock=clock)
    *_, outcome = machine.run(Thresholds(model=str(tiny_folder), thresholds=(0.0, 6.0)))
    off, six = outcome.result["results"]
    assert asked == [0.0, 6.0] * 3
    assert [off[f"tokens_per_second{end}"] for end in ("_min", "", "_max")] == [4.0, 16.0, 32.0]
    assert [six[f"tokens_per_second{end}"] for end in ("_min", "", "_max")] == [2.0, 8.0, 64.0]
    assert (off["outlier_share"], off["perplexity"]) == (0.125, pytest.approx(259)), "equal logits: all tokens alike"


# Seconds of a prefill and of each of two decode steps, of four rounds: the first is not counted.
PLAIN = [(1.0, (1.0, 1.0)), (2.0, (0.25, 0.75)), (4.0, (1.0, 1.0)), (8.0, (0.5, 1.5))]
WATCHED = [(900.0, (900.0, 900.0)), (6.0, (1.0, 1.0)), (6.0, (1.25, 1.25)), (64.0, (4.0, 2.0))]


def rounds_of_hooks(folder, clock: Clock) -> tuple[dict, list[bool]]:
    """The row of three counted rounds, and of every generation in turn whether it was watched."""
    left, order = {False: list(PLAIN), True: list(WATCHED)}, []

    def script(engine) -> Script:
        order.append(hooks_left(engine.model) > 0)
        prefill, steps = left[order[-1]].pop(0)
        return Script(prefill, steps)

    machine = Machine(lambda key: ScriptedEngine(clock, script, key.method, model=tiny_llama()), clock=clock)
    return measured(HooksBench(**settings(folder, new_tokens=3)), machine)[0]["results"][0], order


def test_ratios_are_of_the_two_sides_of_a_round(tiny_folder, clock):
    row, order = rounds_of_hooks(tiny_folder, clock)
    assert order == [True, False, False, True] * 2, "who comes second changes from round to round"
    expected = {
        "prefill_ratio": 3.0,  # of 3, 1.5 and 8
        "prefill_ratio_min": 1.5,
        "prefill_ratio_max": 8.0,
        "prefill_seconds": 4.0,
        "prefill_seconds_watched": 6.0,
        "decode_ratio": 2.0,  # of 2, 1.25 and 3
        "decode_ratio_min": 1.25,
        "decode_ratio_max": 3.0,
        "decode_seconds_per_token": 1.0,
        "decode_seconds_per_token_watched": 1.25,
    }
    assert {name: row[name] for name in expected} == expected


def test_the_watched_side_pays_for_hooks_and_statistics(tiny_folder, clock, monkeypatch):
    """Placing and removing hooks, and every phase's statistics, which the next phase or the end fetches."""
    plain, _ = rounds_of_hooks(tiny_folder, clock)
    for name, seconds in {"__enter__": 1.0, "phase": 0.5, "__exit__": 4.0}.items():
        method = getattr(OutlierRecorder, name)

        def slow(self, *arguments, method=method, seconds=seconds):
            clock.take(seconds)
            return method(self, *arguments)

        monkeypatch.setattr(OutlierRecorder, name, slow)
    row, _ = rounds_of_hooks(tiny_folder, clock)
    assert row["prefill_seconds_watched"] - plain["prefill_seconds_watched"] == 1.0 + 2 * 0.5
    assert row["decode_seconds_per_token_watched"] - plain["decode_seconds_per_token_watched"] == (2 * 0.5 + 4.0) / 2
    for name in ("prefill_seconds", "decode_seconds_per_token"):
        assert row[name] == plain[name]
