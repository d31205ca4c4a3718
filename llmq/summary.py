"""What a run came to: one consumer of the event stream that adds up, and the answer that a comparison is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from llmq.events import Event, Failed, Finished, Loaded, Memory, Planned, Prefilled, Run, Step
from llmq.figures.blocks import Block, Table, Verbatim
from llmq.formatting import MISSING, OVER_HTTP, format_bytes, format_seconds, format_speed, shown_coverage
from llmq.parting import ORDINALS, Choice, Parting
from llmq.scores import first_divergence, first_text_divergence

SHOWN = ("engine", "text", "token_ids", "prompt_tokens", "load_seconds", "prefill_seconds", "decode_tokens_per_second")
SHOWN += ("weight_bytes", "kv_bytes", "peak_bytes", "error")  # of a contestant, under the same name in JSON


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
    token_ids: list[int | None] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    best: list[dict[str, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int | None] = field(default_factory=list)
    answer_tokens: int | None = None  # by the count of a server
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    reason: str | None = None
    error: str | None = None

    def add(self, event: Event) -> None:
        """Take one of this contestant's events in."""
        match event:
            case Loaded():
                self.weight_bytes, self.load_seconds = event.weight_bytes, event.seconds
                self.engine, self.coverage = event.engine, event.coverage
            case Prefilled():
                self.prompt_tokens, self.prefill_seconds = event.prompt_tokens, event.seconds
            case Step():
                self.token_ids.append(event.token_id)
                self.pieces.append(event.text)
                self.logprobs.append(event.logprob)
                self.best.append(event.best)
                if event.index:
                    self.step_seconds.append(event.seconds)
                    self.step_tokens.append(event.tokens)
            case Finished():
                self.reason, self.kv_bytes, self.peak_bytes = event.reason, event.kv_bytes, event.peak_bytes
                self.prompt_tokens, self.answer_tokens = event.prompt_tokens or self.prompt_tokens, event.tokens
                self.pieces.append(event.text)
            case Failed():
                self.error = event.message

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens over summed step seconds; token 0 belongs to the prefill. None with fewer than two tokens, and while a
        server has not told how many they are."""
        seconds, count = sum(self.step_seconds), self.step_tokens
        tokens = self.answer_tokens - 1 if self.answer_tokens else None if None in count else sum(count)
        return tokens / seconds if tokens and seconds > 0 else None

    def chance(self, place: int) -> float | None:
        """How likely this contestant held the token that it wrote at `place`; None where it does not tell."""
        logprob = self.logprobs[place]
        return None if logprob is None else math.exp(min(0.0, logprob))

    def choice(self, place: int, seen_by: Outcome, there: int | None = None) -> Choice:
        """This contestant's token at `place`, and what `seen_by` held of it; both had the same text before it. `there`:
        the place in the other's text, where that is another."""
        token, seen = self.token_ids[place], seen_by.best[place if there is None else there]
        ranks = dict(zip(seen, range(len(ORDINALS)), strict=False))
        chance = self.chance(place) if seen_by is self else seen.get(str(token))
        ended = self.reason == "eos" and place == len(self.token_ids) - 1 and self.engine != OVER_HTTP
        text = None if ended else self.pieces[place]
        return Choice(self.contestant, token, text, chance, ranks.get(str(token)), min(seen.values(), default=None))

    def to_json(self) -> dict:
        found = {"method": self.contestant} | {name: getattr(self, name) for name in SHOWN}
        return found | {"coverage": self.coverage or None, "finish_reason": self.reason}


