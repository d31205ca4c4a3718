"""Is a language model still causal in 8 bit? Change the last token, or the neighbour in the batch, and look back.

In FP16 a token's logits depend on the tokens before it. LLM.int8() pools its outlier columns over all rows of a call,
so a later token, or another text of the batch, decides which numbers of an earlier one are rounded. Both calls have the
same shape, so that nothing but the numbers differs: a text is alone in a batch where its neighbour is a copy of itself,
which adds no column. Everything runs through transformers, whose layers tell their columns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from llmq.contestant import Contestant, Contestants
from llmq.engine.loading import Key
from llmq.fields import Number
from llmq.figures.blocks import Drawing
from llmq.figures.causal import causal_figure
from llmq.formatting import format_share
from llmq.labs.rows import RowLab, Rows, Workbench

if TYPE_CHECKING:
    from llmq.engine.hf import HFEngine
    from llmq.inspect.causal import Call

LENGTH = 64  # tokens of a prompt, of which a window holds several
NAMED = 3  # columns
FIELD = "fp16,bnb-int8,llm-int8,llm-int8@outliers=row"


@dataclass(frozen=True)
class Change:
    """Texts of a call `before` and `after`; the last one's tokens from `start` on change, and `asked` of the first
    text's choices come before anything that may change them."""

    before: list[list[int]]
    after: list[list[int]]
    start: int
    asked: int


def another_last_token(ids: list[int], other: list[int]) -> Change:
    """The last token of `other` instead of the own; where they are equal, the one before."""
    new = next((token for token in reversed(other) if token != ids[-1]), ids[0])
    return Change([ids], [[*ids[:-1], new]], -1, len(ids) - 1)


def a_neighbour(ids: list[int], other: list[int]) -> Change:
    """`other` beside the text."""
    return Change([ids, ids], [ids, other], 0, len(ids))


CHANGES: dict[str, Callable[[list[int], list[int]], Change]] = {
    "another last token": another_last_token,
    "a neighbour in the batch": a_neighbour,
}


@dataclass(frozen=True, kw_only=True)
class Causal(RowLab):
    """Every prompt of the text with `changes` other last tokens, then with as many neighbours."""

    kind, command, panel = "causal", ("experiment", "causal"), True
    title = "Does a later token change earlier ones?"
    about = (
        "What a model predicts must not depend on what comes later. But LLM.int8() decides for **all tokens of a call "
        "together** which columns stay in 16 bit. So another last token, or another text in the batch, changes "
        "earlier logits, and some first choices flip. With `outliers=row` each token decides for itself."
    )
    contestants: Annotated[tuple[Contestant, ...], Contestants(label="Methods")] = Contestant.parse_all(FIELD)
    changes: Annotated[
        int,
        Number(1, 7, whole=True, help="other last tokens and neighbours of each prompt", label="Changes", shown=7,
               step=1),
    ] = 3  # fmt: skip
    columns = {
        "Method": "{method}",
        "Changed": "{change}",
        "Choices flipped": lambda row: f"{row['flipped']:,} of {row['asked']:,} ({format_share(_share(row))})",
        "Largest change of a logit": "{largest_logit_change:.3g}",
        "Columns that became outliers": "{joined:.3g}",
        "The strongest: layer, input, column, size": lambda row: "; ".join(map(_named, row["strongest"])),
    }

    def conditions(self) -> dict:
        return {"prompt_tokens": LENGTH, "changes": self.changes, "engine": "hf"}

    def measure(self, bench: Workbench) -> Rows:
        prompts = prompts_of(bench.texts)
        for number, contestant in enumerate(self.contestants):
            yield from self._rows(bench, contestant, prompts, number / len(self.contestants))

    def _rows(self, bench: Workbench, contestant: Contestant, prompts: list[list[int]], done: float) -> Rows:
        yield bench.progress(f"{contestant.title} starts", done)
        engine = yield from bench.lease.load(Key.of(bench.model, contestant.method, self.device), contestant)
        steps = len(self.contestants) * len(CHANGES) * len(prompts)
        for place, (name, make) in enumerate(CHANGES.items()):
            tally = Tally()
            for number, ids in enumerate(prompts):
                share = done + (place * len(prompts) + number) / steps
                yield bench.progress(f"{contestant.title}: {name}, prompt {number + 1} of {len(prompts)}", share)
                others = [prompts[(number + step) % len(prompts)] for step in range(1, len(prompts))]
                tally.ask(engine, [make(ids, other) for other in others[: self.changes]])
            yield {"method": contestant.label, "change": name, **tally.row()}

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        said = []
        for change in dict.fromkeys(row["change"] for row in rows):
            there = [row for row in rows if row["change"] == change]
            flips = ", ".join(f"{row['flipped']:,} with {row['method']}" for row in there)
            said.append(f"{change}: of {there[0]['asked']:,} first choices flip {flips}")
        return f"Prompts of {LENGTH} tokens, {'; '.join(said)}." if said else ""

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """The share of choices that flip, and where columns became outliers."""
        return [Drawing.of(causal_figure, [row | {"share": _share(row)} for row in rows])]


