"""One prompt decoded in five ways, by FP16 and by 8-bit methods: what each writes, how likely it is, how varied.

The log-probability of a text is the sum over its tokens, in nats, by the model that wrote it, before temperature and
filters. Distinct-n: different n-grams of tokens over all of them (Li et al. 2016). Everything runs through
transformers' layers, which beam search needs; every draw begins with one seed, whoever draws.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any

from llmq.contestant import Contestant, Contestants, shown_name
from llmq.engine.base import generate
from llmq.engine.hf import WARM_UP_STEPS, HFEngine
from llmq.engine.loading import Key
from llmq.engine.sampling import MAX_TEMPERATURE, SamplingSettings
from llmq.environment import describe
from llmq.events import Event, Progress
from llmq.fields import Number, Text
from llmq.figures.blocks import Drawing, Texts
from llmq.figures.lines import Line, line_figure
from llmq.formatting import MISSING, format_seconds
from llmq.labs.rows import BASELINE, RowAnswer, Rows, TableLab
from llmq.models.opening import Model
from llmq.scores import first_divergence, log_probabilities

if TYPE_CHECKING:
    from llmq.machine.door import Lease

EXAMPLE = "Plan a 3-day itinerary in Paris."
PARTED = "‖"  # where a text leaves FP16's


@dataclass(frozen=True, kw_only=True)
class Decoding(TableLab):
    """`contestants`, FP16 always the first, continue `prompt` by up to `tokens` tokens under every strategy."""

    kind, command, part = "decoding", ("experiment", "decoding"), "Decoding"
    title, button = "One prompt decoded in five ways", "Decode"
    about = (
        "How does a model choose the next token? **Greedy** takes the likeliest. **Beam search** goes on with the few "
        "likeliest texts so far, and gives the one whose tokens are likeliest on average. The others draw by chance: "
        "a **temperature** below 1 favours what is likely, **top-k** draws among the k likeliest, **top-p** among the "
        "likeliest that together reach p. Distinct-n is the share of runs of n tokens that are not repeated."
    )
    example, prompted = EXAMPLE, "What the models answer."
    prompt: Annotated[str, Text(help=f"what is continued; default: {EXAMPLE}", flag="--prompt")] = ""
    contestants: Annotated[tuple[Contestant, ...], Contestants(label="Methods", help="beside FP16, with commas")] = (
        Contestant.parse("llm-int8"),
    )
    tokens: Annotated[int, Number(2, 256, whole=True, help="of each text", label="Tokens", shown=128, step=1)] = 40
    width: Annotated[
        int, Number(1, 16, whole=True, help="texts that beam search keeps; 1 is greedy", label="Beams", shown=8, step=1)
    ] = 4
    temperature: Annotated[
        float, Number(0.05, MAX_TEMPERATURE, help="of the draw without a filter", label="Temperature", shown=2,
                      step=0.05)
    ] = 0.7  # fmt: skip
    top_k: Annotated[int, Number(1, 1000, whole=True, help="k of top-k", label="Top-k", shown=100, step=1)] = 40
    top_p: Annotated[float, Number(0.01, 1, help="p of top-p", label="Top-p", shown=1, step=0.01)] = 0.9
    seed: Annotated[int, Number(0, 2**31, whole=True, help="of every draw")] = 0
    columns = {
        "Strategy": "{strategy}",
        "Method": lambda row: shown_name(row["method"]),
        "Log-probability (nats)": "{logprob:.1f}",
        "For each token": "{mean_logprob:.2f}",
        "Distinct-1, 2, 3": lambda row: ", ".join(_shown_distinct(share) for share in row["distinct"]),
        "Time": lambda row: f"{format_seconds(row['seconds'])}, {row['tokens']} tokens",
        "Parts from FP16": lambda row: _shown_parting(row),
    }

    @property
    def strategies(self) -> dict[str, dict]:
        """The settings of every strategy by its name: a `width` of beam search, or how a token is drawn."""
        return {
            "greedy": {},
            f"beam search, {self.width}": {"width": self.width},
            f"temperature {self.temperature:g}": {"temperature": self.temperature, "seed": self.seed},
            f"top-k {self.top_k}": {"temperature": 1.0, "top_k": self.top_k, "seed": self.seed},
            f"top-p {self.top_p:g}": {"temperature": 1.0, "top_p": self.top_p, "seed": self.seed},
        }

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Yield events, progress, and an answer after every text; stopped early, what was written stays."""
        model = yield from lease.open(self.model)
        asked = self.prompt.strip() or self.example
        names = ("width", "temperature", "top_k", "top_p", "seed")
        settings = {name: getattr(self, name) for name in names} | {"prompt": asked, "most_tokens": self.tokens}
        settings |= {"engine": HFEngine.name, "command": self.typed()} | describe(self.device, model.source)

        def facts(rows: list[dict]) -> dict:
            return {"text": f"what follows “{asked:.80}”", "tokens": sum(row["tokens"] for row in rows)}

        yield from self.gathered(_Work(self, model, lease).rows(), settings, facts)

    @classmethod
    def shown(cls, rows: list[dict]) -> list[dict]:
        """Strategy by strategy."""
        order = list(dict.fromkeys(row["strategy"] for row in rows))
        return sorted(rows, key=lambda row: order.index(row["strategy"]))

    @classmethod
    def texts(cls, rows: list[dict]) -> Texts | None:
        by_strategy: dict[str, list[str]] = {}
        for row in rows:
            by_strategy.setdefault(row["strategy"], []).append(row["text"])
        methods = list(dict.fromkeys(shown_name(row["method"]) for row in rows))
        cells = [[name, *_marked(texts), *[""] * (len(methods) - len(texts))] for name, texts in by_strategy.items()]
        return Texts(["Strategy", *methods], cells, f"{PARTED}: here the text leaves FP16's") if rows else None

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        """FP16's likeliest text beside its greedy one, and how far each other method writes the same."""
        own = [row for row in rows if _is_baseline(row)]
        if len(own) < 2:
            return ""
        best = max(own, key=lambda row: row["mean_logprob"])
        beside = "" if best is own[0] else f" ({own[0]['strategy']}: {own[0]['mean_logprob']:.2f})"
        said = [f"Of FP16's texts the one by **{best['strategy']}** is the likeliest: {best['mean_logprob']:.2f} nats "
                f"for each token{beside}."]  # fmt: skip
        for method in dict.fromkeys(shown_name(row["method"]) for row in rows if not _is_baseline(row)):
            said.append(_agreement(method, [row for row in rows if shown_name(row["method"]) == method]))
        return " ".join(said)

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """FP16's texts, token by token: beam search may take a less likely token for likelier ones behind it."""
        lines = [
            Line(row["strategy"], list(enumerate(accumulate(row["logprobs"]), 1)), number)
            for number, row in enumerate(filter(_is_baseline, rows))
        ]
        return [
            Drawing.of(
                line_figure, "Log-probability of FP16's texts so far", lines, "%{x} tokens: %{y:.2f} nats",
                x={"title": {"text": "tokens"}}, y={"title": {"text": "nats"}},
            )
        ]  # fmt: skip

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> RowAnswer:
        """What is not there is None."""
        return RowAnswer(cls, stored)


