"""Why is it slower? The time of a bitsandbytes int8 layer step by step, beside the same layer in FP16 and in ours.

The weights of a layer that is called again and again would stay in a cache, so a turn calls several layers one after
the other, as a model does. bitsandbytes' steps are marked inside its own code (`methods.bnb_steps`) in passes of their
own, one after each unmarked pass, and have to add up to what the layer takes unmarked. A mark costs as much as a small
step, so what it costs is measured in the same turn, by leaving marks out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

from llmq import telemetry
from llmq.bench.generate import dropped_in
from llmq.bench.marks import Marks, clock_of, counted
from llmq.bench.rounds import SCHEDULE, ratio, spread, turns, wide_figures
from llmq.bench.setup import Asked, require_whole, whole_numbers
from llmq.contestant import Contestant
from llmq.environment import doubts
from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.machine.door import Lease
from llmq.methods.bnb_steps import OF_OUTLIERS, STEPS, marked

if TYPE_CHECKING:
    import torch
    from torch import nn

LLAMA_7B = "4096x4096,11008x4096"  # of q, k, v and o; of gate and up: outputs x inputs
PASSES = {"cpu": 1, "cuda": 20}  # over all layers in one turn, of which the median counts
ORDINARY, OUTLIER = 3.0, 20.0  # magnitudes: the highest of a usual input, and that of a planted one
TOLERANCE = 0.1  # of the whole, by which the sum of the steps may miss it


@dataclass(frozen=True)
class Case:
    """What all layers are given: `rows` of an input with so many columns of outliers."""

    shape: tuple[int, int]
    rows: int
    outliers: int

    @property
    def name(self) -> str:
        outputs, inputs = self.shape
        return f"{outputs}x{inputs} rows={self.rows} outliers={self.outliers}"

    def input(self, device: str) -> torch.Tensor:
        """FP16 (rows, inputs)."""
        import torch

        x = torch.randn(self.rows, self.shape[1], device=device).clamp_(-ORDINARY, ORDINARY)
        x[:, :: self.shape[1] // self.outliers if self.outliers else 1][:, : self.outliers] = OUTLIER
        return x.half()


@dataclass
class Side:
    """One contestant's layers of one shape; of a case its input, the seconds of a call in every round, and of each of
    its steps where they are known."""

    contestant: Contestant
    layers: list[nn.Module]
    x: torch.Tensor | None = None
    seconds: list[float] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)

    @property
    def has_steps(self) -> bool:
        return self.contestant.method.name == "bnb-int8"

    def begin(self, x: torch.Tensor) -> None:
        """A new case, whose input comes in the type of the method."""
        import torch

        self.x, self.seconds, self.steps = x.to(getattr(torch, self.contestant.method.dtype)), [], []

    def call(self) -> None:
        """Every layer once."""
        for layer in self.layers:
            layer(self.x)

    @property
    def found_outliers(self) -> bool:
        """Whether the last call found any, by the layer's own account."""
        columns = self.contestant.method.outlier_columns(self.layers[-1])
        return columns is not None and len(columns) > 0


