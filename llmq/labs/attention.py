"""Attention with the N × N matrix of scores and without: time and memory of every kernel by length, and its result.

One layer's causal attention, forward, of a model's heads; the numbers are N(0, 1), since neither time nor memory
depends on them. FlashAttention: Dao et al. 2022, arXiv 2205.14135; its second version: Dao 2023, arXiv 2307.08691.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import log
from typing import TYPE_CHECKING, Annotated, Any

from llmq import telemetry
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.fields import Choice
from llmq.figures.blocks import Drawing
from llmq.figures.lengths import Curve, lengths_figure, power_of
from llmq.formatting import MISSING, format_bytes, format_seconds, shown_spread
from llmq.formulas import kv_bytes
from llmq.labs.lengths import lengths_up_to, longest_text
from llmq.labs.rows import RowAnswer, Rows, TableLab
from llmq.machine.door import Lease
from llmq.memory import HEADROOM
from llmq.models.config import heads_of

if TYPE_CHECKING:
    from llmq.inspect.attention import Heads, Inputs, Kernel

ROUNDS = 7
BYTES_A_SCORE = 12  # of a kernel that keeps them all: the most before any is measured
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Attention(TableLab):
    """Six lengths up to `longest` tokens, each half of the next. `prompt`: the page's, which plays no part."""

    kind, command, part = "attention", ("experiment", "attention"), "Attention"
    title = "Attention with the N × N matrix, and without"
    about = (
        "In attention every token looks at every token before it. The textbook's way (**eager**) keeps a score for "
        "each pair: N × N numbers. Other kernels never hold that matrix. Compared are time, memory and results of one "
        "layer, on random numbers in the shape of the model's heads."
    )
    explained = (
        "**FlashAttention is exact, not an approximation.** Every pair of tokens is still multiplied, so the work "
        "grows with N² as before. Results differ from eager's only by rounding: sums are added in another order.\n\n"
        "**Version 1** cuts queries, keys and values into tiles that fit the GPU's fast on-chip memory, and keeps a "
        "running maximum and sum for the softmax. So the N × N scores never travel to the large memory (HBM): memory "
        "beside the inputs grows with N, and far fewer bytes move. Training computes the scores again on the way back "
        "instead of storing them.\n\n"
        "**Version 2** needs the same memory and gives the same result, faster. It does fewer operations that are no "
        "matrix products. It shares the work out along the text too, not only over batch and heads. And the warps of "
        "a block split it by queries, so that they exchange less.\n\n"
        "The mask of N² numbers that eager reads is made beforehand, once for all layers, and counted as an input."
    )
    longest: Annotated[int, longest_text(shown=16384)] = 2048
    dtype: Annotated[str, Choice(DTYPES, help="type of the numbers", label="Numbers")] = "bfloat16"
    prompt: str = ""
    columns = {
        "Tokens": lambda row: f"{row['tokens']:,}" if row["tokens"] else "any",
        "Kernel": "{kernel}",
        "Time": lambda row: _time(row),
        "Lowest to highest": lambda row: _ends(row),
        "Times as fast as eager": lambda row: _shown(row, "over_eager"),
        "Memory beside the inputs": lambda row: format_bytes(row.get("peak_bytes")),
        "Units from exact": lambda row: _shown(row, "units_to_exact"),
        "Units from eager": lambda row: _shown(row, "units_to_eager"),
    }

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Yield progress, and an answer after every row. Raises BadChoice for a model that attends in another way."""
        from llmq.inspect.attention import CHECKED, Heads

        model = lease.describe(self.model)
        config = model.config.get_text_config()
        if kv_bytes(config, tokens=1) is None:
            raise BadChoice(f"{self.model} does not attend with one set of heads; choose a LLaMA, such as demo")
        heads = Heads(*heads_of(config))
        asked = {"dtype": self.dtype, "batch": 1, "rounds": ROUNDS, "checked_tokens": CHECKED, "command": self.typed()}
        yield from self.gathered(
            self.measure(lease, heads), asdict(heads) | asked | describe(self.device, model.source)
        )

    def measure(self, lease: Lease, heads: Heads) -> Rows:
        """Yield a row for every kernel that this device does not have, then for every length and kernel."""
        import torch

        from llmq.inspect.attention import Inputs, kernels

        lengths, dtype = lengths_up_to(self.longest), getattr(torch, self.dtype)
        yield lease.progress("looking for kernels", 0.0)
        found = list(kernels(Inputs.random(heads, lengths[0], dtype, self.device)))
        yield from ({"tokens": None, "kernel": kernel.name, "absent": why} for kernel, why in found if why)
        last: dict[str, dict] = {}  # row of each kernel
        for number, tokens in enumerate(lengths):
            inputs = Inputs.random(heads, tokens, dtype, self.device)
            able = []
            for kernel in (kernel for kernel, why in found if not why):
                if short := self._shortage(kernel, inputs, last):
                    yield {"tokens": tokens, "kernel": kernel.name, "absent": short}
                else:
                    able.append(kernel)
            for row in (yield from self._rows(lease, inputs, able, sum(lengths[:number]) / sum(lengths))):
                last[row["kernel"]] = row
                yield row | {"within_rounding": _within(row, last.get("eager"))}

    def _shortage(self, kernel: Kernel, inputs: Inputs, last: dict[str, dict]) -> str:
        """Why a kernel that keeps all scores is not tried, by what it needed at a shorter length; '' where it fits."""
        needed = BYTES_A_SCORE * inputs.q.shape[1] * inputs.tokens**2 if kernel.quadratic else 0
        if needed and kernel.name in last:
            shorter = last[kernel.name]
            needed = shorter["peak_bytes"] * (inputs.tokens / shorter["tokens"]) ** 2
        free = telemetry.free_bytes(self.device)
        told = f"needs {format_bytes(needed)}, and {format_bytes(int(HEADROOM * free))} may be used"
        return told if needed > HEADROOM * free else ""

    def _rows(self, lease: Lease, inputs: Inputs, able: list[Kernel], done: float):
        """The row of each kernel at one length, everybody in turn, round by round."""
        from llmq.inspect.attention import calls_in_a_turn, distances, peak_bytes, seconds_of

        told, calls, peaks = f"{inputs.tokens:,} tokens", {}, {}
        for kernel in able:
            yield lease.progress(f"{told}: memory of {kernel.name}", done)
            calls[kernel] = calls_in_a_turn(kernel, inputs, self.device)
            peaks[kernel] = peak_bytes(kernel, inputs, self.device)
        seconds = {kernel: [] for kernel in able}
        for number in range(ROUNDS):
            first = number % len(able)  # who comes later may find warmer caches
            for kernel in able[first:] + able[:first]:
                yield lease.progress(f"{told}: round {number + 1} of {ROUNDS}", done)
                seconds[kernel].append(seconds_of(kernel, inputs, self.device, calls[kernel]))
        yield lease.progress(f"{told}: comparing the results", done)
        eager = next((seconds[kernel] for kernel in able if kernel.name == "eager"), None)
        return [
            {"tokens": inputs.tokens, "kernel": kernel.name, "calls": calls[kernel], "peak_bytes": peaks[kernel]}
            | _timed(seconds[kernel], eager) | apart
            for kernel, apart in zip(able, distances(able, inputs), strict=True)
        ]  # fmt: skip

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> RowAnswer:
        """What is not known is None."""
        return RowAnswer(cls, stored)

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        """The fastest kernel beside eager at the longest length of both, how memory grows, how far results lie apart,
        and what is not here."""
        by_kernel = _measured(rows)
        eager = by_kernel.pop("eager", [])
        rivals = [row for some in by_kernel.values() for row in some if eager and row["tokens"] == eager[-1]["tokens"]]
        if len(eager) < 2 or not rivals:
            return ""
        base, best = eager[-1], min(rivals, key=lambda row: row["seconds"])
        return (
            f"At {base['tokens']:,} tokens **{best['kernel']}** takes {format_seconds(best['seconds'])}, "
            f"{best['over_eager']:.3g} times as fast as eager, and {format_bytes(best['peak_bytes'])} beside the "
            f"inputs instead of {format_bytes(base['peak_bytes'])}. Memory grows as N^{_growth(eager):.2f} in eager "
            f"and as N^{_growth(by_kernel[best['kernel']]):.2f} there. {_equal(eager, by_kernel)}{_not_here(rows)}"
        )

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """Time and memory by length, with the lines of N and N²."""
        if not (found := _measured(rows)):
            return []
        time, memory = (
            {kernel: [(row["tokens"], row[key] / unit) for row in some] for kernel, some in found.items()}
            for key, unit in (("seconds", 1e-3), ("peak_bytes", 1e6))
        )
        over, under = (
            [Curve(kernel, points, number) for number, (kernel, points) in enumerate(some.items())]
            for some in (time, memory)
        )
        under += power_of("memory ∝ N²", memory.get("eager", ()), 2) + power_of(
            "memory ∝ N", memory.get("flash", ()), 1
        )
        title = "Attention by length: time of a layer, and memory beside its inputs"
        return [Drawing.of(lengths_figure, title, ("ms", over), ("MB", under))]


def _measured(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each kernel that were measured, by length."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if "absent" not in row:
            found.setdefault(row["kernel"], []).append(row)
    return found


def _timed(own: list[float], eager: list[float] | None) -> dict:
    """Seconds of a call over the rounds; `over_eager`: the median of how many times as fast it was in each."""
    over = statistics.median(a / b for a, b in zip(eager, own, strict=True)) if eager else None
    middle, low, high = statistics.median(own), min(own), max(own)
    return {"seconds": middle, "seconds_min": low, "seconds_max": high, "over_eager": over}


def _within(row: dict, eager: dict | None) -> bool | None:
    """Whether a result is as near to the exact one as rounding makes eager's: at most twice as far, and one unit (the
    rule of FlashAttention's own tests). None where eager was never computed."""
    return None if eager is None else row["units_to_exact"] <= 2 * eager["units_to_exact"] + 1


