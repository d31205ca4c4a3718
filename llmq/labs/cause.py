"""Why one token came out differently: how far each layer is off there, and which module alone repairs it.

The same two engines as a reading under teacher forcing, then `patching.explain_token`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.fields import Number, Switch
from llmq.figures.bars import layer_error_figure
from llmq.figures.blocks import Block, Drawing, Table, Verbatim
from llmq.figures.pages import text_markup
from llmq.formatting import quoted
from llmq.inspect.cause import Cause, LayerError
from llmq.labs.agreement import Read, Reading, load_pair
from llmq.labs.base import Lab
from llmq.machine.door import Lease
from llmq.methods import METHODS
from llmq.methods.base import DEFAULT_THRESHOLD
from llmq.stored import from_stored, to_stored

PATCHES = 15  # of the table
PATCH_HEADERS = ["Module in 16 bit", "Lead of the right choice (logits)", "Prediction then", "Repaired"]
PATCHES_TITLE = "Which single module repairs it, computed in 16 bit?"


@dataclass(frozen=True, kw_only=True)
class Explanation(Lab):
    """Which token of which text to explain. `token_ids`: the text; `position`: of the token that is predicted from
    those before it; `patch`: whether every module is tried in 16 bit."""

    token_ids: tuple[int, ...]
    position: int
    baseline: Contestant = Contestant.parse("fp16")
    contestant: Contestant = Contestant.parse("bnb-int8")
    patch: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.baseline.method.dense:
            dense = ", ".join(name for name, method in METHODS.items() if method.dense)
            raise BadChoice(f"{self.baseline.label} has no 16-bit modules to take from; choose one of {dense}")

    @classmethod
    def of(cls, read: Read, position: int, patch: bool) -> Explanation:
        """Of one token of a text that both have read."""
        asked = {name: getattr(read.reading, name) for name in ("model", "baseline", "contestant", "device")}
        return cls(token_ids=read.agreement.token_ids, position=position, patch=patch, **asked)

    @property
    def threshold(self) -> float:
        """What counts as an outlier: the method's own threshold, the usual one where it has none."""
        return DEFAULT_THRESHOLD if self.contestant.threshold is None else self.contestant.threshold

    def run(self, lease: Lease) -> Iterator[Event | Progress | Cause]:
        """Yield events, progress, and a Cause whenever more is known; the last is whole unless it says `stopped`."""
        from llmq.inspect.patching import explain_token

        model = yield from lease.open(self.model)
        models = [engine.model for engine in (yield from load_pair(self, model, lease))]
        ids, threshold = list(self.token_ids), self.threshold
        yield from explain_token(*models, ids, self.position, threshold=threshold, patch=self.patch, stop=lease.stop)


@dataclass(frozen=True, kw_only=True)
class ExplainToken(Reading):
    """Let both read the text, then explain one token. `token`: its position; None: the largest KL that diverges."""

    kind, command, title = "cause", ("explain-token",), "Chain of cause"
    about, button = "Why one token came out differently, and what repairs it.", "Explain"
    token: Annotated[int | None, Number(0, 1_000_000, whole=True, optional=True, help="its position in the text")] = (
        None
    )
    patch: Annotated[bool, Switch(help="show the errors only; try no module in 16 bit")] = True

    def run(self, lease: Lease) -> Iterator[Event | Progress | CauseAnswer]:
        """Yield events, progress and an answer whenever more is known."""
        read = None
        for item in super().run(lease):
            if isinstance(item, Read):
                read = item
            else:
                yield item
        tokens = read.agreement.diverging or sorted(read.agreement.tokens, key=lambda token: -token.kl)
        position = tokens[0].position if self.token is None else self.token
        for item in Explanation.of(read, position, self.patch).run(lease):
            yield CauseAnswer(item, read) if isinstance(item, Cause) else item

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> CauseAnswer:
        return CauseAnswer(from_stored(Cause, stored["cause"]), Reading.restore(stored))


