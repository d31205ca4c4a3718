"""Every method against FP16 on one model: what each loses, weighs and takes, a row as soon as it is measured.

Quality is the quality lab's own: perplexity change in pairs of windows and KL, with intervals. Each method is measured
beside FP16 in one loop and let go before the next, so two models are in memory at a time. Speed is decode, alternately
with FP16 in the same loop; there is none for emulated arithmetic.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any

from llmq.contestant import Contestant, Contestants, shown_name
from llmq.engine.base import Engine, Interrupted
from llmq.engine.choice import choose_engines
from llmq.engine.loading import Key, statistics_file
from llmq.engine.sampling import SamplingSettings
from llmq.environment import describe
from llmq.errors import UserError
from llmq.events import Event, Loaded, Progress
from llmq.fields import Number
from llmq.figures.blocks import Drawing
from llmq.figures.race import speeds_figure, trade_off_figure
from llmq.formatting import LOOPS, MISSING, format_bytes, format_seconds, format_speed
from llmq.labs.quality import Quality
from llmq.labs.rows import BASELINE, RowAnswer, TableLab
from llmq.machine.door import Lease
from llmq.models.opening import Model
from llmq.models.reference_text import WINDOW

SPEED_TOKENS = 12
FIELD = (
    "fp16,int8-weight-only,llm-int8,vectorwise,groupwise,zeropoint,absmax,smoothquant,fp8,nf4,rtn,gptq,awq,rtn@3,gptq@3"
)


@dataclass(frozen=True, kw_only=True)
class Race(TableLab):
    """`contestants` on `tokens` tokens of the reference text."""

    kind, command, part = "race", ("race",), "Race"
    title, button = "Which method loses least?", "Start the race"
    about = (
        "Every method reads the same text as FP16. Further down means less is lost, further left less memory. Decode "
        "speed (tok/s) is told where the method's arithmetic is real here; the others are emulated. GPTQ, AWQ and "
        "SmoothQuant calibrate first, once for each model."
    )
    explained = (
        "**The names.** One scale can serve a whole tensor, a row, or a group of a few numbers: the fewer numbers "
        "share it, the fewer one outlier spoils. Rounded to nearest, GPTQ and AWQ have 4 bits for a weight where the "
        "name says no other. A speed is told against FP16 in the same loop: the lean loop or transformers."
    )
    example, prompted = "Name three colours.", "What is answered while speed is measured."
    contestants: Annotated[
        tuple[Contestant, ...], Contestants(label="Methods", help="names with commas between them")
    ] = Contestant.parse_all(FIELD)
    tokens: Annotated[
        int,
        Number(
            2 * WINDOW, 1_000_000, whole=True, help="how much of the text", label="Tokens", shown=16384, step=WINDOW
        ),
    ] = 4 * WINDOW
    prompt: str = ""
    columns = {
        "Method": lambda row: shown_name(row["method"]),
        "Perplexity change (95 %, paired)": lambda row: _shown_change(row),
        "KL to FP16": "{kl_to_fp16:.3g}",
        "Weights": lambda row: format_bytes(row.get("bytes")),
        "Decode": lambda row: _shown_speed(row),
        "Calibrate": lambda row: _shown_calibration(row),
        "Load and quantize": lambda row: format_seconds(row.get("load_seconds")),
    }

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Yield events, progress, and an answer after every method; stopped early, what was measured stays."""
        model = yield from lease.open(self.model)
        result = {"kind": self.kind, "model": self.model, "device": self.device, "stopped": True}
        result |= {"conditions": describe(self.device, model.source), "missing": {}, "results": []}
        try:
            for number, contestant in enumerate(self.contestants):
                yield lease.progress(f"{contestant.title} starts", number / len(self.contestants))
                try:
                    told, row = yield from self._row(lease, model, contestant, number)
                except UserError as error:
                    result = result | {"missing": result["missing"] | {contestant.label: str(error)}}
                    continue
                told["conditions"] |= {"command": self.typed()}
                told = {name: told[name] for name in ("text", "tokens", "conditions")}
                result = result | told | {"results": [*result["results"], row]}
                yield RowAnswer(type(self), result, done=False)
            result = result | {"stopped": False}
        except Interrupted:
            pass
        if result["results"] or result["missing"]:
            yield RowAnswer(type(self), result)

    def _row(
        self, lease: Lease, model: Model, contestant: Contestant, number: int
    ) -> Generator[Event | Progress, None, tuple]:
        """The quality lab's result of one method, and its row with what else it takes."""
        pair = list(dict.fromkeys((BASELINE, contestant)))
        loops = choose_engines("auto", [c.method for c in pair], model.config.to_dict(), self.device)
        keys = [Key.of(model, c.method, self.device, loop) for c, loop in zip(pair, loops, strict=True)]
        start, half = number / len(self.contestants), 0.5 / len(self.contestants)
        costs: dict = {}
        yield from _within(self._prepared(lease, keys[-1], contestant, costs), contestant, start, half)
        found: list[RowAnswer] = []
        yield from _within(self._read(lease, contestant, found), contestant, start + half, half)
        row = next(row for row in found[0].rows if row["method"] == contestant.label)
        emulated = contestant.method.emulated_on(self.device)
        weights = contestant.method.predict(model.shape, rest="float16" if emulated else "")  # as it would be stored
        costs |= {"bytes": weights.weights + weights.scales, "emulated": emulated}
        engines = [] if emulated else [lease.get(key, c.method) for key, c in zip(keys, pair, strict=True)]
        costs |= _speeds(engines, model.encode(self.prompt.strip() or self.example), lease)
        return found[0].result, row | costs

    def _read(self, lease: Lease, contestant: Contestant, found: list[RowAnswer]) -> Iterator[Event | Progress]:
        """Ask the quality lab; `found` gets its answer."""
        asked = Quality(
            model=self.model, device=self.device, contestants=(contestant,), tokens=self.tokens, floor=False
        )
        for item in asked.run(lease):
            if isinstance(item, RowAnswer):
                found.append(item)
            else:
                yield item

    def _prepared(self, lease: Lease, key: Key, contestant: Contestant, costs: dict) -> Iterator[Event | Progress]:
        """Calibrate and load; `costs` gets the seconds of each, None for what was there before."""
        calibrated, there = key.method.calibrated, key.method.calibrated and statistics_file(key).exists()
        started = lease.clock()
        yield from lease.calibrate(key)
        seconds = None if there else lease.clock() - started if calibrated else 0.0
        costs |= {"calibration_seconds": seconds, "load_seconds": None}
        with closing(lease.load(key, contestant)) as events:
            for event in events:
                if isinstance(event, Loaded) and not event.resident:
                    costs["load_seconds"] = event.seconds
                yield event

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> RowAnswer:
        """What was not measured is None."""
        return RowAnswer(cls, stored)

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        """The method with the least bytes among those that cost at most 1 % of perplexity, and the one that costs
        most."""
        others = [row for row in rows if shown_name(row["method"]) != BASELINE.title]
        cheap = [row for row in others if row["perplexity_change_interval"][1] <= 0.01]
        if len(others) < 2:
            return ""
        worst = max(others, key=lambda row: row["perplexity_change"])
        most = f"The most costs **{shown_name(worst['method'])}**: {_shown_change(worst)}."
        if not cheap:
            return f"None of them is sure to cost under 1 % of perplexity. {most}"
        least = min(cheap, key=lambda row: (row.get("bytes", 0), row["perplexity_change"]))
        return (
            f"The smallest that is sure to cost under 1 % of perplexity is **{shown_name(least['method'])}**, "
            f"{format_bytes(least.get('bytes'))}: {_shown_change(least)}. {most}"
        )

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        named = [row | {"name": shown_name(row["method"])} for row in rows if "bytes" in row]
        fast = [row for row in named if row.get("tokens_per_second")]
        drawn = [Drawing.of(trade_off_figure, named)] if named else []
        return [*drawn, Drawing.of(speeds_figure, fast)] if fast else drawn