def _growth(rows: list[dict]) -> float:
    """The power of the length with which memory grows over the last three lengths."""
    shorter, longer = rows[-3:][0], rows[-1]
    return log(longer["peak_bytes"] / shorter["peak_bytes"]) / log(longer["tokens"] / shorter["tokens"])


def _equal(eager: list[dict], others: dict[str, list[dict]]) -> str:
    """What the comparison of the results says."""
    rows = [row for some in others.values() for row in some]
    worst = max(rows, key=lambda row: (row["within_rounding"] is False, row["units_to_exact"]))
    if worst["within_rounding"] is False:
        where = f"{worst['kernel']} at {worst['tokens']:,} tokens"
        return f"**More than rounding lies between them**: {where} is {worst['units_to_exact']:.3g} units off."
    own = max(row["units_to_exact"] for row in eager)
    return (
        f"All give the same result within rounding: they are at most {worst['units_to_exact']:.2g} units of rounding "
        f"from the exact one, eager {own:.2g}."
    )


def _not_here(rows: list[dict]) -> str:
    """Which kernels this device does not have, and why."""
    absent = [f"{row['kernel']} ({row['absent']})" for row in rows if row["tokens"] is None]
    return f" Not here: {', '.join(absent)}." if absent else ""


def _time(row: dict) -> str:
    if "absent" in row:
        return "not here" if row["tokens"] is None else row["absent"]
    return format_seconds(row["seconds"])


def _ends(row: dict) -> str:
    if "absent" in row:
        return MISSING
    low, middle, high = (row[f"seconds{end}"] for end in ("_min", "", "_max"))
    return f"{format_seconds(low)} to {format_seconds(high)}{shown_spread(low, middle, high)}"


def _shown(row: dict, key: str) -> str:
    return MISSING if row.get(key) is None else f"{row[key]:.3g}"