@dataclass(frozen=True)
class CauseAnswer:
    """The chain of cause of one token of a text that both methods read."""

    cause: Cause
    read: Read
    kind = "cause"

    @property
    def title(self) -> str:
        return self.read.title.replace("Agreement", "Chain of cause", 1)

    def blocks(self) -> Iterator[Block]:
        """The finding, each layer's error, the best modules to put back, the text."""
        cause, read = self.cause, self.read
        yield Verbatim(cause_line(cause, read))
        yield Drawing.of(layer_error_figure, cause)
        yield Table(PATCH_HEADERS, patch_rows(cause, read), PATCHES_TITLE)
        layers = [
            [
                str(entry.layer),
                f"{entry.relative:.2%}",
                f"{entry.sqnr_db:.1f}",
                str(entry.outlier_count),
                ", ".join(f"{kind} {channel}: {value:,.4g}" for kind, channel, value in entry.outliers),
            ]
            for entry in cause.layers
        ]
        headers = ["Layer", "Off by", "SQNR (dB)", "Outliers", "The strongest: input, channel, |x|"]
        yield Table(headers, layers, "Each layer's output at the token")
        yield text_markup(read.value())

    def to_json(self) -> dict:
        """The keys of `explain-token --json`."""
        cause, read = self.cause, self.read

        def token(token_id: int) -> dict:
            return {"token_id": token_id, "text": read.names[token_id]}

        return {
            "kind": self.kind,
            "model": read.reading.model,
            "device": read.reading.device,
            "baseline": read.labels[0],
            "method": read.labels[1],
            "token_ids": list(read.agreement.token_ids),
            "position": cause.position,
            "text": read.texts[cause.position],
            "baseline_token": token(cause.baseline_token),
            "other_token": token(cause.other_token),
            "margin": cause.margin,
            "stopped": cause.stopped,
            "layers": [_layer_json(layer) for layer in cause.layers],
            "patches": [
                {"module": p.module, "margin": p.margin, "token": read.names[p.token_id], "repaired": p.repaired}
                for p in cause.patches
            ],
            "repairs": [patch.module for patch in cause.repairs],
        }

    def stored(self) -> dict:
        return self.read.stored() | self.to_json() | {"cause": to_stored(self.cause)}


def cause_line(cause: Cause, read: Read) -> str:
    """The finding in one or two sentences."""
    token, titles = quoted(read.texts[cause.position]), read.titles
    wanted, got = quoted(read.names[cause.baseline_token]), quoted(read.names[cause.other_token])
    if not cause.diverges:
        return f"For token {cause.position} ({token}) both predict {wanted}: there is nothing to repair."
    start = (
        f"For token {cause.position} ({token}) {titles[0]} predicts {wanted}. {titles[1]} predicts {got}, "
        f"{-cause.margin:.3g} logits ahead of {wanted}."
    )
    if not cause.patches:
        return start
    count = len(cause.patches)
    tried = f"{count} module{'' if count == 1 else 's'} tried{' so far' if cause.stopped else ''}"
    if not cause.repairs:
        return f"{start} No single module repairs it ({tried}): the error is spread over many."
    best = cause.repairs[0]
    others = len(cause.repairs) - 1
    more = f", and {others} other{'s' * (others > 1)} alone would do it too" if others else ""
    return f"{start} With only {best.module} in 16 bit it predicts {wanted} again{more} ({tried})."


def patch_rows(cause: Cause, read: Read) -> list[list[str]]:
    """The table of patches, best first."""
    return [
        [patch.module, f"{patch.margin:+.3f}", quoted(read.names[patch.token_id]), "yes" if patch.repaired else "no"]
        for patch in cause.patches[:PATCHES]
    ]


def _layer_json(layer: LayerError) -> dict:
    strongest = [{"input_of": kind, "channel": channel, "absmax": value} for kind, channel, value in layer.outliers]
    figures = {"layer": layer.layer, "relative_error": layer.relative, "sqnr_db": layer.sqnr_db}
    return figures | {"outlier_count": layer.outlier_count, "strongest": strongest}
