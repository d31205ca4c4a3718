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

from llmq.bench.setup import Setup, spread
from llmq.bench.speed import DecodeBench
from llmq.contestant import Contestant
from llmq.engine.hf import HFEngine
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice
from llmq.machine.door import Lease
from llmq.models.opening import Model

if TYPE_CHECKING:
    import numpy as np

    from llmq.inspect.recorder import OutlierRecorder


@dataclass(frozen=True, kw_only=True)
class HooksBench(DecodeBench):
    """`repeats` rounds, in each of which the same generation runs once unwatched and once watched."""

    kind = "hooks"
    columns = ("method", "prefill_ratio", "decode_ratio", "prefill_seconds", "decode_seconds_per_token", "held_bytes")

    def __post_init__(self):
        super().__post_init__()
        if self.engine not in ("auto", "hf"):
            raise BadChoice(f"engine {self.engine!r} has no layers to hook; choose auto or hf")

    def conditions(self) -> dict:
        return {"new_tokens": self.new_tokens, "schedule": "with and without in turn, round by round"}

    def facts(self) -> dict:
        return {}

    def loop_of(self, contestant: Contestant, model: Model) -> str:
        return "hf"

    def told(self, row: dict) -> str:
        return f"{row['prefill_ratio']:.2f}x in prefill, {row['decode_ratio']:.2f}x in decode"

    def measure(self, lease: Lease, contestant: Contestant, key: Key, setup: Setup) -> dict:
        from llmq.inspect.recorder import OutlierRecorder

        engine = lease.get(key, contestant.method)
        rounds = []
        for number in range(self.repeats + 1):  # the first is not counted
            recorder = OutlierRecorder(engine.model, outlier_columns=engine.method.outlier_columns)
            sides = (None, recorder) if number % 2 else (recorder, None)  # who comes second may find warmer caches
            rounds.append({bool(side): self._seconds(engine, setup.prompt_ids, side, lease.clock) for side in sides})
        held = held_bytes(recorder.report(model=self.model, method=contestant.label))
        plain, watched = ([seconds[side] for seconds in rounds[1:]] for side in (False, True))
        row = {"engine": engine.name, "held_bytes": held}
        for phase, name in enumerate(("prefill_seconds", "decode_seconds_per_token")):
            without, with_hooks = ([seconds[phase] for seconds in side] for side in (plain, watched))
            ratios = [slow / fast for fast, slow in zip(without, with_hooks, strict=True)]
            row |= spread(f"{name.partition('_')[0]}_ratio", ratios)
            row |= {name: statistics.median(without), f"{name}_watched": statistics.median(with_hooks)}
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