@dataclass
class _Work:
    """One question at work; `baseline`: the row of FP16 by strategy."""

    lab: Decoding
    model: Model
    lease: Lease
    baseline: dict[str, dict] = field(default_factory=dict)

    def rows(self) -> Rows:
        """Yield events, progress, and every text with its figures, one method after the other."""
        ids = self.model.encode(self.lab.prompt.strip() or self.lab.example)
        contestants, strategies = list(dict.fromkeys((BASELINE, *self.lab.contestants))), self.lab.strategies
        for place, contestant in enumerate(contestants):
            key = Key.of(self.model, contestant.method, self.lab.device)
            engine = yield from self.lease.load(key, contestant)
            engine.warm_up(ids)
            for number, (name, settings) in enumerate(strategies.items()):
                done = (place + number / len(strategies)) / len(contestants)
                yield self.lease.progress(f"{contestant.title}: {name}", done)
                yield self._row(engine, ids, {"strategy": name, "method": contestant.label}, settings)

    def _row(self, engine: HFEngine, ids: list[int], row: dict, settings: dict) -> dict:
        write = self._search if "width" in settings else self._draw
        written, logprobs, seconds = write(engine, ids, min(self.lab.tokens, engine.context - len(ids)), **settings)
        row |= {"seconds": seconds, **figures_of(written, logprobs)} | self._parting(row["strategy"], written)
        self.baseline.setdefault(row["strategy"], row)
        return row | {"text": self.model.tokenizer.decode(written, skip_special_tokens=True)}

    def _search(self, engine: HFEngine, ids: list[int], tokens: int, width: int) -> tuple:
        """As `_draw`; a batch of beams is warmed up by itself."""
        stopped = self.lease.stop.is_set
        engine.beam_search(ids, width, min(tokens, WARM_UP_STEPS), stopped)
        started = self.lease.clock()
        written = engine.beam_search(ids, width, tokens, stopped)
        seconds = self.lease.clock() - started
        return written, read(engine, ids, written), seconds

    def _draw(self, engine: HFEngine, ids: list[int], tokens: int, **sampling) -> tuple:
        """The tokens, the log-probability of each, and the seconds that writing them took."""
        settings, started = SamplingSettings(max_new_tokens=tokens, **sampling), self.lease.clock()
        found = list(generate(engine, ids, settings, self.lease.stop.is_set))
        seconds = self.lease.clock() - started
        return [token.token_id for token in found], [token.logprob for token in found], seconds

    def _parting(self, strategy: str, written: list[int]) -> dict:
        """`parts_at`: the first place where FP16 wrote another token, None where it wrote the same; `choices`: both."""
        other = self.baseline.get(strategy, {}).get("token_ids", written)
        at = first_divergence(other, written)
        choices = [] if at is None else [self.model.tokenizer.decode([side[at]]) for side in (other, written)]
        return {"parts_at": at, "choices": choices}


