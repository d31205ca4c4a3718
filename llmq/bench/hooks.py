"""What watching costs: the same generation with and without an `OutlierRecorder` around it, in turn.

A machine that others use too slows both runs of a round alike, so the figures to trust are the ratios within a round.
The watched side includes everything a watched generation has and another has not: placing and removing the hooks, the
reductions, and the statistics' way to the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING

from llmq.bench.rounds import ratio
from llmq.bench.setup import DecodingBench, Setup, Side
from llmq.contestant import Contestant
from llmq.engine.hf import HFEngine
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice
from llmq.machine.door import Lease
from llmq.models.opening import Model

if TYPE_CHECKING:
    import numpy as np

    from llmq.inspect.recorder import OutlierRecorder


@dataclass(frozen=True, kw_only=True)
class HooksBench(DecodingBench):
    """`repeats` rounds, in each of which the same generation runs once unwatched and once watched."""

    kind = "hooks"
    columns = ("method", "prefill_ratio", "decode_ratio", "prefill_seconds", "decode_seconds_per_token", "held_bytes")

    def __post_init__(self):
        super().__post_init__()
        if self.engine not in ("auto", "hf"):
            raise BadChoice(f"engine {self.engine!r} has no layers to hook; choose auto or hf")

    def loop_of(self, contestant: Contestant, model: Model) -> str:
        return "hf"

    def begin(self, lease: Lease, side: Side, setup: Setup) -> dict:
        return {"engine": lease.get(side.key, side.contestant.method).name}

    def turn(self, lease: Lease, side: Side, setup: Setup, number: int) -> dict:
        """Generate once unwatched and once watched; who comes second, and may find warmer caches, changes."""
        from llmq.inspect.recorder import OutlierRecorder

        engine = lease.get(side.key, side.contestant.method)
        recorder = OutlierRecorder(engine.model, outlier_columns=engine.method.outlier_columns)
        order = (None, recorder) if number % 2 else (recorder, None)
        seconds = {bool(one): self._seconds(engine, setup.prompt_ids, one, lease.clock) for one in order}
        report = recorder.report(model=self.model, method=side.label)
        return {"plain": seconds[False], "watched": seconds[True], "held_bytes": held_bytes(report)}

    def row(self, side: Side) -> dict:
        row = {"held_bytes": side.of("held_bytes")[-1]}
        for phase, name in enumerate(("prefill_seconds", "decode_seconds_per_token")):
            without, watched = ([seconds[phase] for seconds in side.of(name)] for name in ("plain", "watched"))
            row |= ratio(f"{name.partition('_')[0]}_ratio", watched, without)
            row |= {name: statistics.median(without), f"{name}_watched": statistics.median(watched)}
        return row

    def _seconds(
        self, engine: HFEngine, prompt_ids: list[int], recorder: OutlierRecorder | None, clock: Callable[[], float]
    ) -> tuple[float, float]:
        """Seconds of the prefill and of one decode step (their mean), by the host's clock; both end with the chosen
        token on the host. With a recorder each phase also ends with its statistics there."""
        phase = recorder.phase if recorder else lambda name: None
        with closing(engine.start(prompt_ids, SamplingSettings(max_new_tokens=self.new_tokens))) as generation:
            started = clock()
            with recorder or nullcontext():
                phase("prefill")
                generation.prefill()
                phase("decode")
                between = clock()
                for _ in range(self.new_tokens - 1):
                    generation.step()
                    phase("decode")
            ended = clock()  # with the hooks removed
        return between - started, (ended - between) / (self.new_tokens - 1)


def held_bytes(report: object) -> int:
    """Bytes of all numpy arrays inside nested dataclasses, tuples, lists and dicts. Memory that several arrays share
    counts once, and whole: a view keeps all of what it is a view of."""
    return sum({id(owner): owner.nbytes for owner in map(_owner, _arrays(report))}.values())


def _arrays(value: object) -> Iterator[np.ndarray]:
    import numpy as np

    if isinstance(value, np.ndarray):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _arrays(getattr(value, field.name))
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _arrays(item)


def _owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory `array` is a part of; of torch's memory, the whole that torch handed over."""
    while isinstance(array.base, type(array)):
        array = array.base
    return array
