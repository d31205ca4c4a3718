"""One prompt through one method with its linear inputs watched: events while it prepares, then the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from llmq.contestant import Contestant, OneContestant
from llmq.engine.loading import Key
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.fields import Number, Text
from llmq.figures.bars import columns_figure
from llmq.figures.blocks import Block, Drawing, Table
from llmq.figures.lines import features_figure, peaks_figure
from llmq.formatting import format_share, quoted
from llmq.labs.base import Lab
from llmq.labs.emergence import Sweep
from llmq.machine.door import Lease
from llmq.methods.base import DEFAULT_THRESHOLD
from llmq.stored import from_stored, to_stored

if TYPE_CHECKING:  # numpy comes with them: half the time that `llmq --help` takes
    from llmq.inspect.emergence import Emergence
    from llmq.inspect.report import OutlierReport

MAX_NEW_TOKENS = 64
MASSIVE = 10
MASSIVE_HEADERS = ["Where", "Layer", "Token", "Text", "Channel", "|x|", "Times typical"]
SHARE_HEADERS = ["Input of", "Phase", "Layers with outliers", "Channels over", "Values over", "Largest |x|"]
CHANNEL_HEADERS = ["Input of", "Channel", "Largest |x|", "Layer", "Phase", "Over the threshold in layers"]
LOWEST_THRESHOLD = 2.0  # how far down a threshold can be moved afterwards; lower ones keep more numbers


@dataclass(frozen=True, kw_only=True)
class Inspection(Lab):
    """What to watch. `new_tokens` are generated greedily after the prompt; 0 watches the prompt alone. `sweep`: names
    of models, whose figures by the paper's criterion are wanted instead."""

    kind, command, title = "outliers", ("outliers",), "Activation outliers"
    about, button = "Which columns of each layer's input reach the threshold, layer by layer.", "Watch activations"
    prompt: Annotated[str, Text(positional=True, unless="sweep", help="what the model reads")] = ""
    contestant: Annotated[Contestant, OneContestant(flag="--method")] = Contestant.parse("bnb-int8")
    new_tokens: Annotated[int, Number(0, MAX_NEW_TOKENS, whole=True, help="tokens to generate and watch")] = 8
    sweep: Annotated[str, Text(help="the paper's figures of several models A,B,…, instead of a prompt")] = ""

    @property
    def threshold(self) -> float:
        """The method's own; the usual one for a method that has none."""
        return DEFAULT_THRESHOLD if self.contestant.threshold is None else self.contestant.threshold

    def __post_init__(self):
        super().__post_init__()
        if self.threshold <= 0:
            raise BadChoice(f"threshold is {self.threshold:g}: with the decomposition off there are no outlier columns")

    def run(self, lease: Lease) -> Iterator[Event | Progress | ReportAnswer]:
        """Yield events, an answer once the prompt is read, and at last the whole one (none when stopped before the
        model ran)."""
        if self.sweep:
            yield from Sweep(models=tuple(name.strip() for name in self.sweep.split(",")), device=self.device).run(
                lease
            )
            return
        import torch

        from llmq.inspect.outliers import observe_in_parts

        model = yield from lease.open(self.model)
        ids = model.encode(self.prompt, new_tokens=self.new_tokens)
        engine = yield from lease.load(Key.of(model, self.contestant.method, self.device), self.contestant)
        for report in observe_in_parts(
            engine.model,
            torch.tensor([ids], device=self.device),
            new_tokens=self.new_tokens,
            stop=lease.stop,
            threshold=self.threshold,
            lowest_threshold=min(LOWEST_THRESHOLD, self.threshold),
            token_text=lambda token: model.tokenizer.decode([token]),
            name=self.model,
            method=self.contestant.label,
            outlier_columns=engine.method.outlier_columns,
        ):
            yield ReportAnswer(report, self.threshold, self.prompt)

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> ReportAnswer:
        from llmq.inspect.report import OutlierReport

        report = from_stored(OutlierReport, stored["report"])
        return ReportAnswer(report, float(stored["threshold"]), str(stored.get("prompt", "")))


