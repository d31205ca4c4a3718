"""The threshold moved and everything measured again: quality, speed, and how much stays in 16 bit.

People read the direction wrong: a *lower* threshold lets more columns stay in 16 bit, so it is nearer to FP16 and,
where the decomposition costs time, slower. 0 is not the lowest but off: nothing is an outlier, as with infinity.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from llmq.contestants import Contestant
from llmq.engine.interface import Engine
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice
from llmq.experiments.channels import BASELINE
from llmq.experiments.lab import Experiment, Lab, Rows
from llmq.quant import METHODS, method_named

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
        if not method_named(self.method).handler.has_threshold:
            able = ", ".join(name for name, method in METHODS.items() if method.handler.has_threshold)
            raise BadChoice(f"{self.method} has no outlier threshold; choose one of {able}")
        if not self.thresholds:
            raise BadChoice("no threshold is given; choose numbers from 0 (off) up, and inf")
        self.contestants()

    def contestants(self) -> list[Contestant]:
        return [Contestant(self.method, threshold) for threshold in self.thresholds]

    def conditions(self) -> dict:
        return {"speed_rounds": ROUNDS, "speed_tokens": SPEED_TOKENS, "speed_prompt_tokens": SPEED_PROMPT}

    def measure(self, lab: Lab) -> Rows:
        yield lab.progress("FP16 reads the text", 0.0)
        with lab.engine(BASELINE) as engine:
            truth = lab.read(engine)
        # One model serves all thresholds; it is one key, so that it is loaded once.
        with lab.engine(Contestant.parse(self.method)) as engine:
            speeds = yield from self._speeds(lab, engine)
            for number, threshold in enumerate(self.thresholds):
                yield lab.progress(f"read the text at {name_of(threshold)}", 0.5 + 0.5 * number / len(self.thresholds))
                engine.set_threshold(threshold)
                row = {"threshold": name_of(threshold), "method": self.method, "engine": engine.name}
                row |= lab.score(lab.read(engine), truth)
                row |= {
                    "outlier_share": engine.sixteen_bit_share(lab.texts[0]),
                    "tokens_per_second": statistics.median(speeds[threshold]),
                    "tokens_per_second_min": min(speeds[threshold]),
                    "tokens_per_second_max": max(speeds[threshold]),
                }
                yield row

    def _speeds(self, lab: Lab, engine: Engine):
        """Decode tokens a second at each threshold, a figure a round."""
        speeds: dict[float, list[float]] = {threshold: [] for threshold in self.thresholds}
        ids = lab.texts[0][:SPEED_PROMPT]
        for number in range(ROUNDS):
            for place, threshold in enumerate(self.thresholds):
                share = (number + place / len(self.thresholds)) / ROUNDS
                yield lab.progress(
                    f"speed at {name_of(threshold)}, round {number + 1} of {ROUNDS}", 0.05 + 0.45 * share
                )
                engine.set_threshold(threshold)
                engine.warm_up(ids)
                generation = engine.start(ids, SamplingSettings(max_new_tokens=SPEED_TOKENS + 1))
                try:
                    generation.prefill(lab.lease.stop.is_set)
                    seconds = sum(generation.step().seconds for _ in range(SPEED_TOKENS))
                finally:
                    generation.close()
                speeds[threshold].append(SPEED_TOKENS / seconds)
        return speeds


def name_of(threshold: float) -> str:
    """As it is written: 'off', '6', '∞'."""
    return "off" if threshold == 0 else "∞" if math.isinf(threshold) else f"{threshold:g}"
