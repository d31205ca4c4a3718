"""Two methods, one text: generate what is to be read, let both read it, and hand out the comparison.

Both run through transformers, because there each layer can be looked into and replaced afterwards.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.contestant import Contestant
from llmq.engine.interface import Engine
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, unknown
from llmq.events import Event, Progress
from llmq.inspect.agreement import Agreement, Drift, compare_logits, margins_at, parting
from llmq.machine.door import Lease
from llmq.models.opening import Model
from llmq.models.text import require_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TEXTS = ("continuation", "prompt", "text")
LONGEST_TEXT = 512  # tokens; two float32 tables of so many rows, each as wide as the vocabulary, are held
MAX_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What both read: the `baseline`'s greedy 'continuation' of the prompt, the 'prompt' itself, or a given 'text'.

    `prompt` goes through the chat template; a given text is read as it is, from `prompt`. `new_tokens`: of a
    continuation.
    """

    prompt: str
    text: str = "continuation"
    model: str = "demo"
    baseline: Contestant = Contestant.parse("fp16")
    contestant: Contestant = Contestant.parse("bnb-int8")
    new_tokens: int = 32
    device: str = "cpu"

    def __post_init__(self):
        if self.text not in TEXTS:
            raise unknown("text to read", self.text, TEXTS)
        if self.baseline.label == self.contestant.label:
            raise BadChoice(f"both methods are {self.baseline.label}; choose two different ones")
        if isinstance(self.new_tokens, bool) or not isinstance(self.new_tokens, int):
            raise BadChoice(f"new tokens is {self.new_tokens!r}; choose a whole number from 1 to {MAX_NEW_TOKENS}")
        if not 1 <= self.new_tokens <= MAX_NEW_TOKENS:
            raise BadChoice(f"new tokens is {self.new_tokens}; choose a whole number from 1 to {MAX_NEW_TOKENS}")

    def run(self, lease: Lease) -> Iterator[Event | Read]:
        """Yield events and at last a Read."""
        model = yield from lease.open(self.model)
        pair = yield from load_pair(self, model, lease)
        ids = _ids(self, model)
        drift, continuation = None, None
        if self.text == "continuation":
            continuation = len(ids)
            drift = yield from _drift(pair, ids, self, lease)
            ids = ids + list(drift.baseline_ids)
        yield lease.progress(f"{self.baseline.label} and {self.contestant.label} read {len(ids)} tokens", 0.8)
        logits = [engine.logits(ids, lease.stop.is_set).float() for engine in pair]
        agreement = Agreement(tuple(ids), tuple(compare_logits(*logits, ids)), continuation, drift)
        yield Read(self, agreement, tuple(model.tokenizer.decode([token]) for token in ids), model.tokenizer)


@dataclass(frozen=True)
class Read:
    """The result, with what it takes to show it: `texts`, one for each token of the text."""

    reading: Reading
    agreement: Agreement
    texts: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def text_of(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id])


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
    for side, (engine, contestant) in enumerate(zip(pair, (reading.baseline, reading.contestant), strict=True)):
        written: list[int] = []
        logits: list[torch.Tensor] = []
        generation = engine.start(ids, SamplingSettings(max_new_tokens=reading.new_tokens))
        try:
            while len(written) < reading.new_tokens:
                token = generation.step() if written else generation.prefill(lease.stop.is_set)
                logits.append(generation.logits.float().cpu())
                if token.token_id in engine.eos_ids:
                    break
                written.append(token.token_id)
                share = (side + len(written) / reading.new_tokens) * 0.4
                yield lease.progress(f"{contestant.label} writes token {len(written)} of {reading.new_tokens}", share)
        finally:
            generation.close()
        texts.append(written)
        tables.append(logits)
    if not texts[0]:
        ends = f"{reading.baseline.label} ends the text at once"
        raise BadChoice(f"{ends}, so there is no continuation to read; try another prompt")
    at = parting(*texts)
    margins = None if at is None else margins_at(*(table[at] for table in tables), (texts[0][at], texts[1][at]))
    return Drift(tuple(texts[0]), tuple(texts[1]), at, margins)


def load_pair(question, model: Model, lease: Lease) -> Generator[Event, None, tuple[Engine, Engine]]:
    """Load the transformers engines of a question with a `baseline`, a `contestant` and a `device`."""
    engines = []
    for contestant in (question.baseline, question.contestant):
        engines.append((yield from lease.load(Key.of(model, contestant.method, question.device), contestant)))
    return tuple(engines)
