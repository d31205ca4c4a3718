"""Labs whose answer is a table: rows measured one after the other on a text, each shown as soon as it is there.

Perplexity is of windows of 512 tokens of a text that ships with the package, each one call, the first token of each not
scored.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from llmq.contestant import Contestant
from llmq.engine.base import Engine, Interrupted, generate
from llmq.engine.choice import choose_engines
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.environment import describe
from llmq.events import Event, Progress
from llmq.fields import Choice, Number
from llmq.figures.blocks import Block, Drawing, Table, Texts, Verbatim
from llmq.formatting import format_share, plain_json
from llmq.labs.base import Lab
from llmq.models.edits import Edit
from llmq.models.opening import Model
from llmq.models.reference_text import TEXTS, windows
from llmq.scores import perplexity, score_text

if TYPE_CHECKING:
    import torch

    from llmq.machine.door import Lease

BASELINE = Contestant.parse("fp16")
WRITTEN_TOKENS = 24
Rows = Generator[Event | Progress | dict, None, None]
Cell = str | Callable[[dict], str]


@dataclass(frozen=True, kw_only=True)
class TableLab(Lab):
    """A lab whose answer is rows. A subclass says how they are shown: `columns`, `finding`, `figures`.

    `columns`: what makes the cell under each header, a function of the row or a format such as '{kl_to_fp16:.3g}'.
    `explained`: how it works, below the figures.
    """

    columns: ClassVar[dict[str, Cell]] = {}
    explained: ClassVar[str] = ""

    @classmethod
    def headers(cls) -> list[str]:
        return list(cls.columns)

    @classmethod
    def row(cls, row: dict) -> list[str]:
        """The cells of one row, under `headers`."""
        return [cell.format_map(row) if isinstance(cell, str) else cell(row) for cell in cls.columns.values()]

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        """What the rows say in a sentence or two; '' while there are too few."""
        return ""

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """What the rows look like."""
        return []

    @classmethod
    def shown(cls, rows: list[dict]) -> list[dict]:
        """The rows of the table, in its order."""
        return rows

    @classmethod
    def texts(cls, rows: list[dict]) -> Texts | None:
        """What models wrote, side by side."""
        return None

    @classmethod
    def takeaway(cls, rows: list[dict]) -> str:
        """What people copy from the answer, verbatim; '' where there is nothing."""
        return ""

    @classmethod
    def beside(cls, kept: list[dict], rows: list[dict]) -> list[dict]:
        """The rows to show when `kept` ones of an earlier question are on the page."""
        return rows or kept

    def gathered(
        self, measured: Rows, conditions: dict, facts: Callable[[list[dict]], dict] = lambda rows: {}
    ) -> Iterator[Event | Progress | RowAnswer]:
        """Pass on what is measured, with an answer after every row; stopped early, what was measured stays. `facts`:
        what the rows so far come to."""
        asked = {"kind": self.kind, "model": self.model, "device": self.device}
        rows, stopped = [], False

        def answer(done: bool) -> RowAnswer:
            told = {"stopped": stopped or not done, "conditions": conditions, "results": list(rows)}
            return RowAnswer(type(self), asked | facts(rows) | told, done)

        try:
            for item in measured:
                rows += [item] if isinstance(item, dict) else []
                yield answer(done=False) if isinstance(item, dict) else item
        except Interrupted:
            stopped = True
        yield answer(done=True)

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> RowAnswer:
        """A number that is not finite is stored as null."""
        rows = [{k: math.inf if v is None else v for k, v in row.items()} for row in stored["results"]]
        return RowAnswer(cls, stored | {"results": rows})


@dataclass(frozen=True, kw_only=True)
class RowLab(TableLab):
    """A lab that measures rows on windows of a shipped text. `prompt`: what the models continue, '' for none.

    A subclass yields its rows from `measure`.
    """

    windows: Annotated[int, Number(1, 16, whole=True, help="windows of 512 tokens of the text")] = 1
    text: Annotated[str, Choice(tuple(TEXTS), tuple(TEXTS.values()), help="what is read", label="Text")] = "english"
    prompt: str = ""

    def measure(self, bench: Workbench) -> Rows:
        """Yield progress, and a row as soon as it is measured."""
        raise NotImplementedError

    def conditions(self) -> dict:
        """What of the settings belongs beside the figures."""
        return {}

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Yield events, progress, and an answer after every row; stopped early, what was measured stays."""
        model = yield from lease.open(self.model)
        bench = Workbench(self, model, lease)
        read = {"window": len(bench.texts[0]), "windows": len(bench.texts)}
        text = {"text": TEXTS[self.text], "tokens": sum(len(ids) - 1 for ids in bench.texts)}
        yield from self.gathered(self.measure(bench), read | self.conditions() | bench.environment, lambda rows: text)