def read(engine: HFEngine, ids: list[int], written: list[int]) -> list[float]:
    """The log-probability of every token of `written` after the prompt `ids`, in the calls that write a text."""
    generation, found = engine.start(ids, SamplingSettings()), []
    generation.prefill()
    for token in written:
        found.append(log_probabilities(generation.logits[None])[0, token].item())
        generation.feed(token)
    generation.close()
    return found


def figures_of(written: list[int], logprobs: list[float]) -> dict:
    """What is told of a text by its tokens and the log-probability of each."""
    return {
        "tokens": len(written),
        "logprob": sum(logprobs),
        "mean_logprob": sum(logprobs) / len(logprobs),
        "distinct": [distinct(written, n) for n in (1, 2, 3)],
        "token_ids": written,
        "logprobs": [round(value, 5) for value in logprobs],
    }


def distinct(tokens: list[int], n: int) -> float | None:
    """Different n-grams over all n-grams of a text; None for a text without any."""
    grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def _is_baseline(row: dict) -> bool:
    return shown_name(row["method"]) == BASELINE.title


def _agreement(method: str, rows: list[dict]) -> str:
    """How far one method writes FP16's texts."""
    parted = sorted(row["parts_at"] for row in rows if row["parts_at"] is not None)
    same = f"{method} writes FP16's text under {len(rows) - len(parted)} of {len(rows)} strategies"
    if not parted:
        return f"{same}."
    places = f"{parted[0] + 1}" if parted[0] == parted[-1] else f"{parted[0] + 1} to {parted[-1] + 1}"
    return f"{same}; it parts at token {places} under the others."


def _marked(texts: list[str]) -> Iterator[str]:
    """The texts, with a mark where they leave the first."""
    for text in texts:
        same = len(os.path.commonprefix([text, texts[0]]))
        yield text if text == texts[0] else f"{text[:same]}{PARTED}{text[same:]}"


def _shown_distinct(share: float | None) -> str:
    return MISSING if share is None else f"{share:.2f}"


def _shown_parting(row: dict) -> str:
    if _is_baseline(row):
        return MISSING
    if row["parts_at"] is None:
        return "nowhere"
    own, other = ("“" + text.replace("\n", "⏎").strip(" ") + "”" for text in row["choices"])
    return f"token {row['parts_at'] + 1}: {other} for {own}"
