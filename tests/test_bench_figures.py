"""What a benchmark makes of known times: engines that follow a script, a clock that moves only with them."""

from __future__ import annotations

import shlex
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from planted import hooks_left
from scripted import Clock, Script, ScriptedEngine, ScriptedGeneration, in_order

from llmq.bench import bandwidth, setup, speed
from llmq.bench.bandwidth import bandwidth_share, read_bandwidth
from llmq.bench.hooks import HooksBench
from llmq.bench.rounds import ratio, turns, wide_figures
from llmq.bench.speed import DecodeBench, LoadBench, PrefillBench
from llmq.cli import build_parser
from llmq.contestant import Contestant
from llmq.events import Progress
from llmq.inspect.recorder import OutlierRecorder
from llmq.labs.thresholds import Thresholds, decode_seconds
from llmq.machine import pool
from llmq.machine.door import Lease, Machine

KV_BYTES_A_TOKEN = {"fp16": 128, "fp32": 256}  # of the tiny model
WARM_UP = Script(70.0, (70.0,) * 4, workspace_bytes=999, peak_bytes=999)  # the round that is not counted
REPEATS = [  # then three rounds of a prompt of 5 and 5 new tokens, the first of which belongs to the prefill
    WARM_UP,
    Script(3.0, (0.0625,) * 4, between=0.4375, kv_bytes=7, workspace_bytes=30, peak_bytes=400),
    Script(1.0, (0.5, 0.75, 0.25, 0.5), between=0.5, kv_bytes=8, workspace_bytes=10, peak_bytes=900),
    Script(8.0, (0.125, 0.5, 0.125, 0.25), kv_bytes=9, workspace_bytes=20, peak_bytes=200),
]


@pytest.fixture(autouse=True)
def undoubted(monkeypatch):
    """The machine that runs the tests, and the state of its checkout, are told of nowhere."""
    monkeypatch.setattr(setup, "doubts", lambda device: iter(()))


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


def test_decode_figures_are_those_of_the_rounds(tiny_folder, clock, monkeypatch):
    readings = iter([200_000.0, 100_000.0, 80_000.0])  # one a round; none of the round that is not counted
    monkeypatch.setattr(speed, "read_bandwidth", lambda device: next(readings))
    sizes = {"weight_bytes": 3000, "scale_bytes": 200, "read_bytes_per_token": 10_000}
    machine = machine_of(clock, REPEATS, load_seconds=3.0, warm_up_seconds=5.0, **sizes)
    result, told = measured(DecodeBench(**settings(tiny_folder, "fp16,fp32", new_tokens=5)), machine)
    assert result["read_bandwidth_bytes_per_second"] == 100_000 and result["conditions"]["new_tokens"] == 5
    assert result["read_bandwidth_bytes_per_second_spread"] == 1.2 and result["conditions"]["rounds"]
    assert result["notes"] == [
        "read_bandwidth_bytes_per_second spreads 120% (highest less lowest round, over the median)"
    ]
    order = [message.partition(": ")[2] for message in told if message.startswith("round")]
    assert order == ["fp16", "fp32", "fp32", "fp16"] * 2, "everybody in turn, and another one first in the next round"
    for row in result["results"]:
        read = 10_000 + KV_BYTES_A_TOKEN[row["method"]] * (5 + 2)  # halfway through the new tokens
        expected = {
            "tokens_per_second": 4.0,  # of 16, 2 and 4
            "tokens_per_second_min": 2.0,
            "tokens_per_second_max": 16.0,
            "tokens_per_second_spread": 3.5,
            "wall_tokens_per_second": 2.0,  # of 2, 1 and 4
            "prefill_seconds": 3.0,
            "bytes_per_token": read,
            "bandwidth_fraction": read * 4.0 / 80_000,  # of 16 / 200, 2 / 100 and 4 / 80
            "bandwidth_refused": "",
            "over_fp16": 1.0,
            "weight_bytes": 3000,
            "scale_bytes": 200,
            "kv_bytes": 7,
            "workspace_bytes": 30,
            "peak_bytes": 3000 + 200 + 900,
            "load_seconds": 3.0,
            "ready_seconds": 8.0,
        }
        assert {name: row[name] for name in expected} == expected
        spreads = [note.partition(" (")[0] for note in row["notes"][:2]]
        assert spreads == ["tokens_per_second spreads 350%", "prefill_seconds spreads 233%"]


def in_rounds(folder, clock: Clock, monkeypatch, *, bandwidth: float = 1e9, **engine) -> dict:
    """A result of two methods whose ratio is 2 in every round although the machine's pace is another in each."""
    paces = {"fp16": [70, 1, 2, 8], "fp32": [70, 2, 4, 16]}
    monkeypatch.setattr(speed, "read_bandwidth", lambda device: bandwidth)

    def load(key):
        scripts = [Script(1.0, (1.0 / pace,) * 4) for pace in paces[key.method.name]]
        return ScriptedEngine(clock, in_order(scripts), key.method, **engine)

    return measured(DecodeBench(**settings(folder, "fp16,fp32", new_tokens=5)), Machine(load, clock=clock))[0]