@dataclass(frozen=True)
class RowAnswer:
    """The rows so far in the stable shape of a result: `kind`, `model`, `device`, `conditions`, `results`."""

    lab: type[TableLab]
    result: dict
    done: bool = True

    @property
    def kind(self) -> str:
        return self.lab.kind

    @property
    def title(self) -> str:
        return f"{self.kind.capitalize()}: {self.result.get('model') or ', '.join(r['model'] for r in self.rows)}"

    @property
    def rows(self) -> list[dict]:
        return self.result["results"]

    def blocks(self) -> Iterator[Block]:
        """The finding, what was measured and what was not, the figures, the table, the texts, what to take away."""
        yield self.lab.finding(self.rows)
        if "tokens" in self.result:
            yield f"{self.result['tokens']:,} tokens of {self.result['text']}, {self.result['device']}."
        for name, reason in self.result.get("missing", {}).items():
            yield f"{name}: not measured: {reason}"
        if self.rows:
            yield from self.lab.figures(self.rows)
        yield Table(self.lab.headers(), [self.lab.row(row) for row in self.lab.shown(self.rows)], "Measured")
        if texts := self.lab.texts(self.rows):
            yield texts
        if taken := self.lab.takeaway(self.rows):
            yield Verbatim(taken)
        if self.lab.explained:
            yield self.lab.explained

    def to_json(self) -> dict:
        return plain_json(self.result)

    stored = to_json


@dataclass
class Workbench:
    """The model, the text and the engines of one lab at work."""

    lab: RowLab
    model: Model
    lease: Lease

    def __post_init__(self):
        self.texts = windows(self.model, self.lab.windows, self.lab.text)
        self.environment = {"command": self.lab.typed()} | describe(self.lab.device, self.model.source)

    @property
    def channels(self) -> int:
        """Of the residual stream."""
        return int(self.model.config.hidden_size)

    def progress(self, message: str, fraction: float | None = None) -> Progress:
        """To be yielded before every measurement: raises Interrupted when stopped."""
        return self.lease.progress(message, fraction)

    @contextmanager
    def engine(
        self, contestant: Contestant, edit: Edit | None = None, loop: str = "", *, passing: bool = False
    ) -> Iterator[Engine]:
        """The engine of `contestant` in the best loop it has, or in `loop`. An edited one is dropped afterwards, and a
        `passing` one that was not there before; what is given of it keeps nothing alive: a caller's variable would,
        until the next one was there too."""
        device = self.lab.device
        loop = loop or choose_engines("auto", [contestant.method], self.model.config.to_dict(), device)[0]
        key = Key.of(self.model.edited(edit) if edit else self.model, contestant.method, device, loop)
        passing = edit is not None or (passing and key not in self.lease.pool)
        engine = self.lease.get(key, contestant.method)
        try:
            yield weakref.proxy(engine) if passing else engine
        finally:
            if passing:
                del engine
                self.lease.pool.drop(key)

    def read(self, engine: Engine) -> list[torch.Tensor]:
        """For each window (tokens, vocabulary) float32 next-token logits, on the host."""
        return [engine.logits(ids, self.lease.stop.is_set).float().cpu() for ids in self.texts]

    def score(self, own: list[torch.Tensor], baseline: list[torch.Tensor]) -> dict:
        """Score the logits `own` of every window against `baseline`; means over all tokens. Where an edited model's
        output is not a number, its perplexity and KL are infinite and it agrees with nothing."""
        scores = [
            score_text(*logits, ids, allow_overflow=True)
            for *logits, ids in zip(own, baseline, self.texts, strict=True)
        ]
        loss, kl, _, top1 = (sum(column) / len(scores) for column in zip(*map(astuple, scores), strict=True))
        return {"perplexity": perplexity(loss), "kl_to_fp16": kl, "top1_agreement": top1}

    def write(self, engine: Engine) -> str:
        """What `engine` writes greedily after the prompt; '' where there is no prompt."""
        if not self.lab.prompt.strip():
            return ""
        ids = self.model.encode(self.lab.prompt)
        settings = SamplingSettings(max_new_tokens=min(WRITTEN_TOKENS, engine.context - len(ids)))
        tokens = generate(engine, ids, settings, self.lease.stop.is_set)
        written = [token.token_id for token in tokens if token.end != "eos"]
        return self.model.tokenizer.decode(written, skip_special_tokens=True)


def shown_perplexity(row: dict) -> str:
    """The perplexity of a row, in digits that can be read."""
    value = row["perplexity"]
    return "beyond measure" if not math.isfinite(value) else f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def share_of(name: str) -> Cell:
    """The cell of a share, in per cent."""
    return lambda row: format_share(row[name])


SCORES: dict[str, Cell] = {"Perplexity": shown_perplexity, "KL to FP16": "{kl_to_fp16:.3g}"}
