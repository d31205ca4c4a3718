"""The steps of a bitsandbytes layer: told inside its own code, without changing it, and adding up to the whole."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmq.bench.marks import Marks, clock_of, counted
from llmq.bench.stages import Case, Side, StagesBench, layer_of, notes_of, one_pass
from llmq.cli import main
from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.methods.bnb_steps import OF_OUTLIERS, STEPS, marked

PLAIN = ["search", "quantize", "gather", "dispatch", "int8_product", "scale", "outlier_product", "dispatch"]


def bnb_layer(outputs: int = 48, inputs: int = 32, method: str = "bnb-int8"):
    return layer_of(Contestant.parse(method), (outputs, inputs), "cpu")


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("outliers", [0, 3])
def test_steps_are_told_and_the_layer_computes_as_ever(rows, outliers):
    layer, x, told = bnb_layer(), Case((48, 32), rows, outliers).input("cpu"), []
    with torch.inference_mode():
        before = layer(x)
        with marked("cpu", told.append):
            during = layer(x)
        after = layer(x)
    assert told == PLAIN and set(told) == set(STEPS)
    assert torch.equal(during, before) and torch.equal(after, before)
    found = layer.state.idx
    assert len(found) == outliers == int((x.abs() > 6).any(0).sum())


def test_nothing_stays_replaced_after_a_failure():
    layer, x = bnb_layer(), Case((48, 32), 2, 0).input("cpu")
    before = torch.max, torch.ops.bitsandbytes.int8_linear_matmul.default
    told = []
    with pytest.raises(ZeroDivisionError), marked("cpu", told.append):
        raise ZeroDivisionError
    with torch.inference_mode():
        layer(x)
    assert told == [] and (torch.max, torch.ops.bitsandbytes.int8_linear_matmul.default) == before


class ScriptedClock:
    """Every look at it takes 1; work takes what `passes` says."""

    def __init__(self):
        self.time = 0.0

    def now(self) -> float:
        self.time += 1
        return self.time

    def passes(self, seconds: float) -> None:
        self.time += seconds

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def settle(self) -> None:
        pass


def test_what_marking_costs_is_taken_off():
    clock = ScriptedClock()
    marks = Marks(clock)

    def work():
        clock.passes(5)
        marks("b")
        clock.passes(7)
        marks("a")
        clock.passes(2)

    assert marks.cost == 1.0
    assert marks.took(work, "a") == {"a": 7.0, "b": 7.0} and marks.took(lambda: clock.passes(3)) == {"": 3.0}


def test_what_marking_costs_among_other_work_is_found_by_leaving_marks_out():
    """A mark after work takes 3 more than one after a mark."""
    clock = ScriptedClock()
    marks = Marks(clock)

    def work():
        for step in "abcd":
            clock.passes(5)
            known = len(marks._moments)
            marks(step)
            clock.passes(3 * (len(marks._moments) - known))

    marks.reprice(lambda: marks.took(work), 3)
    assert marks.cost == 4.0
    assert sum(marks.took(work).values()) == pytest.approx(20, abs=3)  # the two around it follow no work


def test_events_are_used_again_once_all_have_come(monkeypatch):
    made, time = [], iter(range(0, 10_000_000, 2))

    class Event:
        def __init__(self, enable_timing):
            made.append(self)

        def record(self, stream):
            assert stream is here
            self.milliseconds = next(time)

        def elapsed_time(self, later):
            return later.milliseconds - self.milliseconds

    here = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    marks = Marks(clock_of("cuda:0"))
    known = len(made)
    assert marks.cost == pytest.approx(0.002)  # 2 ms from one event to the next
    assert marks.took(lambda: next(time), "a") == pytest.approx({"a": 0.002}) and len(made) == known


def test_waits_and_launches_of_a_gpu_are_counted(monkeypatch):
    """As torch and its profiler tell them; turning the warnings on is itself told of, and is no wait."""
    modes, ran = [], ["Memcpy DtoH (Device -> Pageable)", "gemv", "Memset (Device)", "split"]
    gpu, took = torch.autograd.DeviceType.CUDA, SimpleNamespace(elapsed_us=lambda: 1.5)
    events = [SimpleNamespace(name=name, device_type=gpu, time_range=took) for name in ran]
    events.append(SimpleNamespace(name="aten::mm", device_type=torch.autograd.DeviceType.CPU, time_range=took))

    def turn(mode):
        modes.append(mode)
        warnings.warn("a prototype that does not yet detect all synchronizing operations", stacklevel=1)

    def work():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", turn)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(SimpleNamespace(events=lambda: events)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert counted("cuda:0", work) == {"host_syncs": 2, "kernel_launches": 2, "kernel_seconds": 3e-6}
        events.clear()
        assert counted("cuda:0", work)["kernel_launches"] is None
    assert modes == ["warn", 0] * 2


class Operations(TorchDispatchMode):
    """A clock that goes on by one with every operation of torch's, and by nothing else."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))

    def now(self) -> int:
        return self.count

    def seconds(self, first: int, last: int) -> int:
        return last - first

    def settle(self) -> None:
        pass


