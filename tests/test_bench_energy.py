"""Joules a token against a counter that counts exactly, on a clock that moves only when something takes time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scripted import Clock, Script, ScriptedEngine

from llmq import telemetry
from llmq.bench import energy, joules, setup
from llmq.bench.energy import EnergyBench
from llmq.bench.joules import Meter, Rapl, meter_of
from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.machine.door import Machine

IDLE = 100.0  # watts
WATTS = {0.5: 400.0, 0.125: 240.0, 1.0: 300.0, 0.25: 160.0, 0.0: 0.0}  # by what takes so many seconds:
SECONDS = {"fp16": (0.5, 0.125), "fp32": (1.0, 0.25)}  # a prefill, a step
COUNTER, READING = 1 / 8, 1 / 128  # seconds between two steps of the counter, and of a look at it


class Power(Clock):
    """A GPU's NVML: millijoules by what took the time, told as they were at the last step of the counter."""

    NVMLError = RuntimeError

    def __init__(self):
        super().__init__()
        self.joules, self.shown, self.next = 0.0, 0.0, self.now

    def take(self, seconds: float, watts: float | None = None) -> None:
        watts, end = WATTS[seconds] if watts is None else watts, self.now + seconds
        while self.next <= end:
            self.shown, self.next = self.joules + watts * (self.next - self.now), self.next + COUNTER
        self.joules, self.now = self.joules + watts * seconds, end

    def sleep(self, seconds: float) -> None:
        self.take(seconds, IDLE)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA L4"

    def nvmlSystemGetDriverVersion(self):
        return "570"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle) -> int:
        self.take(READING, IDLE)
        return round(self.shown * 1000)


@dataclass
class Powered(ScriptedEngine):
    """Takes as long, and so as much, as its method does."""

    def start(self, prompt_ids, settings):
        prefill, step = SECONDS[self.method.name]
        self.script = lambda engine: Script(prefill, (step,) * (settings.max_new_tokens - 1))
        return super().start(prompt_ids, settings)

    def warm_up(self, prompt_ids):
        self.clock.take(1.0)


@pytest.fixture
def power(monkeypatch) -> Power:
    """What every meter of the bench reads."""
    power = Power()
    gpu = telemetry.Nvml(power, "GPU-1")
    monkeypatch.setattr(energy, "meter_of", lambda device: Meter(gpu.energy_joules, "its joules", power, power.sleep))
    monkeypatch.setattr(setup, "doubts", lambda device: iter(()))
    return power


def test_joules_a_token_are_exactly_what_each_phase_took(tiny_folder, power):
    """Whatever the counter's steps cut: what waits for one is no part of the work, and idle is what idle was."""
    machine = Machine(lambda key: Powered(power, None, key.method), clock=power)
    contestants = (Contestant.parse("fp16"), Contestant.parse("fp32"))
    asked = {"model": str(tiny_folder), "contestants": contestants, "engine": "hf"}
    bench = EnergyBench(**asked, prompt_tokens=5, new_tokens=7, repeats=2, seconds=1)
    *_, result = machine.run(bench)
    assert result["idle_watts"] == pytest.approx(IDLE) and result["notes"] == []
    conditions = {"counter": "its joules", "counter_step_seconds": COUNTER, "seconds": 1, "new_tokens": 7, "repeats": 2}
    assert {name: result["conditions"][name] for name in conditions} == conditions
    for row, others in zip(result["results"], (1.0, None), strict=True):
        (reading, writing), found = SECONDS[row["method"]], {}
        for phase, seconds in (("prefill", reading / 5), ("decode", writing)):
            watts = WATTS[{"prefill": reading, "decode": writing}[phase]]
            found[f"{phase}_joules_per_token"] = watts * seconds
            found[f"{phase}_joules_per_token_over_idle"] = (watts - IDLE) * seconds
            found |= {f"{phase}_watts": watts, f"{phase}_tokens_per_second": 1 / seconds}
            found |= {f"{phase}_joules_over_fp16": others} if others else {}
        assert {name: row[name] for name in found} == pytest.approx(found, rel=1e-6)
    prefill, decode = (300 * 1.0) / (400 * 0.5), (160 * 0.25) / (240 * 0.125)
    assert row["prefill_joules_over_fp16"] == pytest.approx(prefill, rel=1e-6)
    assert row["decode_joules_over_fp16"] == pytest.approx(decode, rel=1e-6)
    assert row["decode_joules_over_fp16_spread"] == pytest.approx(0, abs=1e-6)


