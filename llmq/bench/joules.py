"""Joules by a counter that the hardware keeps: NVML's of a GPU, RAPL's of the processors. Power is never guessed.

NVML counts what the whole board took since its driver was loaded, in millijoules, on Volta and newer. The counter moves
about every 0.1 s, and the sensor below it looks at a quarter of the time on an A100 or an H100 (Yang et al. 2023,
arXiv 2312.02741): what is measured has to be steady, to last for seconds, and to begin and end with a step of the
counter. RAPL counts the packages of the processors in microjoules, with all that runs on them, and begins at 0 again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llmq import telemetry
from llmq.errors import BadChoice

POWERCAP = Path("/sys/class/powercap")
STILL_SECONDS = 2.0  # without a step, after which a counter is none
STEPS = 10  # of which the time between two is the median


@dataclass(frozen=True)
class Stretch:
    """What work on so many `tokens` took: `joules` and `seconds` between two steps of the counter; in the last
    `waited` of these seconds the work was done, and nothing computed."""

    tokens: int
    joules: float
    seconds: float
    waited: float

    def __add__(self, other: Stretch) -> Stretch:
        tokens, joules = self.tokens + other.tokens, self.joules + other.joules
        return Stretch(tokens, joules, self.seconds + other.seconds, self.waited + other.waited)

    def figures(self, idle_watts: float) -> dict[str, float]:
        """Joules a token of the work alone, and what of them is over `idle_watts`; mean watts, and tokens a second."""
        busy = self.seconds - self.waited
        joules = self.joules - idle_watts * self.waited
        over_idle = (joules - idle_watts * busy) / self.tokens
        per_token = {"joules_per_token": joules / self.tokens, "joules_per_token_over_idle": over_idle}
        return per_token | {"watts": joules / busy, "tokens_per_second": self.tokens / busy}


@dataclass(frozen=True)
class Meter:
    """A counter at work. `read`: joules so far, None where it cannot be read; `source`: whose they are, in words."""

    read: Callable[[], float | None]
    source: str
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def step(self) -> tuple[float, float]:
        """Wait for the counter to move: its joules, and when. Raises BadChoice where it stands still."""
        started, before = self.clock(), self.read()
        while (joules := self.read()) == before or joules is None:
            if self.clock() - started > STILL_SECONDS:
                raise BadChoice(f"energy is not measured: {self.source} stand still")
        return joules, self.clock()

    def of(self, work: Callable[[], int]) -> Stretch:
        """Measure `work`, which returns how many tokens it worked on and leaves nothing under way."""
        before, started = self.step()
        tokens = work()
        ended = self.clock()
        after, stepped = self.step()
        return Stretch(tokens, after - before, stepped - started, stepped - ended)

    def idle_watts(self, seconds: float) -> float:
        """The mean power while nothing computes, after a pause of a third of these seconds."""
        self.sleep(seconds / 3)
        rest = self.of(lambda: self.sleep(seconds) or 0)
        return rest.joules / rest.seconds

    def step_seconds(self) -> float:
        """The median time between two steps of the counter."""
        return statistics.median(after - before for before, after in pairwise(self.step()[1] for _ in range(STEPS + 1)))


def meter_of(device: str) -> Meter:
    """The meter of a torch device. Raises BadChoice where it has no counter, or none that may be read."""
    if device.startswith("cuda"):
        nvml = telemetry.Nvml.for_torch_device(device)
        if nvml is None or nvml.energy_joules() is None:
            raise BadChoice(f"energy is not measured: the driver of {device} counts none (NVIDIA's do from Volta on)")
        return Meter(nvml.energy_joules, "NVML's joules of the whole GPU")
    packages = [folder for folder in sorted(POWERCAP.glob("intel-rapl:*")) if _is_package(folder)]
    if not packages:
        why = f"{POWERCAP} has no counter of a processor that may be read (Linux lets root alone read it)"
        raise BadChoice(f"energy is not measured: {why}")
    return Meter(Rapl(packages), "RAPL's joules of the processors' packages")


class Rapl:
    """Joules of several packages since this was made; asked at least once while a counter goes from 0 to its end."""

    def __init__(self, folders: list[Path]):
        self._files = [folder / "energy_uj" for folder in folders]
        self._ends = [int((folder / "max_energy_range_uj").read_text()) + 1 for folder in folders]
        self._last, self._total = self._counts(), 0

    def __call__(self) -> float:
        counts = self._counts()
        moved = (now - last for now, last in zip(counts, self._last, strict=True))
        self._total += sum(one % end for one, end in zip(moved, self._ends, strict=True))
        self._last = counts
        return self._total / 1e6

    def _counts(self) -> list[int]:
        return [int(file.read_text()) for file in self._files]


def _is_package(folder: Path) -> bool:
    """Whether it counts one processor, and may be read; what lies below one, and the platform, would count twice."""
    try:
        return (folder / "name").read_text().startswith("package") and bool((folder / "energy_uj").read_text())
    except OSError:
        return False
