"""The paper's figures of emergence over one model or several: how far outlier features spread, by size and perplexity.

Dettmers et al. 2022, arXiv 2208.07339, figures 3 and 4. Each model reads the first window of the reference text in
FP16; perplexity is of the same window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmq.errors import BadChoice, ModelUnavailable
from llmq.events import Event, Progress
from llmq.experiments.channels import BASELINE
from llmq.experiments.lab import Experiment, Lab, Outcome, Rows
from llmq.machine.door import Lease
from llmq.models.opening import open_model


@dataclass(frozen=True, kw_only=True)
class Emerging(Experiment):
    """One model: a single row."""

    kind = "sweep"

    def measure(self, lab: Lab) -> Rows:
        import torch

        from llmq.inspect.emergence import emergence
        from llmq.inspect.outliers import observe

        yield lab.progress(f"{self.model} reads the text, watched", 0.1)
        with lab.engine(BASELINE, loop="hf") as engine:
            report = observe(engine.model, torch.tensor([lab.texts[0]], device=self.device), stop=lab.lease.stop)
            yield lab.progress(f"{self.model}: perplexity", 0.6)
            truth = lab.read(engine)
            found, parameters = emergence(report), sum(p.numel() for p in engine.model.parameters())
        score = {"perplexity": lab.score(truth, truth)["perplexity"]}
        yield {"model": self.model, "parameters": parameters} | score | found.to_json()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every one of `models` in turn; one that is not at hand is noted in `missing`, and the others go on."""

    models: tuple[str, ...]
    device: str = "cpu"

    def __post_init__(self):
        if not self.models or len(set(self.models)) < len(self.models):
            raise BadChoice(f"models to sweep: {', '.join(self.models) or 'none'}; name each once")
        for name in self.models:
            open_model(name)

    def run(self, lease: Lease) -> Iterator[Event | Progress | Outcome]:
        """Yield events, progress, and an Outcome after every model."""
        merged = {"kind": "sweep", "device": self.device, "stopped": False}
        merged |= {"missing": {}, "conditions": {}, "results": []}
        for name in self.models:
            found = None
            try:
                for item in Emerging(model=name, device=self.device).run(lease):
                    if isinstance(item, Outcome):
                        found = item.result
                    else:
                        yield item
            except ModelUnavailable as error:
                merged["missing"][name] = str(error)
            lease.pool.drop_others(set())
            if found is not None:
                merged["conditions"][name] = found["conditions"]
                merged["results"] += found["results"]
            merged["stopped"] = lease.stop.is_set()
            yield Outcome(merged, done=name == self.models[-1] or lease.stop.is_set())
            lease.check()
