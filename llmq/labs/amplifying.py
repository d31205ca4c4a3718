"""Make channels of the residual stream louder without changing the function, and ask every method again.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438) backwards, see `models.edits.Amplify`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Annotated

from llmq.contestant import Contestant, Contestants
from llmq.fields import Number, Numbers
from llmq.figures.blocks import Drawing
from llmq.figures.lines import Line, line_figure
from llmq.formatting import format_number
from llmq.labs.rows import BASELINE, SCORES, RowLab, Rows, Workbench
from llmq.models.edits import LARGEST_FACTOR, Amplify, require_channels

FACTOR = Number(1, LARGEST_FACTOR, shown=LARGEST_FACTOR, step=1)
CHANNEL = Number(0, 1_000_000, whole=True)
METHODS_ASKED = (BASELINE, *Contestant.parse_all("llm-int8,vectorwise,absmax"))


@dataclass(frozen=True, kw_only=True)
class Amplifying(RowLab):
    """Make `channels` louder by each of `factors`, and ask every method about the same text. None: channels spread
    evenly, `spread` of them."""

    kind, command, panel = "amplifying", ("experiment", "amplifying"), True
    title, button = "Create outliers artificially", "Measure"
    about = (
        "Some channels are multiplied by s, and the weights that read them are divided by s. Computed exactly, nothing "
        "changes; but now there are outliers. Which method survives? (SmoothQuant does the opposite: it "
        "makes large activations smaller, to round them better.)"
    )
    factors: Annotated[
        tuple[float, ...],
        Numbers(FACTOR, help="s, from 1 to 64", label="How many times larger (s)", named="factor", start=16, live=True),
    ] = (1, 4, 16, 64)
    channels: Annotated[
        tuple[int, ...] | None,
        Numbers(CHANNEL, help="such as 7,19", label="Channels", named="channel", empty="three, spread evenly"),
    ] = None
    spread: Annotated[int, Number(1, 64, whole=True, help="how many channels, where none is named")] = 3
    contestants: Annotated[
        tuple[Contestant, ...], Contestants(label="Methods", help="names with commas between them")
    ] = METHODS_ASKED
    columns = {
        "s": "{factor:g}",
        "Method": "{method}",
        **SCORES,
        "Largest change of a logit": "{largest_logit_change:.3g}",
    }

    def conditions(self) -> dict:
        return {"largest_factor": LARGEST_FACTOR}

    def measure(self, bench: Workbench) -> Rows:
        channels = self.channels_of(bench.channels)
        require_channels(channels, bench.channels)
        with bench.engine(BASELINE) as engine:
            yield bench.progress("FP16 reads the text", 0.0)
            truth = bench.read(engine)
        pairs = list(product(self.factors, self.contestants))
        for number, (factor, contestant) in enumerate(pairs):
            yield bench.progress(f"{contestant.title} at s = {factor:g}", 0.05 + 0.95 * number / len(pairs))
            edit = Amplify(channels, factor) if factor != 1 else None
            with bench.engine(contestant, edit) as engine:
                found = bench.read(engine)
            change = max((a - b).abs().max().item() for a, b in zip(found, truth, strict=True))
            row = {"factor": factor, "method": contestant.label, "channels": list(channels)}
            yield row | bench.score(found, truth) | {"largest_logit_change": change}

    def channels_of(self, width: int) -> tuple[int, ...]:
        """The channels meant, in a stream of `width`."""
        if self.channels is not None:
            return self.channels
        spread = min(self.spread, width)
        return tuple(width * (2 * i + 1) // (2 * spread) for i in range(spread))

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        factors = sorted({row["factor"] for row in rows})
        if len(factors) < 2:
            return ""
        low, high = ({r["method"]: r for r in rows if r["factor"] == f} for f in (factors[0], factors[-1]))
        changes = [
            f"{method} {_risen(high[method]['perplexity'] / low[method]['perplexity'])}"
            for method in high
            if method in low and high[method]["perplexity"] < math.inf
        ]
        told = f"Perplexity from s = {factors[0]:g} to s = {factors[-1]:g}"
        return f"{told}: {', '.join(changes)}." if changes else ""

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """Perplexity of each method against the factor."""
        lines = []
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            points = sorted((row["factor"], row["perplexity"]) for row in rows if row["method"] == method)
            lines.append(Line(method, points, number))
        return [
            Drawing.of(
                line_figure,
                "Perplexity when some channels are s times as large", lines,
                "s = %{x:g}: perplexity %{y:,.5~r}",
                x={"title": {"text": "s"}, "type": "log", "tickvals": [1, 2, 4, 8, 16, 32, 64], "range": [-0.06, 1.87]},
                y={"title": {"text": "perplexity"}, "type": "log"},
            )
        ]  # fmt: skip

    @classmethod
    def beside(cls, kept: list[dict], rows: list[dict]) -> list[dict]:
        """Amplifications of the same channels of the same model stay beside the new ones, which replace their
        equals."""
        if not kept or not rows:
            return rows or kept
        new = {(row["factor"], row["method"]) for row in rows}
        same = [row for row in kept if all(row[key] == rows[0][key] for key in ("model", "channels"))]
        old = [row for row in same if (row["factor"], row["method"]) not in new]
        return sorted([*old, *rows], key=lambda row: row["factor"])


def _risen(ratio: float) -> str:
    """What a perplexity is `ratio` times of: 'unchanged', '+2.0 %', '92 times'."""
    if abs(ratio - 1) < 0.0005:
        return "unchanged"
    return f"{100 * (ratio - 1):+.2g} %" if ratio < 2 else f"{format_number(ratio)} times"