def test_a_pace_that_changes_between_rounds_changes_no_ratio(tiny_folder, clock, monkeypatch):
    _, row = in_rounds(tiny_folder, clock, monkeypatch)["results"]
    assert (row["over_fp16"], row["over_fp16_spread"], row["tokens_per_second_spread"]) == (2.0, 0.0, 14 / 4)


def test_what_does_not_fit_together_runs_one_after_the_other_and_says_so(tiny_folder, clock, monkeypatch):
    monkeypatch.setattr(setup.telemetry, "free_bytes", lambda device: (1 << 30) + 200_000)  # with room for a reading
    result = in_rounds(tiny_folder, clock, monkeypatch)
    assert not result["conditions"]["rounds"] and result["conditions"]["schedule"] == "one after the other"
    assert result["notes"][0].startswith("no rounds, and no ratio within one: loaded together they need 0.00 GB and")
    row = result["results"][1]
    assert row["over_fp16"] == 2.0 and "over_fp16_min" not in row, "the medians' ratio has no rounds to lie between"


def test_a_share_over_one_is_refused_in_words(tiny_folder, clock, monkeypatch):
    fp16, fp32 = in_rounds(tiny_folder, clock, monkeypatch, bandwidth=6000, read_bytes_per_token=1000)["results"]
    assert fp16["bandwidth_fraction"] < 1 and fp16["bandwidth_refused"] == ""
    assert fp32["bandwidth_fraction"] is None
    assert fp32["bandwidth_refused"].startswith("not believable: 1.86 of the read bandwidth of the same rounds")
    assert fp32["bandwidth_refused"] in fp32["notes"]


def test_loops_are_not_divided_by_each_other(tiny_folder, clock, monkeypatch):
    monkeypatch.setattr(speed, "read_bandwidth", lambda device: 1e9)

    def load(key):
        return ScriptedEngine(clock, in_order(REPEATS), key.method, name="lean" if key.method.name == "fp16" else "hf")

    bench = DecodeBench(**settings(tiny_folder, "fp16,fp32", new_tokens=5))
    row = measured(bench, Machine(load, clock=clock))[0]["results"][1]
    assert row["over_fp16"] is None
    assert any("another loop (lean); --engine hf puts both" in note for note in row["notes"])


def test_the_words_that_ask_for_a_benchmark_ask_for_the_same_one(tiny_folder):
    asked = settings(tiny_folder, "fp16,llm-int8@3", new_tokens=7, random_weights=True)
    typed = DecodeBench(**asked).typed()
    given = vars(build_parser().parse_args(shlex.split(typed)[3:]))
    names = [name for name in asked if name != "contestants"]
    assert [given[name] for name in names] == [asked[name] for name in names] and given["what"] == "decode"
    assert Contestant.parse_all(given["methods"]) == asked["contestants"]


