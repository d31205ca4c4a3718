"""One prompt through one method with its linear inputs watched: events while it prepares, then the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmq.contestant import Contestant
from llmq.engine.loading import Key
from llmq.errors import BadChoice
from llmq.events import Event
from llmq.inspect.report import OutlierReport
from llmq.machine.door import Lease
from llmq.methods.base import DEFAULT_THRESHOLD

MAX_NEW_TOKENS = 64
LOWEST_THRESHOLD = 2.0  # how far down a threshold can be moved afterwards; lower ones keep more numbers


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What to watch. `new_tokens` are generated greedily after the prompt; 0 watches the prompt alone."""

    prompt: str
    model: str = "demo"
    contestant: Contestant = Contestant.parse("bnb-int8")
    new_tokens: int = 8
    device: str = "cpu"

    @property
    def threshold(self) -> float:
        """The method's own; the usual one for a method that has none."""
        return DEFAULT_THRESHOLD if self.contestant.threshold is None else self.contestant.threshold

    def __post_init__(self):
        if self.threshold <= 0:
            raise BadChoice(f"threshold is {self.threshold:g}: with the decomposition off there are no outlier columns")
        if not isinstance(self.new_tokens, int) or not 0 <= self.new_tokens <= MAX_NEW_TOKENS:
            raise BadChoice(f"new tokens is {self.new_tokens!r}; choose a whole number from 0 to {MAX_NEW_TOKENS}")

    def run(self, lease: Lease) -> Iterator[Event | OutlierReport]:
        """Yield events, an OutlierReport once the prompt is read, and at last the whole one (none when stopped before
        the model ran)."""
        import torch

        from llmq.inspect.outliers import observe_in_parts

        model = yield from lease.open(self.model)
        ids = model.encode(self.prompt, new_tokens=self.new_tokens)
        engine = yield from lease.load(Key.of(model, self.contestant.method, self.device), self.contestant)
        yield from observe_in_parts(
            engine.model,
            torch.tensor([ids], device=self.device),
            new_tokens=self.new_tokens,
            stop=lease.stop,
            threshold=self.threshold,
            lowest_threshold=min(LOWEST_THRESHOLD, self.threshold),
            token_text=lambda token: model.tokenizer.decode([token]),
            name=self.model,
            method=self.contestant.label,
            account=engine.method.outlier_columns,
        )


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Load what an inspection would, so that its first picture comes soon after the click; not while others compute:
    then there is no hurry."""

    model: str = "demo"
    contestant: Contestant = Contestant.parse("bnb-int8")
    device: str = "cpu"
    patient = False

    def run(self, lease: Lease) -> Iterator[Event]:
        model = yield from lease.open(self.model)
        yield from lease.load(Key.of(model, self.contestant.method, self.device), self.contestant)
