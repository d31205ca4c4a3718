"""Two methods, one text: generate what is to be read, let both read it, and hand out the comparison.

Both run through transformers, because there each layer can be looked into and replaced afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from llmq.contestant import Contestant, OneContestant
from llmq.engine.base import Engine, tokens_of
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.fields import Choice, Number, Text
from llmq.figures.blocks import Block, Table, Verbatim
from llmq.figures.pages import text_markup
from llmq.formatting import format_share, plain_json, quoted
from llmq.inspect.agreement import Agreement, Drift, TokenAgreement, compare_logits, margins_at
from llmq.labs.base import Lab
from llmq.machine.door import Lease
from llmq.models.opening import Model
from llmq.models.text import require_text
from llmq.scores import first_divergence
from llmq.stored import from_stored, to_stored

if TYPE_CHECKING:
    import torch

TEXTS = ("continuation", "prompt", "text")
LONGEST_TEXT = 512  # tokens; two float32 tables of so many rows, each as wide as the vocabulary, are held
ENOUGH = 500  # tokens for a perplexity that says something
MAX_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Reading(Lab):
    """Two methods under teacher forcing. Both read the `baseline`'s greedy 'continuation' of the prompt, the 'prompt'
    itself, or a given 'text'.

    `prompt` goes through the chat template; a given text is read as it is, from `prompt`. `new_tokens`: of a
    continuation.
    """

    kind, command, title = "agreement", ("agreement",), "Agreement"
    about, button = "Two methods read the same text: KL, first choices, and where they part.", "Read with both"
    prompt: Annotated[str, Text(positional=True, file="--file", help="a prompt, or with --read text a text")] = ""
    text: Annotated[str, Choice(TEXTS, help="continuation, prompt or text", named="text to read", flag="--read")] = (
        "continuation"
    )
    baseline: Annotated[Contestant, OneContestant()] = Contestant.parse("fp16")
    contestant: Annotated[Contestant, OneContestant(flag="--method")] = Contestant.parse("bnb-int8")
    new_tokens: Annotated[int, Number(1, MAX_NEW_TOKENS, whole=True, help="of the continuation")] = 32

    def __post_init__(self):
        super().__post_init__()
        if self.baseline.label == self.contestant.label:
            raise BadChoice(f"both methods are {self.baseline.label}; choose two different ones")

    def run(self, lease: Lease) -> Iterator[Event | Progress | Read]:
        """Yield events and at last a Read."""
        model = yield from lease.open(self.model)
        pair = yield from load_pair(self, model, lease)
        ids = _ids(self, model)
        drift, continuation = None, None
        if self.text == "continuation":
            continuation = len(ids)
            drift = yield from _drift(pair, ids, self, lease)
            ids = ids + list(drift.baseline_ids)
        yield lease.progress(f"{self.baseline.title} and {self.contestant.title} read {len(ids)} tokens", 0.8)
        logits = [engine.logits(ids, lease.stop.is_set).float() for engine in pair]
        agreement = Agreement(tuple(ids), tuple(compare_logits(*logits, ids)), continuation, drift)
        shown = {guess.token_id for token in agreement.tokens for guess in (*token.baseline, *token.other)}
        shown |= {*ids, *(drift.other_ids if drift else ())}
        names = {token_id: model.tokenizer.decode([token_id]) for token_id in sorted(shown)}
        yield Read(self, agreement, names)

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> Read:
        question = dict(stored["stored"]["question"])
        for side in ("baseline", "contestant"):
            question[side] = Contestant.parse(question[side])
        names = {int(token_id): text for token_id, text in stored["stored"]["names"].items()}
        asked = cls(**{field.name: question[field.name] for field in fields(cls) if field.name in question})
        return Read(asked, from_stored(Agreement, stored["stored"]["found"]), names)


@dataclass(frozen=True)
class Read:
    """What both methods made of the text. `names`: the text of every token id that is shown."""

    reading: Reading
    agreement: Agreement
    names: Mapping[int, str]
    kind = "agreement"

    @property
    def title(self) -> str:
        return f"Agreement: {self.reading.model}, {' and '.join(self.labels)}"

    @property
    def titles(self) -> tuple[str, str]:
        """Both methods as people read them."""
        return self.reading.baseline.title, self.reading.contestant.title

    @property
    def texts(self) -> tuple[str, ...]:
        """One for each token of the text."""
        return tuple(self.names[token_id] for token_id in self.agreement.token_ids)

    @property
    def labels(self) -> tuple[str, str]:
        return self.reading.baseline.label, self.reading.contestant.label

    def blocks(self) -> Iterator[Block]:
        """The finding, the drift, the text with both lists of five behind each token, the diverging tokens."""
        yield summary_of(self)
        yield Verbatim(drift_line(self))
        yield text_markup(self.value())
        rows = [
            [str(t.position), quoted(self.names[t.token_id]), f"{t.kl:.4g}", str(t.rank)]
            + [quoted(self.names[side[0].token_id]) for side in (t.baseline, t.other)]
            for t in self.agreement.diverging
        ]
        yield Table(
            ["Token", "Text", "KL (nats)", "Rank of the first choice", *self.titles],
            rows,
            "Tokens with another first choice",
        )

    def value(self) -> dict:
        """What a page shows of it: labels, one row a token, and a summary. A KL that is infinite is None."""
        agreement = self.agreement
        return {
            "labels": list(self.titles),
            "first": agreement.tokens[0].position,
            "opening": self.texts[0],
            "continuation": agreement.continuation,
            "tokens": [_value_row(self, token) for token in agreement.tokens],
            "summary": summary_of(self),
        }

    def to_json(self) -> dict:
        """The keys of `agreement --json`."""
        found, reading = self.agreement, self.reading
        return {
            "kind": self.kind,
            "model": reading.model,
            "device": reading.device,
            "baseline": self.labels[0],
            "method": self.labels[1],
            "text": reading.text,
            "token_ids": list(found.token_ids),
            "texts": list(self.texts),
            "continuation": found.continuation,
            "mean_kl": found.mean_kl,
            "top1_agreement": found.top1_agreement,
            "perplexities": list(found.perplexities),
            "tokens": [_token_json(self, token) for token in found.tokens],
            "drift": found.drift and asdict(found.drift),
        }

    def stored(self) -> dict:
        question = {f.name: getattr(self.reading, f.name) for f in fields(Reading)}
        question |= dict(zip(("baseline", "contestant"), self.labels, strict=True))
        found = {"question": question, "found": to_stored(self.agreement), "names": dict(self.names)}
        return plain_json(self.to_json()) | {"stored": found}


def _value_row(read: Read, token: TokenAgreement) -> list:
    lists = (
        [[read.names[guess.token_id], float(f"{guess.probability:.3g}")] for guess in side]
        for side in (token.baseline, token.other)
    )
    kl = float(f"{token.kl:.4g}") if math.isfinite(token.kl) else None  # a browser's JSON has no infinity
    return [read.names[token.token_id], kl, token.rank, *lists]


def _ids(reading: Reading, model: Model) -> list[int]:
    if reading.text == "text":
        require_text(reading.prompt, "text", "paste a few sentences")
        ids = model.tokenize(reading.prompt)
    else:
        ids = model.encode(reading.prompt)
    longest = min(LONGEST_TEXT, model.context) - (reading.new_tokens if reading.text == "continuation" else 0)
    if len(ids) > longest:
        raise BadChoice(f"the text is {len(ids):,} tokens long; give at most {longest:,} tokens")
    if reading.text != "continuation" and len(ids) < 2:
        raise BadChoice(f"the text has {len(ids)} token; at least 2 are needed, the first predicts the second")
    return ids


def _drift(
    pair: tuple[Engine, Engine], ids: list[int], reading: Reading, lease: Lease
) -> Generator[Progress, None, Drift]:
    """Both write freely."""
    texts, tables = [], []
    settings = SamplingSettings(max_new_tokens=reading.new_tokens)
    for side, (engine, contestant) in enumerate(zip(pair, (reading.baseline, reading.contestant), strict=True)):
        written: list[int] = []
        logits: list[torch.Tensor] = []
        generation = engine.start(ids, settings)
        try:
            for token in tokens_of(generation, engine, len(ids), settings, lease.stop.is_set):
                logits.append(generation.logits.float().cpu())
                if token.end == "eos":
                    break
                written.append(token.token_id)
                share = (side + len(written) / reading.new_tokens) * 0.4
                yield lease.progress(f"{contestant.title} writes token {len(written)} of {reading.new_tokens}", share)
        finally:
            generation.close()
        texts.append(written)
        tables.append(logits)
    if not texts[0]:
        ends = f"{reading.baseline.title} ends the text at once"
        raise BadChoice(f"{ends}, so there is no continuation to read; try another prompt")
    at = first_divergence(*texts)
    margins = None if at is None else margins_at(*(table[at] for table in tables), (texts[0][at], texts[1][at]))
    return Drift(tuple(texts[0]), tuple(texts[1]), at, margins)


def load_pair(question, model: Model, lease: Lease) -> Generator[Event, None, tuple[Engine, Engine]]:
    """Load the transformers engines of a question with a `baseline`, a `contestant` and a `device`."""
    engines = []
    for contestant in (question.baseline, question.contestant):
        engines.append((yield from lease.load(Key.of(model, contestant.method, question.device), contestant)))
    return tuple(engines)


def summary_of(read: Read) -> str:
    """Agreement in one line."""
    found, titles = read.agreement, read.titles
    same = sum(token.agrees for token in found.tokens)
    perplexities = " and ".join(f"{own:.4g} ({name})" for own, name in zip(found.perplexities, titles, strict=True))
    surprise = f"; perplexity {perplexities}" if len(found.tokens) >= ENOUGH else ""
    return (
        f"Both read the same {len(found.tokens)} tokens. At {same} of them ({format_share(found.top1_agreement)}) they "
        f"have the same first choice; mean KL {found.mean_kl:.3g} nats{surprise}."
    )


def drift_line(read: Read) -> str:
    """Where the two free texts part; '' where none was written."""
    drift, titles = read.agreement.drift, read.titles
    if drift is None:
        return ""
    if drift.position is None:
        shorter = min(len(drift.baseline_ids), len(drift.other_ids))
        return f"Writing by themselves, both write the same {shorter} tokens."
    own, other = (read.names[ids[drift.position]] for ids in (drift.baseline_ids, drift.other_ids))
    margins = "{:.3g} and {:.3g} nats".format(*drift.margins) if drift.margins else "unknown margins"
    return (
        f"Writing by themselves, they part at token {drift.position + 1}: {titles[0]} writes {quoted(own)}, "
        f"{titles[1]} {quoted(other)}, each preferring its own by {margins}. From there on each reads its own text, so "
        "a small difference of numbers can become a large one of words."
    )


def _token_json(read: Read, token: TokenAgreement) -> dict:
    found = asdict(token) | {"text": read.names[token.token_id]}
    for side in ("baseline", "other"):
        found[side] = [guess | {"text": read.names[guess["token_id"]]} for guess in found[side]]
    return found