def test_everybody_comes_first_in_turn():
    assert [list(turns("abc", number)) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_a_ratio_needs_both_sides_and_a_spread_over_a_tenth_is_told():
    assert ratio("x", [1.0], None) == {"x": None} and ratio("x", [], [1.0]) == {"x": None}
    assert ratio("x", [4.0, 9.0], [2.0, 3.0], rounds=False) == {"x": 2.6}
    assert list(wide_figures({"a_spread": 0.09, "b_spread": 0.11})) == [
        "b spreads 11% (highest less lowest round, over the median)"
    ]


@pytest.mark.parametrize(("name", "tokens"), [("hf", 5), ("lean", 128)], ids=["hf", "lean"])
def test_predicted_bytes_have_the_cache_that_the_loop_allocates(name, tokens, tiny_folder, clock, monkeypatch):
    monkeypatch.setattr(speed, "read_bandwidth", lambda device: 1e9)
    bench = DecodeBench(**settings(tiny_folder, new_tokens=5))
    row = measured(bench, machine_of(clock, REPEATS, name=name))[0]["results"][0]
    model = tiny_llama()
    weights = sum(p.nbytes // 2 for p in model.parameters()) + sum(buffer.nbytes for buffer in model.buffers())
    assert row["predicted_bytes"] == weights + KV_BYTES_A_TOKEN["fp16"] * tokens
    assert row["allocated_bytes"] is None, "a CPU has no allocator to ask"


def test_on_a_gpu_allocated_bytes_are_what_each_held_and_not_its_neighbours(tiny_folder, clock, monkeypatch):
    """What its generation took, and what dropping it gave back; nothing captured runs after the library's scratch is
    freed."""
    level = {"now": 0}
    scripts = {"fp16": (800, 70), "fp32": (1600, 90)}

    class Allocating(ScriptedEngine):
        def start(self, prompt_ids, asked):
            assert not cleared, "the scratch of a captured graph is gone"
            level["now"] += scripts[self.method.name][1]
            return super().start(prompt_ids, asked)

        def under(self, method):
            return self

    class Ending(ScriptedGeneration):
        def close(self):
            level["now"] -= scripts[self.engine.method.name][1]

    def load(key):
        level["now"] += scripts[key.method.name][0]
        script = Script(1.0, (1.0,) * 4)
        return Allocating(clock, lambda engine: script, key.method, device="cuda:0", weight_bytes=100)

    cleared, machine = [], Machine(load, clock=clock)
    monkeypatch.setattr("scripted.ScriptedGeneration", Ending)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: level["now"])
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(1), raising=False)
    monkeypatch.setattr(pool, "reclaim", lambda device: None)
    popped = dict.pop

    class Freeing(dict):
        def pop(self, key, *default):
            engine = popped(self, key, *default)
            if cleared and engine:
                level["now"] -= scripts[key.method.name][0]
            return engine

    machine.pool._engines = Freeing()
    monkeypatch.setattr(speed, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(setup.telemetry, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(setup, "describe", lambda device, source: {})
    monkeypatch.setattr(setup.telemetry, "clock_mhz", lambda device: 1980)
    asked = settings(tiny_folder, "fp16,fp32", new_tokens=5) | {"device": "cuda:0"}
    result = list(machine.run(DecodeBench(**asked)))[-1]
    assert [row["allocated_bytes"] for row in result["results"]] == [870, 1690]
    assert result["conditions"]["clock_mhz"] == [1980, 1980] and cleared == [1]


def test_prefill_figures_are_those_of_the_prefill(tiny_folder, clock):
    scripts = [replace(script, steps=()) for script in REPEATS]
    machine = machine_of(clock, scripts, warm_up_seconds=99.0)
    row = measured(PrefillBench(**settings(tiny_folder)), machine)[0]["results"][0]
    expected = {"seconds": 3.0, "seconds_min": 1.0, "seconds_max": 8.0, "tokens_per_second": 5 / 3.0, "over_fp16": 1.0}
    assert {name: row[name] for name in expected} == expected and row["workspace_bytes"] == 30


def test_everybody_is_loaded_in_every_round_and_the_first_is_told_apart(tiny_folder, clock):
    seconds = iter([9.0, 3.0, 2.0, 4.0])

    def load(key):
        clock.take(next(seconds))
        return ScriptedEngine(clock, in_order([]), key.method, warm_up_seconds=5.0)

    row = measured(LoadBench(**settings(tiny_folder)), Machine(load, clock=clock))[0]["results"][0]
    assert (row["first_load_seconds"], row["first_ready_seconds"]) == (9.0, 14.0)
    assert [row[f"load_seconds{end}"] for end in ("_min", "", "_max")] == [2.0, 3.0, 4.0]
    assert (row["ready_seconds"], row["peak_load_bytes"]) == (8.0, None)


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
    side = setup.Side(bench.contestants[0], None)
    assert bench._loaded(lease, side, SimpleNamespace(prompt_ids=[1]))["peak_load_bytes"] == 1000


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
    monkeypatch.setattr(bandwidth, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.take(50.0))  # what ran before is not counted
    assert list(bandwidth._sum_seconds(Summed(clock), cuda)) == [3.0] * (9 + 2)


def test_the_read_bandwidth_is_the_bytes_over_the_median_of_the_counted_readings(monkeypatch):
    monkeypatch.setitem(bandwidth.BANDWIDTH_BYTES, "cpu", 1 << 20)
    seen = []

    def seconds(data, cuda):
        seen.append((data.nbytes, cuda))
        return iter([80.0, 90.0, 1.0, 2.0, 4.0, 16.0, 32.0])  # the first two warm up; the mean of the others is 11

    monkeypatch.setattr(bandwidth, "_sum_seconds", seconds)
    assert read_bandwidth("cpu") == (1 << 20) / 4.0 and seen == [(1 << 20, False)]


def test_a_share_is_of_the_reading_of_its_round():
    assert bandwidth_share(10, [1.0, 4.0, 9.0], [100.0, 80.0, 300.0])["bandwidth_fraction"] == 0.3
    assert bandwidth_share(10, [10.0], [100.0])["bandwidth_fraction"] == 1.0
    assert bandwidth_share(None, [1.0], [1.0]) == {"bandwidth_fraction": None, "bandwidth_refused": ""}


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
    assert [cell for cell in Thresholds.row(off) if "spread" in cell] == ["4 to 32, spread 175 %"]
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