def test_a_stretch_is_as_long_as_asked(power):
    meter, bench = energy.meter_of("cpu"), EnergyBench(contestants=(Contestant.parse("fp16"),), new_tokens=4, seconds=2)
    engine = Powered(power, None)
    assert meter.of(lambda: bench._read(engine, [1] * 5, power, lambda: None)).tokens == 20
    written = bench._written(engine, [1] * 5, meter, lambda: None)
    assert written.tokens % 3 == 0 and written.seconds - written.waited == written.tokens * 0.125
    assert 2 <= written.seconds < 2 + 3 * 0.125 + 2 * COUNTER


@pytest.mark.parametrize("shown", [5.0, None])
def test_a_counter_that_stands_still_measures_nothing(shown):
    clock = Clock()

    def read():
        clock.take(0.25)
        return shown

    with pytest.raises(BadChoice, match="energy is not measured: its joules stand still"):
        Meter(read, "its joules", clock).of(lambda: 1)


@pytest.mark.parametrize("driver", [None, lambda handle: 1 / 0])
def test_a_gpu_without_a_counter_measures_nothing(driver, monkeypatch):
    power = Power()
    monkeypatch.setattr(Power, "NVMLError", ZeroDivisionError)
    monkeypatch.setattr(power, "nvmlDeviceGetTotalEnergyConsumption", driver, raising=False)
    gpu = telemetry.Nvml(power, "GPU-1") if driver else None
    monkeypatch.setattr(telemetry.Nvml, "for_torch_device", lambda device: gpu)
    with pytest.raises(BadChoice, match="energy is not measured: the driver of cuda:0 counts none"):
        meter_of("cuda:0")


def rapl(folder: Path, name: str, microjoules: int, end: int = 999) -> Path:
    folder.mkdir()
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", end)):
        (folder / file).write_text(f"{value}\n")
    return folder


def test_rapl_adds_up_packages_also_past_the_end_of_a_counter(tmp_path, monkeypatch):
    first = rapl(tmp_path / "intel-rapl:0", "package-0", 900)
    second = rapl(tmp_path / "intel-rapl:1", "package-1", 10)
    rapl(tmp_path / "intel-rapl:0:0", "core", 5)
    rapl(tmp_path / "intel-rapl:2", "psys", 5)
    monkeypatch.setattr(joules, "POWERCAP", tmp_path)
    meter = meter_of("cpu")
    assert isinstance(meter.read, Rapl) and meter.read() == 0
    for left, right, total in ((950, 20, 60), (30, 20, 140), (30, 990, 1110)):
        (first / "energy_uj").write_text(str(left))
        (second / "energy_uj").write_text(str(right))
        assert meter.read() == pytest.approx(total / 1e6)


def test_without_a_counter_that_may_be_read_the_command_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setattr(joules, "POWERCAP", tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "name").write_text("package-0")
    status, out, err = run("bench", "energy", "--device", "cpu")
    assert (status, out) == (2, []) and len(err) == 1 and "Linux lets root alone read it" in err[0]
    status, _, err = run("bench", "energy", "--device", "cpu", "--seconds", 0)
    assert status == 2 and "seconds is 0; choose a whole number of at least 1" in err[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_own_counter_moves_and_knows_work_from_rest():
    """Products take more than rest, and neither more than the board may draw."""
    import pynvml

    meter, limit = meter_of("cuda:0"), telemetry.Nvml.for_torch_device("cuda:0")
    x = torch.randn(4096, 4096, device="cuda:0", dtype=torch.float16)

    def work() -> int:
        started, count = meter.clock(), 0
        while meter.clock() - started < 2:
            (x @ x).sum().item()
            count += 1
        return count

    idle, busy = meter.idle_watts(1), meter.of(work).figures(0.0)["watts"]
    most = pynvml.nvmlDeviceGetEnforcedPowerLimit(limit._handle) / 1e3
    assert 0 < meter.step_seconds() < 0.5 and 5 < idle < busy / 1.5 and busy < 1.1 * most