@dataclass(frozen=True)
class ReportAnswer:
    """A watched run, judged at `threshold`; `prompt` as it was typed, '' where that is not known."""

    report: OutlierReport
    threshold: float
    prompt: str = ""
    kind = "outliers"

    @property
    def title(self) -> str:
        return f"Activation outliers: {self.report.model}, {self.report.method}"

    def blocks(self) -> Iterator[Block]:
        """What was sent to 16 bit, the paper's figures, every heatmap."""
        from llmq.inspect.emergence import emergence
        from llmq.inspect.views import shares_table, strongest_table

        report, threshold, found = self.report, self.threshold, emergence(self.report)
        yield account_line(report, threshold)
        yield emergence_line(found)
        yield (
            f"Largest |x| at the input of every linear layer over {report.prompt_tokens} prompt tokens (prefill) and "
            f"{report.generated_tokens} generated tokens (decode). Threshold {threshold:g}."
        )
        yield Table(SHARE_HEADERS, shares_table(report, threshold), "What reaches the threshold")
        yield Table(CHANNEL_HEADERS, strongest_table(report, threshold), "Strongest channels")
        yield Table(MASSIVE_HEADERS, massive_rows(report), "Massive activations")
        yield from self._drawings(found)

    def _drawings(self, found: Emergence) -> Iterator[Block]:
        from llmq.figures.heatmaps import map_figure

        report, threshold = self.report, self.threshold
        yield Drawing.of(features_figure, found)
        yield Drawing.of(peaks_figure, report)
        for kind in report.kinds:
            if kind != "lm_head":
                yield Drawing.of(columns_figure, report, kind, 0, threshold)
        for kind in report.kinds:
            for phase in ("prefill", "decode") if report.generated_tokens else ("prefill",):
                yield Drawing.of(map_figure, report, kind, phase, threshold)

    def to_json(self) -> dict:
        return self.report.to_json(self.threshold)

    def stored(self) -> dict:
        return self.to_json() | {"prompt": self.prompt, "report": to_stored(self.report)}


@dataclass(frozen=True, kw_only=True)
class Preparation(Lab):
    """Load what an inspection would, so that its first picture comes soon after the click; not while others compute:
    then there is no hurry."""

    contestant: Contestant = Contestant.parse("bnb-int8")
    patient = False

    def run(self, lease: Lease) -> Iterator[Event]:
        model = yield from lease.open(self.model)
        yield from lease.load(Key.of(model, self.contestant.method, self.device), self.contestant)


def account_line(report: OutlierReport, threshold: float) -> str:
    """Whether hooks and layers agree, in a sentence."""
    from llmq.inspect.report import agreement_with_kernel

    found = agreement_with_kernel(report)
    if found is None:
        return "This method keeps no columns in 16 bit: there are rings, and no dots."
    same, calls = found
    layers = sum(module.outlier_columns is not None for module in report.modules)
    agree = f"All {calls:,} layer calls agree" if same == calls else f"{same:,} of {calls:,} layer calls agree"
    line = (
        f"{agree} ({layers} linear layers, the prompt and {report.generated_tokens} tokens): at threshold "
        f"{report.threshold:g} each kept in 16 bit exactly the columns that we saw reach it."
    )
    moved = threshold != report.threshold
    return line + (f" The rings are for {threshold:g} now; watch again to ask the layers." if moved else "")


def emergence_line(found: Emergence) -> str:
    """The paper's figures in a sentence."""
    features = found.outlier_features
    reach = f"{len(found.features)} channels reach 6 at any of the {found.positions} tokens"
    if not features:
        return f"There is no outlier feature in this prompt; {reach}."
    names = ", ".join(str(feature.channel) for feature in features[:6]) + (", …" if len(features) > 6 else "")
    return (
        f"**{len(features)}** outlier feature{'s' * (len(features) != 1)} (channel {names}), in "
        f"**{format_share(found.layers_touched)}** of {found.layers} layers, at up to "
        f"**{format_share(found.positions_touched)}** of tokens; {reach}."
    )


def massive_rows(report: OutlierReport) -> list[list[str]]:
    """The table of massive activations."""
    from llmq.inspect.emergence import massive_activations

    return [
        [
            found.where if found.where == "residual stream" else f"input of {found.where}",
            str(found.layer),
            str(found.token),
            quoted(found.text),
            str(found.channel),
            f"{found.absmax:,.1f}",
            f"{found.times_typical:,.0f} ×",
        ]
        for found in massive_activations(report, MASSIVE)
    ]
