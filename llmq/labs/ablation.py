"""Which half of 8 bit hurts: weights alone (W8A32), activations alone (W32A8), both (W8A8), and LLM.int8() beside them.

The BERT-era table, on a LLaMA: with one scale a tensor, rounding the weights costs little and rounding the activations
much, because a few activations are large. A scale a row helps; keeping the large columns in 16 bit helps more.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmq.contestant import Contestant
from llmq.labs.rows import BASELINE, SCORES, RowLab, Rows, Workbench, share_of

ROWS = {
    "W32A32": "fp32",
    "W8A32": "absmax-w8a32",
    "W32A8": "absmax-w32a8",
    "W8A8": "absmax",
    "W8A8, a scale a row": "vectorwise",
    "LLM.int8()": "llm-int8",
}


@dataclass(frozen=True, kw_only=True)
class Ablation(RowLab):
    kind, command, panel = "ablation", ("experiment", "ablation"), True
    title = "Which half breaks naive 8 bit?"
    about = (
        "Naive 8 bit has one scale for a whole tensor. Here the weights alone are in 8 bit (W8A32), the activations "
        "alone (W32A8), or both (W8A8), and every one reads the same text."
    )
    columns = {"": "{name}", "Method": "{method}", **SCORES, "Same first choice": share_of("top1_agreement")}

    def measure(self, bench: Workbench) -> Rows:
        yield bench.progress("FP16 reads the text", 0.0)
        with bench.engine(BASELINE) as engine:
            truth = bench.read(engine)
        for number, (name, method) in enumerate(ROWS.items()):
            yield bench.progress(f"{name} reads the text", (number + 1) / (len(ROWS) + 1))
            with bench.engine(Contestant.parse(method)) as engine:
                row = {"name": name, "method": method, "engine": engine.name}
                yield row | bench.score(bench.read(engine), truth)

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        named = {row["name"]: row["perplexity"] for row in rows}
        if not {"W32A32", "W8A32", "W32A8"} <= named.keys():
            return ""
        weights, activations = (named[name] - named["W32A32"] for name in ("W8A32", "W32A8"))
        worse, halves = ("activations", "weights") if activations > weights else ("weights", "activations")
        return (
            f"With one scale a tensor, 8-bit weights alone raise perplexity by {weights:.3g}, 8-bit activations alone "
            f"by {activations:.3g}: here it is the {worse} that break naive 8 bit, not the {halves}."
        )