@pytest.mark.parametrize("outliers", [0, 4])
def test_the_steps_add_up_to_the_whole_layer(outliers):
    """By a clock of operations: no operation of the layer lies outside the steps, and none is told twice."""
    side = Side(Contestant.parse("bnb-int8"), [bnb_layer(96, 64) for _ in range(2)])
    with Operations() as clock, torch.inference_mode():
        marks = Marks(clock)
        side.begin(Case((96, 64), 16, outliers).input("cpu"))
        whole, steps = (one_pass(side, marks, told, "cpu") for told in (False, True))
    assert sum(steps.values()) == sum(whole.values()) > 0
    assert steps.keys() == (STEPS.keys() if outliers else STEPS.keys() - OF_OUTLIERS)


def test_a_case_has_a_row_for_everybody(capsys):
    arguments = ["--methods", "fp16,bnb-int8,bnb-int8@0,llm-int8,bf16", "--device", "cpu", "--shapes", "48x32,16x64"]
    arguments += ["--rows", "1,3", "--outliers", "2", "--layers", "2", "--repeats", "2", "--json"]
    assert main(["bench", "stages", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = result["results"]
    cases = [f"{shape} rows={n} outliers={k}" for shape in ("48x32", "16x64") for k in (0, 2) for n in (1, 3)]
    assert [row["case"] for row in rows] == [case for case in cases for _ in range(5)]
    assert [row["method"] for row in rows[:5]] == ["fp16", "bnb-int8", "bnb-int8@0", "llm-int8", "bf16"]
    assert all(row["over_fp16"] == 1 for row in rows if row["method"] == "fp16")
    assert all(row["seconds"] > 0 and row["host_syncs"] is row["kernel_launches"] is None for row in rows)
    assert {row["method"] for row in rows if row["stages"]} == {"bnb-int8", "bnb-int8@0"}
    for row in rows:
        decomposed = row["method"] == "bnb-int8" and row["outlier_columns"] > 0
        assert row["stages"] is None or all((row["stages"][step] > 0) == decomposed for step in OF_OUTLIERS)
    assert result["conditions"]["layers"] == 2 and result["conditions"]["steps"].keys() == STEPS.keys()


def test_a_sum_that_misses_the_whole_is_told():
    assert list(notes_of({"stages_over_whole": 0.85})) == ["the steps add up to 85% of the whole layer"]
    assert list(notes_of({"stages_over_whole": 1.09})) == list(notes_of({"stages_over_whole": None})) == []


def test_a_cpu_launches_no_kernels_and_never_waits():
    assert set(counted("cpu", lambda: None).values()) == {None}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shapes": "4096"}, "shapes has '4096'; choose outputs x inputs"),
        ({"shapes": "8x0"}, "shapes has '8x0'"),
        ({"rows": "1,none"}, "rows is '1,none'; choose whole numbers"),
        ({"rows": "0"}, "rows is '0'"),
        ({"layers": 0}, "layers is 0"),
        ({"shapes": "9x3", "outliers": 4}, "outliers is 4; a layer has 3 inputs"),
        ({"contestants": (Contestant.parse("awq"),)}, "awq is calibrated"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings, words):
    with pytest.raises(BadChoice, match=words):
        StagesBench(**{"contestants": (Contestant.parse("fp16"),)} | settings)
