"""The paper's figures of emergence over one model or several: how far outlier features spread, by size and perplexity.

Dettmers et al. 2022, arXiv 2208.07339, figures 3 and 4. Each model reads the first window of the English text in
FP16; perplexity is of the same window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmq.errors import BadChoice, ModelUnavailable
from llmq.events import Event, Progress
from llmq.figures.blocks import Drawing
from llmq.figures.lines import Line, line_figure
from llmq.labs.rows import BASELINE, RowAnswer, RowLab, Rows, TableLab, Workbench, share_of, shown_perplexity
from llmq.machine.door import Lease


@dataclass(frozen=True, kw_only=True)
class Emerging(RowLab):
    """One model: a single row."""

    def measure(self, bench: Workbench) -> Rows:
        import torch

        from llmq.inspect.emergence import emergence
        from llmq.inspect.outliers import observe

        yield bench.progress(f"{self.model} reads the text, watched", 0.1)
        with bench.engine(BASELINE, loop="hf") as engine:
            report = observe(engine.model, torch.tensor([bench.texts[0]], device=self.device), stop=bench.lease.stop)
            yield bench.progress(f"{self.model}: perplexity", 0.6)
            truth = bench.read(engine)
            found, parameters = emergence(report), sum(p.numel() for p in engine.model.parameters())
        score = {"perplexity": bench.score(truth, truth)["perplexity"]}
        yield {"model": self.model, "parameters": parameters} | score | found.to_json()


@dataclass(frozen=True, kw_only=True)
class Sweep(TableLab):
    """Every one of `models` in turn; one that is not at hand is noted in `missing`, and the others go on."""

    kind, title = "sweep", "Outlier features by model size"
    models: tuple[str, ...] = ("demo",)
    columns = {
        "Model": "{model}",
        "Parameters": lambda row: f"{row['parameters'] / 1e6:,.0f} M",
        "Perplexity": shown_perplexity,
        "Outlier features": lambda row: (
            f"{len(row['outlier_features'])} of {row['dimensions_reaching_magnitude']} that reach 6"
        ),
        "Layers": share_of("layers_touched"),
        "Positions": share_of("positions_touched"),
        "Median magnitude": "{median_magnitude:,.1f}",
    }

    def __post_init__(self):
        super().__post_init__()
        if not self.models or len(set(self.models)) < len(self.models):
            raise BadChoice(f"models to sweep: {', '.join(self.models) or 'none'}; name each once")

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Yield events, progress, and an answer after every model. Raises BadChoice for an unknown name."""
        for name in self.models:
            lease.find(name)
        merged = {"kind": self.kind, "device": self.device, "stopped": False}
        merged |= {"missing": {}, "conditions": {}, "results": []}
        for name in self.models:
            found = None
            try:
                for item in Emerging(model=name, device=self.device).run(lease):
                    if isinstance(item, RowAnswer):
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
            yield RowAnswer(type(self), merged, done=name == self.models[-1] or lease.stop.is_set())
            lease.check()

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """Shares of layers and positions touched by outlier features, a point a model, by size and by perplexity."""
        found = []
        for by in ("parameters", "perplexity"):
            some = sorted(rows, key=lambda row: row[by])
            lines = [
                Line(f"% of {name} touched", [(row[by], 100 * row[f"{name}_touched"]) for row in some], number,
                     texts=[row["model"] for row in some])
                for number, name in enumerate(("layers", "positions"))
            ]  # fmt: skip
            scale = {"title": {"text": by}, "type": "log" if by == "parameters" else "linear"}
            percent = {"title": {"text": "%"}, "range": [-3, 103]}
            told = "%{text}<br>%{y:.3~r} %"
            found.append(Drawing.of(line_figure, f"Outlier features by {by}", lines, told, x=scale, y=percent))
        return found
