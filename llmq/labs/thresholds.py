"""The threshold moved and everything measured again: quality, speed, and how much stays in 16 bit.

People read the direction wrong: a *lower* threshold lets more columns stay in 16 bit, so it is nearer to FP16 and,
where the decomposition costs time, slower. 0 is not the lowest but off: nothing is an outlier, as with infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated

from llmq.contestant import Contestant
from llmq.engine.base import Engine
from llmq.engine.sampling import SamplingSettings
from llmq.fields import Choice, Numbers
from llmq.figures.blocks import Drawing
from llmq.figures.lines import Panel, panels_figure
from llmq.formatting import format_share, shown_spread
from llmq.labs.rows import BASELINE, SCORES, RowLab, Rows, Workbench, share_of
from llmq.methods import METHODS, parse_method
from llmq.methods.base import THRESHOLD

ROUNDS = 3  # every threshold once in each, so that a change of the machine's pace meets them all
SPEED_TOKENS = 16
SPEED_PROMPT = 64
ABLE = tuple(name for name, method in METHODS.items() if "threshold" in method.live)
ABLE_LABELS = tuple(METHODS[name].label for name in ABLE)


def _ends(row: dict) -> str:
    low, middle, high = (row[f"tokens_per_second{end}"] for end in ("_min", "", "_max"))
    return f"{low:.3g} to {high:.3g}{shown_spread(low, middle, high)}"


@dataclass(frozen=True, kw_only=True)
class Thresholds(RowLab):
    """`method` at each of `thresholds`; 0 is off, infinity never reached."""

    kind, command, panel = "thresholds", ("experiment", "thresholds"), True
    title, button = "Move the threshold", "Measure all"
    about = (
        "A **lower** threshold keeps more columns in 16 bit: nearer to FP16, more work. **Off** keeps no column in "
        "16 bit; it is the opposite of a low threshold."
    )
    method: Annotated[
        str, Choice(ABLE, ABLE_LABELS, help="which method", label="Method", named="method with an outlier threshold")
    ] = "llm-int8"
    thresholds: Annotated[
        tuple[float, ...], Numbers(THRESHOLD, help="0 is off", named="threshold", flag="--thresholds")
    ] = (0.0, 2.0, 4.0, 6.0, 8.0, math.inf)
    columns = {
        "Threshold": "{threshold}",
        **SCORES,
        "Columns in 16 bit": share_of("outlier_share"),
        "Decode": "{tokens_per_second:.3g} tok/s",
        "Lowest to highest": _ends,
    }

    def contestants(self) -> list[Contestant]:
        return [Contestant(replace(parse_method(self.method), threshold=threshold)) for threshold in self.thresholds]

    def conditions(self) -> dict:
        return {"speed_rounds": ROUNDS, "speed_tokens": SPEED_TOKENS, "speed_prompt_tokens": SPEED_PROMPT}

    def measure(self, bench: Workbench) -> Rows:
        from statistics import median

        yield bench.progress("FP16 reads the text", 0.0)
        with bench.engine(BASELINE) as engine:
            truth = bench.read(engine)
        speeds = yield from self._speeds(bench)
        for number, contestant in enumerate(self.contestants()):
            name = name_of(contestant.threshold)
            yield bench.progress(f"Threshold {name} reads the text", 0.5 + 0.5 * number / len(self.thresholds))
            with bench.engine(contestant) as engine:
                yield {
                    "threshold": name,
                    "method": self.method,
                    "engine": engine.name,
                    **bench.score(bench.read(engine), truth),
                    "outlier_share": engine.outlier_share(bench.texts[0]),
                    "tokens_per_second": median(speeds[contestant.threshold]),
                    "tokens_per_second_min": min(speeds[contestant.threshold]),
                    "tokens_per_second_max": max(speeds[contestant.threshold]),
                }

    def _speeds(self, bench: Workbench):
        """Decode tokens a second at each threshold, a figure a round."""
        speeds: dict[float, list[float]] = {threshold: [] for threshold in self.thresholds}
        for number in range(ROUNDS):
            for place, contestant in enumerate(self.contestants()):
                share = (number + place / len(self.thresholds)) / ROUNDS
                name = name_of(contestant.threshold)
                yield bench.progress(f"Speed at threshold {name}, round {number + 1} of {ROUNDS}", 0.05 + 0.45 * share)
                with bench.engine(contestant) as engine:
                    seconds = decode_seconds(
                        engine, bench.texts[0][:SPEED_PROMPT], SPEED_TOKENS, bench.lease.stop.is_set
                    )
                speeds[contestant.threshold].append(SPEED_TOKENS / seconds)
        return speeds

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        on = sorted((float(row["threshold"]), row) for row in rows if row["threshold"] not in ("off", "∞"))
        if len(on) < 2:
            return ""
        (_, low), (_, high) = on[0], on[-1]
        off = next((row for row in rows if row["threshold"] == "off"), None)
        end = f"; off, none and {off['kl_to_fp16']:.3g}" if off else ""
        return (
            f"At threshold {low['threshold']}, {format_share(low['outlier_share'])} of the columns stay in 16 bit and "
            f"KL to FP16 is {low['kl_to_fp16']:.3g}; at {high['threshold']}, {format_share(high['outlier_share'])} and "
            f"{high['kl_to_fp16']:.3g}{end}."
        )

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """Perplexity, share of columns in 16 bit and speed at each threshold, below one another."""
        speed = [row["tokens_per_second"] for row in rows]
        spread = [(row["tokens_per_second_min"], row["tokens_per_second_max"]) for row in rows]
        panels = (
            Panel("perplexity", [row["perplexity"] for row in rows], "perplexity %{y:.5~r}"),
            Panel(
                "% of columns", [100 * row["outlier_share"] for row in rows], "%{y:.3~r} % in 16 bit", from_zero=True
            ),
            Panel("tok/s", speed, "%{y:.4~r} tok/s", spread=spread, from_zero=True),
        )
        title = "By threshold: perplexity, columns in 16 bit, speed"
        names = [row["threshold"] for row in rows]
        x_title = "threshold (off: no column in 16 bit)"
        return [Drawing.of(panels_figure, title, "threshold", x_title, names, panels)]


def decode_seconds(engine: Engine, ids: list[int], steps: int, stopped: Callable[[], bool]) -> float:
    """Seconds of `steps` decode steps after the prompt `ids`, the engine warmed up before."""
    engine.warm_up(ids)
    with closing(engine.start(ids, SamplingSettings(max_new_tokens=steps + 1))) as generation:
        generation.prefill(stopped)
        return sum(generation.step().seconds for _ in range(steps))


def name_of(threshold: float) -> str:
    """As it is written: 'off', '6', '∞'."""
    return "off" if threshold == 0 else "∞" if math.isinf(threshold) else f"{threshold:g}"
