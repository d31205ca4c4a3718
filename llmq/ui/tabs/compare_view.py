"""The Compare tab's stream of updates: events in, {component name: value} out. No gradio, so tests need no server.

A browser is updated a few times a second, not once a token: values are collected and given out when the last update is
old enough, and always at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from llmq.contestant import Contestant
from llmq.errors import UserError
from llmq.events import Event, Finished, Loaded, Loading, Step
from llmq.formatting import shown_coverage
from llmq.summary import Summary
from llmq.ui.parts.live_state import LiveState
from llmq.ui.parts.progress import event_line
from llmq.ui.parts.token_alignment import diff_value
from llmq.ui.parts.verdict import verdict

UPDATE_SECONDS = 0.25  # the live panel draws four times a second; every update costs the engine a slice of the GIL
PANES = 3


@dataclass
class CompareView:
    """Accumulates one run. `updates(events)` yields dicts of what changed.

    Names: 'status', 'text_0'…'text_2', 'live', and at the end 'verdict' and 'diff'.
    """

    labels: list[str]
    run: str
    device: str
    opening: str = ""
    cpu: str = ""
    clock: Callable[[], float] = time.monotonic
    summary: Summary = field(default_factory=Summary)

    def __post_init__(self):
        self.live = LiveState(
            {label: arithmetic(label, self.device, cpu=self.cpu) for label in self.labels}, run=self.run
        )
        self._texts = [""] * len(self.labels)
        self._tokens: list[list[tuple[int, str]]] = [[] for _ in self.labels]
        self._status = "Starting"
        self._shown: dict = {}

    def updates(self, events: Iterable[Event]) -> Iterator[dict]:
        """What the page should show, at most every UPDATE_SECONDS and never empty; the last one is complete."""
        yield self._changes(first=True)
        last = self.clock()
        try:
            for event in events:
                self._take(event)
                if self.clock() - last >= UPDATE_SECONDS and (changes := self._changes()):
                    yield changes
                    last = self.clock()
        except UserError as error:
            self._status = f"Not started: {error}" if not any(self._texts) else f"Ended early: {error}"
            yield self._changes() | {"error": str(error)}
            return
        self._status = self._closing()
        yield self._changes() | self._final()

    def _take(self, event: Event) -> None:
        self.summary.add(event)
        if not isinstance(event, Loading) or event.contestant:
            self.live.add(event)
        if isinstance(event, Loaded):
            told = arithmetic(event.contestant, self.device, event.engine, self.cpu)
            share = shown_coverage(event.coverage)
            self.live.describe(event.contestant, f"{told}; 8 bit: {share}" if share else told)
        if isinstance(event, Step | Finished):
            self._texts[self.labels.index(event.contestant)] += event.text
        if isinstance(event, Step):
            self._tokens[self.labels.index(event.contestant)].append((event.token_id, event.text))
        self._status = event_line(event) or self._status

    def _changes(self, *, first: bool = False) -> dict:
        now = {"status": self._prefix(self._status), "live": self.live.value()}
        now |= {f"text_{i}": text for i, text in enumerate(self._texts)}
        changed = now if first else {name: value for name, value in now.items() if self._shown.get(name) != value}
        self._shown |= now
        return changed

    def _closing(self) -> str:
        outcomes = self.summary.outcomes.values()
        if not outcomes:
            return "Stopped before anything ran."
        if any(outcome.error for outcome in outcomes):
            return "Finished, with a failure: see the card."
        stopped = any(outcome.reason == "stopped" for outcome in outcomes)
        return "Stopped." if stopped else "Finished."

    def _prefix(self, text: str) -> str:
        return f"{self.opening} · {text}" if self.opening else text

    def _final(self) -> dict:
        if len(self.labels) < 2 or not all(self._tokens[:2]):
            return {"verdict": verdict(self.summary, self.cpu), "diff": {}}
        return {
            "verdict": verdict(self.summary, self.cpu),
            "diff": diff_value((self.labels[0], self.labels[1]), self._tokens[0], self._tokens[1]),
        }


def arithmetic(label: str, device: str, loop: str = "hf", cpu: str = "") -> str:
    """What a contestant stores and multiplies in; empty for a method this version does not know (old recordings)."""
    try:
        return Contestant.parse(label).method.arithmetic(device, loop, cpu)
    except UserError:
        return ""


def labels_of(settings: Mapping) -> list[str]:
    """The contestants' labels of a recorded run."""
    labels = settings.get("contestants")
    if not (
        isinstance(labels, list)
        and 1 <= len(labels) <= PANES
        and all(isinstance(x, str) for x in labels)
        and len(set(labels)) == len(labels)
    ):
        raise UserError("this recording does not name one to three contestants, or repeats one")
    return labels
