"""The threshold moved and everything measured again: quality, speed, and how much stays in 16 bit.

People read the direction wrong: a *lower* threshold lets more columns stay in 16 bit, so it is nearer to FP16 and,
where the decomposition costs time, slower. 0 is not the lowest but off: nothing is an outlier, as with infinity.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from llmq.contestant import Contestant
from llmq.engine.interface import Engine
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice
from llmq.experiments.channels import BASELINE
from llmq.experiments.lab import Experiment, Lab, Rows
from llmq.methods import METHODS, parse_method

ROUNDS = 3  # every threshold once in each, so that a change of the machine's pace meets them all
SPEED_TOKENS = 16
SPEED_PROMPT = 64


@dataclass(frozen=True, kw_only=True)
class Thresholds(Experiment):
    """`method` at each of `thresholds`; 0 is off, infinity never reached."""

    kind = "thresholds"
    method: str = "llm-int8"
    thresholds: tuple[float, ...] = (0.0, 2.0, 4.0, 6.0, 8.0, math.inf)

    def __post_init__(self):
        super().__post_init__()
        if parse_method(self.method).threshold is None:
            able = ", ".join(name for name, method in METHODS.items() if method.threshold is not None)
            raise BadChoice(f"{self.method} has no outlier threshold; choose one of {able}")
        if not self.thresholds:
            raise BadChoice("no threshold is given; choose numbers from 0 (off) up, and inf")
        self.contestants()

    def contestants(self) -> list[Contestant]:
        return [Contestant(replace(parse_method(self.method), threshold=threshold)) for threshold in self.thresholds]

    def conditions(self) -> dict:
        return {"speed_rounds": ROUNDS, "speed_tokens": SPEED_TOKENS, "speed_prompt_tokens": SPEED_PROMPT}

    def measure(self, lab: Lab) -> Rows:
        yield lab.progress("FP16 reads the text", 0.0)
        with lab.engine(BASELINE) as engine:
            truth = lab.read(engine)
        speeds = yield from self._speeds(lab)
        for number, contestant in enumerate(self.contestants()):
            name = name_of(contestant.threshold)
            yield lab.progress(f"read the text at {name}", 0.5 + 0.5 * number / len(self.thresholds))
            with lab.engine(contestant) as engine:
                yield {
                    "threshold": name,
                    "method": self.method,
                    "engine": engine.name,
                    **lab.score(lab.read(engine), truth),
                    "outlier_share": engine.sixteen_bit_share(lab.texts[0]),
                    "tokens_per_second": statistics.median(speeds[contestant.threshold]),
                    "tokens_per_second_min": min(speeds[contestant.threshold]),
                    "tokens_per_second_max": max(speeds[contestant.threshold]),
                }

    def _speeds(self, lab: Lab):
        """Decode tokens a second at each threshold, a figure a round."""
        speeds: dict[float, list[float]] = {threshold: [] for threshold in self.thresholds}
        for number in range(ROUNDS):
            for place, contestant in enumerate(self.contestants()):
                share = (number + place / len(self.thresholds)) / ROUNDS
                name = name_of(contestant.threshold)
                yield lab.progress(f"speed at {name}, round {number + 1} of {ROUNDS}", 0.05 + 0.45 * share)
                with lab.engine(contestant) as engine:
                    seconds = decode_seconds(engine, lab.texts[0][:SPEED_PROMPT], SPEED_TOKENS, lab.lease.stop.is_set)
                speeds[contestant.threshold].append(SPEED_TOKENS / seconds)
        return speeds


def decode_seconds(engine: Engine, ids: list[int], steps: int, stopped: Callable[[], bool]) -> float:
    """Seconds of `steps` decode steps after the prompt `ids`, the engine warmed up before."""
    engine.warm_up(ids)
    generation = engine.start(ids, SamplingSettings(max_new_tokens=steps + 1))
    try:
        generation.prefill(stopped)
        return sum(generation.step().seconds for _ in range(steps))
    finally:
        generation.close()


def name_of(threshold: float) -> str:
    """As it is written: 'off', '6', '∞'."""
    return "off" if threshold == 0 else "∞" if math.isinf(threshold) else f"{threshold:g}"
