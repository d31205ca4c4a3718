"""Silence the strongest channels of the residual stream, and as many random ones, and see what is left of the model.

Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 4.2, zeroes outlier features and as many random ones.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Annotated

from llmq.errors import BadChoice
from llmq.fields import Number, Numbers, Text
from llmq.figures.blocks import Drawing
from llmq.figures.lines import Line, line_figure
from llmq.formatting import format_number
from llmq.labs.rows import BASELINE, SCORES, RowLab, Rows, Workbench
from llmq.models.edits import Silence

RANKING_TOKENS = 128
COUNT = Number(1, 64, whole=True, shown=16, step=1)


@dataclass(frozen=True, kw_only=True)
class Silencing(RowLab):
    """Zero the k strongest channels for each of `counts`, and as many random ones, `draws` times."""

    kind, command, panel = "silencing", ("experiment", "silencing"), True
    title, button = "Switch off the strongest channels", "Switch off"
    about = (
        "The k strongest channels are set to 0 in every layer that reads them behind a norm; then as many random ones. "
        "See what becomes of perplexity, and how the prompt goes on."
    )
    counts: Annotated[
        tuple[int, ...],
        Numbers(COUNT, help="how many channels", label="How many channels (k)", named="channels to silence", start=1),
    ] = (1, 2, 4, 8)
    draws: Annotated[int, Number(1, 1000, whole=True, help="random sets of each size")] = 3
    seed: int = 0
    prompt: Annotated[str, Text(help="how the model goes on after it", flag="--prompt")] = ""
    columns = {
        "Silenced": lambda row: "none" if row["silenced"] == "none" else f"{row['count']} {row['silenced']}",
        "Channels": lambda row: ", ".join(map(str, row["channels"])),
        **SCORES,
        "Text": "{text}",
    }

    def conditions(self) -> dict:
        return {"method": BASELINE.label, "draws": self.draws, "seed": self.seed}

    def measure(self, bench: Workbench) -> Rows:
        if max(self.counts) > bench.channels:
            raise BadChoice(
                f"channels to silence is {max(self.counts)}; this model has {bench.channels}, choose at most as many"
            )
        yield bench.progress("Finding the strongest channels", 0.0)
        ranking, peaks = strongest_channels(bench)
        with bench.engine(BASELINE) as engine:
            yield bench.progress("FP16 reads the text with every channel", 0.05)
            truth = bench.read(engine)
            row = {"silenced": "none", "count": 0, "channels": []}
            yield row | bench.score(truth, truth) | {"text": bench.write(engine)}
        drawn, choices = random.Random(self.seed), []
        for count in self.counts:
            choices.append(("strongest", ranking[:count]))
            choices += [("random", drawn.sample(range(bench.channels), count)) for _ in range(self.draws)]
        for done, (name, channels) in enumerate(choices):
            yield bench.progress(f"{len(channels)} {name} switched off", 0.1 + 0.9 * done / len(choices))
            with bench.engine(BASELINE, Silence(tuple(channels))) as engine:
                row = {"silenced": name, "count": len(channels), "channels": list(channels)}
                yield row | bench.score(bench.read(engine), truth) | {"text": bench.write(engine)}

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        found = harm(rows)
        if not found:
            return ""
        entry = found[0]
        whole, off = (next(row for row in rows if row["silenced"] == name) for name in ("none", "strongest"))
        base, count = whole["perplexity"], entry["count"]
        which = f"channel {off['channels'][0]}" if count == 1 else f"the {count} strongest channels"
        other = "a random channel" if count == 1 else f"{count} random ones"
        before, after, usual = map(_shown, (base, base + entry["strongest"], base + entry["random"]))
        told = f"Without {which} perplexity goes from {before} to {after}"
        return f"{told}; without {other} to {usual} (median of the draws)."

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """Perplexity against the number of silenced channels: the strongest, and random ones."""
        lines = [
            Line(f"{name} channels", [(row["count"], row["perplexity"]) for row in rows if row["silenced"] == name],
                 number, connected=name == "strongest")
            for number, name in ((1, "strongest"), (0, "random"))
        ]  # fmt: skip
        level = next((row["perplexity"] for row in rows if row["silenced"] == "none"), None)
        counts = {
            "title": {"text": "channels switched off"},
            "type": "log",
            "tickvals": sorted({r["count"] for r in rows}),
        }
        return [
            Drawing.of(
                line_figure,
                "Perplexity with channels switched off (dotted: none)", lines, "%{x} off: perplexity %{y:,.5~r}",
                x=counts, y={"title": {"text": "perplexity"}, "type": "log"}, level=level,
            )
        ]  # fmt: skip


def _shown(value: float) -> str:
    """A perplexity, whole where it is large."""
    return format_number(value) if math.isfinite(value) else "beyond measure"


def harm(results: list[dict]) -> list[dict]:
    """For each count: `strongest` and the median of `random`, as rises of perplexity, and their `ratio`."""
    from statistics import median

    base = next((row["perplexity"] for row in results if row["silenced"] == "none"), None)
    found = []
    for count in sorted({row["count"] for row in results} - {0}):
        rises = {
            name: [row["perplexity"] - base for row in results if (row["silenced"], row["count"]) == (name, count)]
            for name in ("strongest", "random")
        }
        if all(rises.values()):
            strongest, other = rises["strongest"][0], median(rises["random"])
            ratio = strongest / other if other > 0 else math.inf  # random ones did no harm at all
            found.append({"count": count, "strongest": strongest, "random": other, "ratio": ratio})
    return found


def strongest_channels(bench: Workbench) -> tuple[list[int], list[float]]:
    """Channels of the residual stream by the largest |x| that a layer reads behind a norm, strongest first, and that
    magnitude; from the first 128 tokens of the text."""
    import numpy as np
    import torch

    from llmq.inspect.emergence import stream_inputs
    from llmq.inspect.outliers import observe

    ids = torch.tensor([bench.texts[0][:RANKING_TOKENS]], device=bench.lab.device)
    with bench.engine(BASELINE, loop="hf") as engine:
        report = observe(engine.model, ids, stop=bench.lease.stop)
    bench.progress("")  # leaves where the reading was stopped
    peaks = np.max([m.prefill.absmax for modules in stream_inputs(report).values() for m in modules], axis=0)
    order = np.argsort(-peaks, kind="stable")
    return order.tolist(), peaks[order].tolist()
