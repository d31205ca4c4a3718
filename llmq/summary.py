"""What a run came to: one consumer of the event stream that adds up, for the command line, the page and the tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llmq.events import Event, Failed, Finished, Loaded, Planned, Prefilled, Step
from llmq.scores import first_divergence


@dataclass
class Outcome:
    """One contestant's figures; seconds and bytes. `None` until known."""

    contestant: str
    weight_bytes: int | None = None
    load_seconds: float | None = None
    coverage: dict[str, float] = field(default_factory=dict)
    engine: str | None = None
    prompt_tokens: int | None = None
    prefill_seconds: float | None = None
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    reason: str | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens over summed step seconds; token 0 belongs to the prefill. None with fewer than two tokens."""
        seconds = sum(self.step_seconds)
        return len(self.step_seconds) / seconds if seconds > 0 else None


class Summary:
    """Feed it events with `add`; read `outcomes` (by contestant, in order of appearance) and `plan` at any time."""

    def __init__(self, events: Iterable[Event] = ()):
        self.outcomes: dict[str, Outcome] = {}
        self.plan: Planned | None = None
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        if isinstance(event, Planned):
            self.plan = event
            self.outcomes = {name: Outcome(name) for name in event.predicted_bytes}
            return
        name = getattr(event, "contestant", "")
        if not name:
            return
        outcome = self.outcomes.setdefault(name, Outcome(name))
        match event:
            case Loaded():
                outcome.weight_bytes, outcome.load_seconds = event.weight_bytes, event.seconds
                outcome.engine, outcome.coverage = event.engine, event.coverage
            case Prefilled():
                outcome.prompt_tokens, outcome.prefill_seconds = event.prompt_tokens, event.seconds
            case Step():
                self._add_step(outcome, event)
            case Finished():
                outcome.reason, outcome.kv_bytes, outcome.peak_bytes = event.reason, event.kv_bytes, event.peak_bytes
                outcome.pieces.append(event.text)
            case Failed():
                outcome.error = event.message

    @staticmethod
    def _add_step(outcome: Outcome, step: Step) -> None:
        outcome.token_ids.append(step.token_id)
        outcome.pieces.append(step.text)
        outcome.logprobs.append(step.logprob)
        if step.index:
            outcome.step_seconds.append(step.seconds)

    def agreement(self) -> dict:
        """How far the first two contestants' tokens are the same.

        `first_divergence`: index of the first token that differs, None while they agree as far as both go.
        """
        if len(self.outcomes) < 2:
            return {"first_divergence": None, "matching_prefix_tokens": 0}
        first, second = (outcome.token_ids for outcome in list(self.outcomes.values())[:2])
        place = first_divergence(first, second)
        same = min(len(first), len(second)) if place is None else place
        return {"first_divergence": place, "matching_prefix_tokens": same}
