"""Writing with a KV cache and without: seconds, operations and bytes of one more token, by the length of the text.

Through transformers in FP16: `use_cache=True` feeds the new token alone, `use_cache=False` the whole text again.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.engine.loading import Key
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.figures.blocks import Drawing
from llmq.figures.lengths import Curve, lengths_figure
from llmq.formatting import format_bytes, format_number, format_seconds, shown_spread
from llmq.formulas import kv_bytes
from llmq.labs.lengths import lengths_up_to, longest_text
from llmq.labs.rows import BASELINE, RowAnswer, Rows, TableLab
from llmq.machine.door import Lease
from llmq.models.config import heads_of
from llmq.models.reference_text import reference_text

if TYPE_CHECKING:
    from llmq.engine.hf import HFEngine
    from llmq.inspect.caching import Place

ROUNDS = 3
SIDES = {"cached": "with the cache", "whole": "without"}


@dataclass(frozen=True, kw_only=True)
class Caching(TableLab):
    """Six lengths up to `longest` tokens, each half of the next. `prompt`: the page's, which plays no part."""

    kind, command, part = "kv-cache", ("experiment", "kv-cache"), "Attention"
    title = "One more token, with the KV cache and without"
    about = (
        "With a KV cache a model reads only the new token; without one it reads the whole text again each time. What "
        "does one more token cost, by the length of the text: in seconds, operations and bytes?"
    )
    explained = (
        "**What the cache saves.** With P weights in the linear layers, L layers, h heads of width d and N tokens, one "
        "more token takes 2·P + 4·L·h·d·N operations with the cache, and about N times as many without.\n\n"
        "**What it does not.** Attention still looks at all N tokens, so the time of a token is not constant: it grows "
        "with the text. And operations are not time: for a single token most of the machine waits for weights, so "
        "reading a short text again costs little more.\n\n"
        "**The price** is memory: 2·L·G·d numbers for each token, where G heads of keys and values are kept. With "
        "grouped-query attention (GQA) h/G heads share one of them: the cache is h/G times smaller, and the 4·L·h·d·N "
        "operations stay."
    )
    longest: Annotated[int, longest_text(shown=4096)] = 256
    prompt: str = ""
    columns = {
        "Tokens": "{tokens:,}",
        "With the cache": lambda row: _timed(row, "cached"),
        "Without": lambda row: _timed(row, "whole"),
        "Times as long": "{whole_over_cached:.3g}",
        "Operations with: counted (formula)": lambda row: _operations(row, "cached"),
        "Without: counted (formula)": lambda row: _operations(row, "whole"),
        "Cache: measured (formula)": lambda row: f"{format_bytes(row['kv_bytes'])} ({format_bytes(row['kv_formula'])})",
        "Without GQA": lambda row: format_bytes(row["kv_bytes"] * row["sharing"]),
        "Same choice": lambda row: "yes" if row["same_choice"] else "no",
    }

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Yield events, progress, and an answer after every row. Raises BadChoice for more tokens than the model reads,
        and for a model that keeps something else than keys and values."""
        model = yield from lease.open(self.model)
        if self.longest > model.context:
            raise BadChoice(
                f"longest is {self.longest:,} and {self.model} reads {model.context:,} tokens; choose fewer"
            )
        if kv_bytes(model.config.get_text_config(), tokens=1) is None:
            raise BadChoice(f"{self.model} keeps no keys and values of every token; choose a LLaMA, such as demo")
        ids = model.tokenize(reference_text()[: 20 * self.longest + 200])[: self.longest]
        engine = yield from lease.load(Key.of(model, BASELINE.method, self.device), BASELINE)
        names, heads = ("heads", "kv_heads", "head_dim"), heads_of(model.config.get_text_config())
        asked = {"method": BASELINE.label, "engine": "hf", "batch": 1, "rounds": ROUNDS, "command": self.typed()}
        conditions = dict(zip(names, heads, strict=True)) | asked | describe(self.device, model.source)
        yield from self.gathered(self.measure(lease, engine, ids), conditions)

    def measure(self, lease: Lease, engine: HFEngine, ids: list[int]) -> Rows:
        """Yield a row for every length."""
        from llmq.inspect.caching import Operations, Place, counted, twin_of

        config = engine.model.config.get_text_config()
        heads, kv_heads, head_dim = heads_of(config)
        formulas, itemsize = Operations.of(engine.model, heads, head_dim), engine.model.dtype.itemsize
        twin = twin_of(engine.model)
        lengths = lengths_up_to(self.longest)
        for number, tokens in enumerate(lengths):
            done = sum(lengths[:number]) / sum(lengths)
            yield lease.progress(f"{tokens:,} tokens: reading", done)
            measured = yield from self._compare(lease, Place.after(engine, ids[:tokens]), done)
            yield {
                "tokens": tokens,
                **measured,
                "cached_operations": counted(twin, tokens, cached=True),
                "whole_operations": counted(twin, tokens, cached=False),
                "cached_formula": formulas.of_token(tokens, 1),
                "whole_formula": formulas.of_token(tokens, tokens),
                "kv_formula": kv_bytes(config, tokens=tokens, itemsize=itemsize),
                "sharing": heads // kv_heads,
            }

    def _compare(self, lease: Lease, place: Place, done: float):
        """Time both ways in turn, round by round, and compare what they give."""
        from llmq.inspect.caching import bytes_of

        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(ROUNDS + 1):  # the first is not counted
            for side in list(SIDES)[:: 1 if number % 2 else -1]:
                yield lease.progress(f"{place.ids.shape[1]:,} tokens: round {number} of {ROUNDS}", done)
                seconds[side].append(place.call(cached=side == "cached")[1])
        (own, _, kept), (again, _, _) = (place.call(cached=side == "cached") for side in SIDES)
        ratios = [a / b for a, b in zip(seconds["whole"][1:], seconds["cached"][1:], strict=True)]
        return {
            **{key: value for side in SIDES for key, value in _spread(f"{side}_seconds", seconds[side][1:]).items()},
            "whole_over_cached": statistics.median(ratios),
            "kv_bytes": bytes_of(kept),
            "largest_logit_difference": float((own - again).abs().max()),
            "same_choice": bool(own.argmax() == again.argmax()),
        }

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        if not rows:
            return ""
        row, off = rows[-1], max(_off(row, side) for row in rows for side in SIDES)
        share = "" if row["sharing"] == 1 else f", {row['sharing']} times less than if no heads shared keys and values"
        counted = f"lie within {100 * off:.2g} % of the formulas" if off else "are those of the formulas exactly"
        return (
            f"At {row['tokens']:,} tokens one more takes {format_seconds(row['cached_seconds'])} with the cache and "
            f"{format_seconds(row['whole_seconds'])} without, **{row['whole_over_cached']:.3g} times as long** for "
            f"{row['whole_operations'] / row['cached_operations']:.3g} times the operations. The cache holds "
            f"{format_bytes(row['kv_bytes'])}{share}. Counted operations {counted}."
        )

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """Time and operations of one more token by length, with the formulas' lines."""
        time, work = (
            [Curve(name, [(row["tokens"], row[f"{side}_{key}"] / unit) for row in rows], number)
             for number, (side, name) in enumerate(SIDES.items())]
            for key, unit in (("seconds", 1e-3), ("operations", 1e9))
        )  # fmt: skip
        work += [Curve("formula", [(row["tokens"], row[f"{side}_formula"] / 1e9) for row in rows]) for side in SIDES]
        return [Drawing.of(lengths_figure, "One more token by length of the text", ("ms", time), ("GFLOP", work))]


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def _off(row: dict, side: str) -> float:
    """How far what was counted lies from the formula, as a share of it."""
    return abs(row[f"{side}_operations"] / row[f"{side}_formula"] - 1)


def _timed(row: dict, side: str) -> str:
    low, middle, high = (row[f"{side}_seconds{end}"] for end in ("_min", "", "_max"))
    return format_seconds(middle) + shown_spread(low, middle, high)


def _operations(row: dict, side: str) -> str:
    counted, formula = (format_number(row[f"{side}_{key}"] / 1e9) for key in ("operations", "formula"))
    return f"{counted} ({formula}) GFLOP"