class Summary:
    """Feed it events with `add`; read `outcomes` (by contestant, in order of appearance) and `plan` at any time."""

    def __init__(self, events: Iterable[Event] = ()):
        self.outcomes: dict[str, Outcome] = {}
        self.plan: Planned | None = None
        self.peak_by_device: dict[str, int] = {}  # of live tensors, in bytes; where there are several devices
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        if isinstance(event, Planned):
            self.plan = event
            self.outcomes = {name: Outcome(name) for name in event.predicted_bytes}
        elif isinstance(event, Memory):
            for device, count in event.by_device.items():
                self.peak_by_device[device] = max(count, self.peak_by_device.get(device, 0))
        elif name := getattr(event, "contestant", ""):
            self.outcomes.setdefault(name, Outcome(name)).add(event)

    def agreement(self) -> dict:
        """How far the first two contestants' tokens are the same.

        `first_divergence`: index of the first token that differs, None while they agree as far as both go. What a
        server wrote is held against the other's text, and the token is the first contestant's.
        """
        if len(self.outcomes) < 2:
            return {"first_divergence": None, "matching_prefix_tokens": 0}
        first, second = self._pair
        place, _ = self.places()
        same = min(len(first.pieces), len(second.pieces), *map(len, (first.token_ids, second.token_ids)))
        return {"first_divergence": place, "matching_prefix_tokens": same if place is None else place}

    def parting(self) -> Parting | None:
        """What the first two contestants chose where their texts part; None while they agree."""
        place, there = self.places() if len(self.outcomes) > 1 else (None, None)
        if place is None:
            return None
        first, second = self._pair
        return Parting(first.choice(place, first), second.choice(there, first, place))

    @property
    def _pair(self) -> tuple[Outcome, Outcome]:
        first, second = list(self.outcomes.values())[:2]
        return first, second

    def places(self) -> tuple[int | None, int | None]:
        """Where the first two part, in each one's tokens; None while they agree."""
        first, second = self._pair
        if OVER_HTTP in (first.engine, second.engine):
            return first_text_divergence(first.pieces, second.pieces)
        place = first_divergence(first.token_ids, second.token_ids)
        return place, place


@dataclass(frozen=True)
class RunAnswer:
    """A comparison that ran, shown, written and loaded like a lab's answer: texts, figures, where the texts part."""

    run: Run
    summary: Summary
    kind = "compare"

    @property
    def title(self) -> str:
        return f"{self.run.settings.get('model')}: {' and '.join(self.summary.outcomes)}"

    def blocks(self) -> Iterator[Block]:
        outcomes = self.summary.outcomes.values()
        for outcome in outcomes:
            yield Verbatim(f"--- {outcome.contestant}\n{outcome.error or outcome.text}")
        rows = [
            [
                outcome.contestant,
                format_seconds(outcome.prefill_seconds),
                format_speed(outcome.decode_tokens_per_second),
                format_bytes(outcome.weight_bytes),
                shown_coverage(outcome.coverage) or MISSING,
                format_bytes(outcome.peak_bytes),
            ]
            for outcome in outcomes
        ]
        yield Table(["Method", "First token", "Decode", "Weights", "In 8 bit", "Peak"], rows, "Measured")
        yield self._first_divergence()

    def _first_divergence(self) -> str:
        """Where the first two texts part; '' where there are not two, or one was not finished."""
        pair = list(self.summary.outcomes.values())[:2]
        if len(pair) < 2 or any(outcome.error for outcome in pair):
            return ""
        first, parting = self.summary.agreement()["first_divergence"], self.summary.parting()
        if parting is None:
            return "the texts agree throughout"
        return f"the first different token is number {first + 1}: {parting.sentence()}"

    def to_json(self) -> dict:
        """The stable keys of `compare --json` and of `replay --json`."""
        run, plan = self.run, self.summary.plan
        return {
            "model": run.settings.get("model"),
            "device": plan.device if plan else run.settings.get("device"),
            "schedule": plan.schedule if plan else run.settings.get("schedule"),
            "schedule_reason": plan.reason if plan else "",
            "devices": plan.devices if plan else {},
            "peak_bytes_by_device": self.summary.peak_by_device,
            "peak_source": "torch allocator" if plan and plan.device.startswith("cuda") else "tensor sizes",
            "contestants": [outcome.to_json() for outcome in self.summary.outcomes.values()],
            "agreement": self.summary.agreement(),
            "first_difference": asdict(parting) if (parting := self.summary.parting()) else None,
            "settings": run.settings,
            "environment": run.environment,
        }
