"""What watching costs: the same generation with and without an `OutlierRecorder` around it, in turn.

A machine that others use too slows both runs of a round alike, so the figures to trust are the ratios within a round.
The watched side includes everything a watched generation has and another has not: placing and removing the hooks, the
reductions, and the statistics' way to the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING

from llmq.bench.decode import DecodeBench
from llmq.contestants import Contestant
from llmq.engine.hf import HFEngine
from llmq.engine.residents import Key, Residents
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice

if TYPE_CHECKING:
    import numpy as np

    from llmq.inspect.recorder import OutlierRecorder


@dataclass(frozen=True, kw_only=True)
class HooksBench(DecodeBench):
    """`repeats` rounds, in each of which the same generation runs once unwatched and once watched."""

    def __post_init__(self):
        super().__post_init__()
        if self.engine not in ("auto", "hf"):
            raise BadChoice(f"engine {self.engine!r} has no layers to hook; choose auto or hf")


def bench_hooks(bench: HooksBench, report: Callable[[str], None] = lambda line: None) -> dict:
    """Run `bench`; the result has the stable keys of `bench --json`. `report` gets a line per finished method."""
    setup = replace(bench, engine="hf").prepare(report, positions=bench.prompt_tokens + bench.new_tokens)
    results = []
    for contestant, key in setup.entries:
        results.append(row := _measure(bench, contestant, key, setup.prompt_ids))
        report(f"{contestant.label}: {row['prefill_ratio']:.2f}x in prefill, {row['decode_ratio']:.2f}x in decode")
    schedule = "with and without in turn, round by round"
    return bench.result("hooks", setup, results, new_tokens=bench.new_tokens, schedule=schedule)


def _measure(bench: HooksBench, contestant: Contestant, key: Key, prompt_ids: list[int]) -> dict:
    from llmq.inspect.recorder import OutlierRecorder

    residents = Residents()
    engine, _ = residents.get(key)
    if contestant.threshold is not None:
        engine.set_threshold(contestant.threshold)
    rounds = []
    for number in range(bench.repeats + 1):  # the first is not counted
        recorder = OutlierRecorder(engine.model, account=engine.handler.sixteen_bit_columns)
        sides = (None, recorder) if number % 2 else (recorder, None)  # who comes second may find warmer caches
        rounds.append({bool(side): _seconds(engine, prompt_ids, bench.new_tokens, side) for side in sides})
    held = held_bytes(recorder.report(model=bench.model, method=contestant.label))
    plain, watched = ([seconds[side] for seconds in rounds[1:]] for side in (False, True))
    row = {"method": contestant.label, "engine": engine.name, "held_bytes": held}
    for phase, name in enumerate(("prefill_seconds", "decode_seconds_per_token")):
        pairs = [(one[phase], other[phase]) for one, other in zip(plain, watched, strict=True)]
        row |= _compared(name.partition("_")[0], name, pairs)
    del engine, recorder, sides  # they hold the model
    return row | {"memory_freed": residents.drop(key).verified}


def _compared(phase: str, name: str, pairs: list[tuple[float, float]]) -> dict:
    """One phase's keys from (seconds without, seconds with) of every round."""
    ratios = [watched / plain for plain, watched in pairs]
    plain, watched = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        f"{phase}_ratio": statistics.median(ratios),
        f"{phase}_ratio_min": min(ratios),
        f"{phase}_ratio_max": max(ratios),
        name: plain,
        f"{name}_watched": watched,
    }


def _seconds(
    engine: HFEngine, prompt_ids: list[int], new_tokens: int, recorder: OutlierRecorder | None
) -> tuple[float, float]:
    """Seconds of the prefill and of one decode step (their mean), by the host's clock; both end with the chosen token
    on the host. With a recorder each phase also ends with its statistics there."""
    phase = recorder.phase if recorder else lambda name: None
    generation = engine.start(prompt_ids, SamplingSettings(max_new_tokens=new_tokens))
    started = time.perf_counter()
    with recorder or nullcontext():
        phase("prefill")
        generation.prefill()
        phase("decode")
        between = time.perf_counter()
        for _ in range(new_tokens - 1):
            generation.step()
            phase("decode")
        ended = time.perf_counter()
    generation.close()
    return between - started, (ended - between) / (new_tokens - 1)


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
