"""Which half of 8 bit hurts: weights alone (W8A32), activations alone (W32A8), both (W8A8), and LLM.int8() beside them.

The BERT-era table, on a LLaMA: with one scale a tensor, rounding the weights costs little and rounding the activations
much, because a few activations are large. A scale a row helps; keeping the large columns in 16 bit helps more.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmq.contestant import Contestant
from llmq.experiments.channels import BASELINE
from llmq.experiments.lab import Experiment, Lab, Rows

ROWS = (
    ("W32A32", Contestant.parse("fp32")),
    ("W8A32", Contestant.parse("absmax-w8a32")),
    ("W32A8", Contestant.parse("absmax-w32a8")),
    ("W8A8", Contestant.parse("absmax")),
    ("W8A8, a scale a row", Contestant.parse("vectorwise")),
    ("LLM.int8()", Contestant.parse("llm-int8")),
)


@dataclass(frozen=True, kw_only=True)
class Ablation(Experiment):
    kind = "ablation"

    def measure(self, lab: Lab) -> Rows:
        yield lab.progress("FP16 reads the text", 0.0)
        with lab.engine(BASELINE) as engine:
            truth = lab.read(engine)
        for number, (name, contestant) in enumerate(ROWS):
            yield lab.progress(f"{name} reads the text", (number + 1) / (len(ROWS) + 1))
            with lab.engine(contestant) as engine:
                row = {"name": name, "method": contestant.label, "engine": engine.name}
                yield row | lab.score(lab.read(engine), truth)