@dataclass(frozen=True, kw_only=True)
class StagesBench(Asked):
    """In every round every contestant has a turn; bitsandbytes' steps are marked in every second pass. `shapes`:
    outputs x inputs; `rows`: tokens of a call; `outliers`: columns planted in the second half of the cases; `layers`:
    how many different ones a pass goes through."""

    kind = "stages"
    columns = ("method", "case", "seconds", "over_fp16", "host_syncs", "kernel_launches", "stages_over_whole")
    shapes: str = LLAMA_7B
    rows: str = "1,2,4,8,16,32,64"
    outliers: int = 4
    layers: int = 8

    def __post_init__(self):
        super().__post_init__()
        require_whole("outliers", self.outliers, 1)
        require_whole("layers", self.layers, 1)
        if narrow := [shape for shape in shapes_of(self.shapes) if shape[1] < self.outliers]:
            raise BadChoice(f"outliers is {self.outliers}; a layer has {narrow[0][1]} inputs")
        whole_numbers("rows", self.rows)
        for contestant in self.contestants:
            if contestant.method.calibrated:
                raise BadChoice(f"{contestant.label} is calibrated on a model; a layer alone has none")

    def run(self, lease: Lease) -> Iterator[Progress | dict]:
        """Case by case; last comes the result."""
        told, clocks, results = list(doubts(self.device)), [], []
        marks = Marks(clock_of(self.device))
        for shape in shapes_of(self.shapes):
            yield lease.progress(f"making {self.layers} layers of {shape[0]} x {shape[1]} for every method")
            sides = self._sides(shape)
            for case in self._cases(shape):
                yield lease.progress(case.name)
                results += self._measured(case, sides, marks, lease)
                clocks += [clock for clock in [telemetry.clock_mhz(self.device)] if clock is not None]
        yield lease.progress("counting what the host waits for and launches")
        results = [row | counts for row, counts in zip(results, self._counts(), strict=False)]
        conditions = {"layers": self.layers, "schedule": SCHEDULE, "mark_seconds": marks.cost}
        conditions |= {"passes": self._passes, "steps": STEPS} | self.circumstances(clocks)
        yield {
            "kind": self.kind, "device": self.device, "model": "one layer", "conditions": conditions, "notes": told,
            "results": results,
        }  # fmt: skip

    @property
    def _passes(self) -> int:
        return PASSES[self.device.partition(":")[0]]

    def _cases(self, shape: tuple[int, int]) -> Iterator[Case]:
        for outliers in (0, self.outliers):
            yield from (Case(shape, rows, outliers) for rows in whole_numbers("rows", self.rows))

    def _sides(self, shape: tuple[int, int]) -> list[Side]:
        """Everybody with layers of a shape."""
        with _computing(self.device):
            return [
                Side(contestant, [layer_of(contestant, shape, self.device) for _ in range(self.layers)])
                for contestant in self.contestants
            ]

    def _counts(self) -> Iterator[dict[str, float | None]]:
        """Of a call of everybody in every case, once all times are known: a profiler may slow what comes after it."""
        if not self.device.startswith("cuda"):
            yield from repeat(counted(self.device, lambda: None))
        for shape in shapes_of(self.shapes):
            sides = self._sides(shape)
            for case in self._cases(shape):
                with _computing(self.device):
                    x = case.input(self.device)
                    for side in sides:
                        side.begin(x)
                        side.call()
                yield from (self._count(side) for side in sides)

    def _count(self, side: Side) -> dict[str, float | None]:
        with _computing(self.device):
            found = counted(self.device, side.call)
        return {name: None if count is None else count / self.layers for name, count in found.items()}

    def _measured(self, case: Case, sides: list[Side], marks: Marks, lease: Lease) -> list[dict]:
        """The rows of a case: rounds in which everybody has a turn, of which the first is not counted."""
        with _computing(self.device):
            x = case.input(self.device)
            for side in sides:
                side.begin(x)
            for number in range(self.repeats + 1):
                for side in turns(sides, number):
                    lease.check()
                    seconds, steps = self._turn(side, marks)
                    if number:
                        side.seconds.append(seconds)
                        side.steps += [steps] if steps else []
        fp16 = next((side for side in sides if side.contestant.label == "fp16"), None)
        return [self._row(case, side, fp16) for side in sides]

    def _turn(self, side: Side, marks: Marks) -> tuple[float, dict[str, float]]:
        """Seconds of a call, and of its steps where these are known: each of the pass over all layers that took the
        median time, with marks or without."""
        if side.has_steps and self._passes > 1:  # a CPU's mark is a look at the clock
            marks.reprice(lambda: one_pass(side, marks, True, self.device), self._passes)
        passes: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(self._passes):
            for told in (False, True) if side.has_steps else (False,):
                passes[told].append(one_pass(side, marks, told, self.device))
        whole, steps = (self._median(passes[told]) for told in (False, True))
        return sum(whole.values()), steps

    def _median(self, passes: list[dict[str, float]]) -> dict[str, float]:
        """A layer's share of the pass in the middle; nothing where there was none."""
        found = sorted(passes, key=lambda steps: sum(steps.values()))
        return {step: seconds / self.layers for step, seconds in found[len(found) // 2].items()} if found else {}

    def _row(self, case: Case, side: Side, fp16: Side | None) -> dict:
        row = {"method": side.contestant.label, "case": case.name, "shape": "{}x{}".format(*case.shape)}
        row |= {"rows": case.rows, "outlier_columns": case.outliers, **spread("seconds", side.seconds)}
        row |= ratio("over_fp16", fp16.seconds, side.seconds) if fp16 else {"over_fp16": None}
        row |= {"stages": None, "stages_over_whole": None}
        if side.has_steps:
            sums = [sum(steps.values()) for steps in side.steps]
            row["stages"] = {step: statistics.median(s.get(step, 0.0) for s in side.steps) for step in STEPS}
            row |= ratio("stages_over_whole", sums, side.seconds)
        return row | {"notes": [f"{case.name}: {note}" for note in notes_of(row)]}


@contextmanager
def _computing(device: str) -> Iterator[None]:
    """A block that computes on the device and keeps nothing for a gradient."""
    import torch

    from llmq.kernels.backend import current

    with torch.inference_mode(), current(device):
        yield


def one_pass(side: Side, marks: Marks, told: bool, device: str) -> dict[str, float]:
    """Seconds of calling every layer once, by step where these are told."""
    if not told:
        return marks.took(side.call)
    with marked(device, marks):
        found = marks.took(side.call, "dispatch")
    if not side.found_outliers:
        found["dispatch"] += sum(found.pop(step, 0.0) for step in OF_OUTLIERS)
    return found


def notes_of(row: dict) -> Iterator[str]:
    """What speaks against a row."""
    yield from wide_figures(row)
    share = row["stages_over_whole"]
    if share is not None and abs(share - 1) > TOLERANCE:
        yield f"the steps add up to {share:.0%} of the whole layer"


def layer_of(contestant: Contestant, shape: tuple[int, int], device: str) -> nn.Module:
    """A layer (outputs, inputs) with random weights as the method stores it; of llm-int8 the one that our drop-in for
    transformers has."""
    import torch
    from torch import nn

    from llmq.methods.layers.linear_8bit import Linear8bit

    method = contestant.method
    outputs, inputs = shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta").requires_grad_(False)
    weight = torch.randn(outputs, inputs, device=device).mul_(inputs**-0.5).to(getattr(torch, method.dtype))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if method.dense:
        return linear
    if dropped_in(method):
        return Linear8bit.over(linear, method.threshold)
    layer = method.quantize(linear)
    method.apply_(layer)
    return layer


def shapes_of(text: str) -> list[tuple[int, int]]:
    """'4096x4096,11008x4096' as (outputs, inputs). Raises BadChoice for what is none."""
    found = []
    for part in text.split(","):
        outputs, times, inputs = part.strip().partition("x")
        if not (times and outputs.isdecimal() and inputs.isdecimal() and int(outputs) and int(inputs)):
            raise BadChoice(f"shapes has {part!r}; choose outputs x inputs, such as 11008x4096,4096x4096")
        found.append((int(outputs), int(inputs)))
    return found