@dataclass
class Tally:
    """What changes did, so far."""

    asked: int = 0
    flipped: int = 0
    largest: float = 0.0
    changes: int = 0
    peaks: dict[tuple, float] = field(default_factory=lambda: defaultdict(float))
    times: Counter = field(default_factory=Counter)

    def ask(self, engine: HFEngine, changes: list[Change]) -> None:
        """Make the changes of one prompt, which all have the same call before."""
        from llmq.inspect.causal import read_call

        before = read_call(engine, changes[0].before, changes[0].start)
        for change in changes:
            self._note(before, read_call(engine, change.after, change.start), change.asked)

    def _note(self, before: Call, after: Call, asked: int) -> None:
        from llmq.inspect.causal import joined

        own, other = before.logits[:asked], after.logits[:asked]
        self.asked, self.changes = self.asked + asked, self.changes + 1
        self.flipped += int((own.argmax(-1) != other.argmax(-1)).sum())
        self.largest = max(self.largest, float((own - other).abs().max()))
        for *column, peak in joined(before, after):
            self.peaks[tuple(column)] = max(self.peaks[tuple(column)], peak)
            self.times[tuple(column)] += 1

    def row(self) -> dict:
        """`joined`: columns that became outliers, over all inputs, a change; `strongest`: by |x| in the new tokens."""
        strongest = sorted(self.peaks, key=lambda column: -self.peaks[column])[:NAMED]
        return {
            "asked": self.asked,
            "flipped": self.flipped,
            "largest_logit_change": self.largest,
            "joined": self.times.total() / max(1, self.changes),
            "joined_by_layer": list(self._by_layer()),
            "strongest": [
                {"layer": column[0], "input": column[1], "column": column[2], "absmax": self.peaks[column],
                 "times": self.times[column]}
                for column in strongest
            ],
        }  # fmt: skip

    def _by_layer(self) -> Iterator[float]:
        """Columns a change in each decoder layer up to the last that had one."""
        inside = Counter()
        for (layer, *_), times in self.times.items():
            inside[layer] += times if layer is not None else 0
        for layer in range(1 + max((layer for layer in inside if layer is not None), default=-1)):
            yield inside[layer] / self.changes


def prompts_of(texts: list[list[int]]) -> list[list[int]]:
    """Windows of a text cut into prompts of one length, two at least."""
    length = min(LENGTH, len(texts[0]) // 2)
    return [ids[at : at + length] for ids in texts for at in range(0, len(ids) - length + 1, length)]


def _share(row: dict) -> float:
    return row["flipped"] / max(1, row["asked"])


def _named(column: dict) -> str:
    layer = "" if column["layer"] is None else f"{column['layer']} "
    return f"{layer}{column['input']} {column['column']}: {column['absmax']:.3g}"