def _within(items: Iterator, contestant: Contestant, start: float, share: float) -> Iterator:
    """Pass `items` through; their progress, which may begin anew, becomes that of `share` of the whole, and grows."""
    reached = start
    for item in items:
        if isinstance(item, Progress) and item.fraction is not None:
            reached = max(reached, start + share * item.fraction)
            item = Progress(f"{contestant.title}: {item.message}", reached)
        yield item


def _speeds(engines: list[Engine], ids: list[int], lease: Lease) -> dict:
    """Median decode tokens a second of the last of `engines`, and of FP16, the first, step by step in turn; None
    without engines."""
    if not engines:
        return {"tokens_per_second": None, "fp16_tokens_per_second": None}
    settings = SamplingSettings(max_new_tokens=SPEED_TOKENS + 1)
    for engine in engines:
        engine.warm_up(ids)
    runs = [engine.start(ids, settings) for engine in engines]
    try:
        for run in runs:
            run.prefill(lease.stop.is_set)
        seconds = [[run.step().seconds for run in runs] for _ in range(SPEED_TOKENS)]
    finally:
        for run in runs:
            run.close()
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    return {"tokens_per_second": 1 / medians[-1], "fp16_tokens_per_second": 1 / medians[0]}


def _shown_change(row: dict) -> str:
    low, high = (f"{100 * end:+.3g}" for end in row["perplexity_change_interval"])
    return f"{100 * row['perplexity_change']:+.3g} % ({low} to {high})"


def _shown_speed(row: dict) -> str:
    own, base = row.get("tokens_per_second"), row.get("fp16_tokens_per_second")
    if not own:
        return "emulated" if row.get("emulated") else MISSING
    return f"{format_speed(own)}, {own / base:.2f}× FP16 ({LOOPS[row['engine']]})"


def _shown_calibration(row: dict) -> str:
    seconds = row.get("calibration_seconds", None)
    return "done before" if seconds is None else "none" if seconds == 0 else format_seconds(seconds)
