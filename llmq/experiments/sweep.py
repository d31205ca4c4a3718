"""The paper's figures of emergence over one model or several: how far outlier features spread, by size and perplexity.

Dettmers et al. 2022, arXiv 2208.07339, figures 3 and 4. Each model reads the first window of the reference text in
FP16; perplexity is of the same window.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from llmq.engine.residents import Residents
from llmq.errors import BadChoice, ModelUnavailable
from llmq.events import Event
from llmq.experiments.channels import BASELINE
from llmq.experiments.lab import Experiment, Lab, Outcome, Rows, run_experiment
from llmq.models.loading import resolve
from llmq.preparation import Working


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
            report = observe(engine.model, torch.tensor([lab.texts[0]], device=self.device), stop=lab.stop)
            yield lab.progress(f"{self.model}: perplexity", 0.6)
            truth = lab.read(engine)
            found, parameters = emergence(report), sum(p.numel() for p in engine.model.parameters())
        score = {"perplexity": lab.score(truth, truth)["perplexity"]}
        yield {"model": self.model, "parameters": parameters} | score | found.to_json()


def sweep(
    models: tuple[str, ...], residents: Residents, *, device: str = "cpu", stop: threading.Event | None = None
) -> Iterator[Event | Working | Outcome]:
    """Every model in turn; one that is not at hand is noted in `missing`, and the others go on. Raises BadChoice for
    names that mean nothing or repeat."""
    stop = stop or threading.Event()
    if not models or len(set(models)) < len(models):
        raise BadChoice(f"models to sweep: {', '.join(models) or 'none'}; name each once")
    for name in models:
        resolve(name)
    merged: dict = {"kind": "sweep", "device": device, "stopped": False, "missing": {}, "conditions": {}, "results": []}
    for name in models:
        found = None
        try:
            for item in run_experiment(Emerging(model=name, device=device), residents, stop=stop):
                if isinstance(item, Outcome):
                    found = item.result
                else:
                    yield item
        except ModelUnavailable as error:
            merged["missing"][name] = str(error)
        residents.drop_others(set())
        if found is not None:
            merged["conditions"][name] = found["conditions"]
            merged["results"] += found["results"]
        merged["stopped"] = stop.is_set()
        yield Outcome(merged, done=name == models[-1] or stop.is_set())
        if stop.is_set():
            return
