"""What the result of a comparison shows, from its events: one value a few times a second. No gradio, so tests need no
server.

A browser is updated a few times a second, not once a token: values are collected and given out when the last one is old
enough, and always at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmq.contestant import Contestant, entrant, shown_name
from llmq.errors import UserError
from llmq.events import Event, Finished, Loaded, Loading, Planned, Prefilled, Reading, Run, Step, Waiting
from llmq.formatting import shown_coverage
from llmq.models.presets import model_title
from llmq.servers.served import is_served
from llmq.summary import Summary
from llmq.ui.parts.difference import difference
from llmq.ui.parts.live_state import LiveState
from llmq.ui.parts.progress import event_line
from llmq.ui.parts.recording import Pace, recorded
from llmq.ui.parts.token_alignment import SAME, Token, diff_tokens, words_of
from llmq.ui.parts.verdict import verdict

OVER_HTTP = "over HTTP, with the server's queue; what it computes in is its own affair"
UPDATE_SECONDS = 0.25  # the panel draws four times a second; every update costs the engine a slice of the GIL
PANES = 3


@dataclass
class CompareView:
    """Accumulates one run. `updates(events)` yields what `parts.result` draws: a whole value each time.

    `asked`: what the run answers (`asked_of`); `recording`: the banner of a recorded one, '' for a live one.
    """

    labels: list[str]
    run: str
    device: str
    asked: Mapping = field(default_factory=dict)
    recording: str = ""
    cpu: str = ""
    clock: Callable[[], float] = time.monotonic
    summary: Summary = field(default_factory=Summary)

    def __post_init__(self):
        self.live = LiveState(
            {label: arithmetic(label, self.device, cpu=self.cpu) for label in self.labels}, run=self.run
        )
        self._texts = [""] * len(self.labels)
        self._tokens: list[list[Token]] = [[] for _ in self.labels]
        self._reading: list[str] = []  # contestants that are loaded and have not read the prompt
        self._status, self._fraction = "Starting", None

    def updates(self, events: Iterable[Event]) -> Iterator[dict]:
        """What the page should show, at most every UPDATE_SECONDS but for a place in line; the last value is complete.
        A run that cannot go on ends in a value that says why; one that never began, in a notice."""
        yield self.value()
        last = self.clock()
        try:
            for event in events:
                said = self._status
                self._take(event)
                waits = isinstance(event, Waiting) and self._status != said  # for long nothing may come after it
                if waits or self.clock() - last >= UPDATE_SECONDS:
                    yield self.value()
                    last = self.clock()
            self._status = self._closing()
        except UserError as error:
            if not any(self._texts):
                yield {"notice": f"Not started: {error}", "run": self.run}
                return
            self._status = f"Ended early: {error}"
        yield self.value() | self._final()

    def value(self) -> dict:
        """A JSON-able snapshot of the run so far."""
        return {
            **self.live.value(),
            "state": "running",
            "recording": self.recording,
            "asked": self.asked,
            "status": self._status,
            "fraction": self._fraction,
            "texts": list(self._texts),
            "strip": difference(self.summary, len(self.labels)),
            "headline": "",
            "details": [],
            "pieces": None,
            "first": None,
        }

    def _take(self, event: Event) -> None:
        self.summary.add(event)
        if not isinstance(event, Loading) or event.contestant:
            self.live.add(event)
        if isinstance(event, Loaded):
            told = arithmetic(event.contestant, self.device, event.engine, self.cpu)
            own = self.summary.plan.devices.get(event.contestant) if self.summary.plan else None
            told += f"; on {own}" if own else ""
            share = shown_coverage(event.coverage)
            self.live.describe(event.contestant, f"{told}; coverage: {share} in 8 bit" if share else told)
        if isinstance(event, Step | Finished):
            self._texts[self.labels.index(event.contestant)] += event.text
        if isinstance(event, Step):
            self._tokens[self.labels.index(event.contestant)].append((event.token_id, event.text))
        if line := self._prefill_line(event) or event_line(event):
            self._status, self._fraction = line, event.fraction if isinstance(event, Reading) else None

    def _prefill_line(self, event: Event) -> str:
        """Who reads the prompt now, of how many tokens, and how far it is where that is known."""
        if isinstance(event, Loaded):
            self._reading.append(event.contestant)
        elif isinstance(event, Prefilled) and event.contestant in self._reading:
            self._reading.remove(event.contestant)
        elif not isinstance(event, Reading):
            return ""
        if not self._reading:
            return ""
        plan: Planned | None = self.summary.plan
        known = plan and plan.prompt_tokens and not is_served(self._reading[0])  # a server counts for itself
        parts = [f"{plan.prompt_tokens:,} tokens"] if known else []
        parts += [f"{event.fraction:.0%}"] if isinstance(event, Reading) else []
        return f"{shown_name(self._reading[0])} reads the prompt{': ' if parts else ''}{', '.join(parts)}"

    def _closing(self) -> str:
        outcomes = self.summary.outcomes.values()
        if not outcomes:
            return "Stopped before anything ran."
        if any(outcome.error for outcome in outcomes):
            return "Finished, with a failure: see its text."
        if not all(outcome.reason or outcome.error for outcome in outcomes):
            return "Cut short: a text is not finished."
        stopped = any(outcome.reason == "stopped" for outcome in outcomes)
        return "Stopped." if stopped else "Finished."

    def _final(self) -> dict:
        said = verdict(self.summary, self.cpu)
        found = {
            "state": "done",
            "fraction": None,
            "headline": said.headline,
            "details": list(said.details),
        }
        if len(self.labels) > 1 and all(self._tokens[:2]):
            pair = self._tokens[:2]
            served = any(is_served(label) for label in self.labels[:2])
            compared = diff_tokens(*(map(words_of, pair) if served else pair))
            pieces = [self._ended(index, pieces) for index, pieces in enumerate(compared["pieces"])]
            found |= {"pieces": pieces + [None] * (len(self.labels) - 2), "first": compared["first"]}
        return found

    def _ended(self, index: int, pieces: list[list[str]]) -> list[list[str]]:
        """The pieces of a text with what came after its last token: the rest of an incomplete character."""
        ending = self._texts[index][sum(len(text) for text, _ in pieces) :]
        return [*pieces, [ending, SAME]] if ending else pieces


def recording_of(run: Run, number: str, *, example: bool = False) -> dict:
    """A saved run as a value that the browser plays. Raises UserError for one whose contestants cannot be shown."""
    settings, environment, pace = run.settings, run.environment, Pace()
    machine, day = environment.get("device_name", "an unknown device"), environment.get("date", "an unknown day")
    view = CompareView(
        labels_of(settings), number, str(settings.get("device", "cpu")), asked_of(settings),
        f"Recording, made on {machine} on {str(day)[:10]}", str(environment.get("cpu_capability", "")), pace,
    )  # fmt: skip
    return recorded(view.updates(pace.events(run)), pace) | ({"example": True} if example else {})


def recording_title(path: Path) -> str:
    """A saved run in a list: its methods and its machine, from the first line of its file."""
    with path.open(encoding="utf-8") as lines:
        run = Run.from_lines([next(lines, "")], name=path.name)
    methods = " and ".join(map(shown_name, labels_of(run.settings)))
    return f"{methods}, on {run.environment.get('device_name', 'an unknown device')}"


def asked_of(settings: Mapping) -> dict:
    """What a run answers, from its settings: `prompt`, and `settings` in one line."""
    sampling = settings.get("sampling") or {}
    methods = " and ".join(map(shown_name, settings["contestants"]))
    length = f" · up to {sampling['max_new_tokens']} tokens" if "max_new_tokens" in sampling else ""
    drawn = f" · temperature {sampling['temperature']:g}" if sampling.get("temperature") else ""
    title = model_title(str(settings.get("model", "an unknown model")))
    return {"prompt": str(settings.get("prompt", "")), "settings": f"{title} · {methods}{length}{drawn}"}


def arithmetic(label: str, device: str, loop: str = "hf", cpu: str = "") -> str:
    """What a contestant stores and multiplies in; empty for a method this version does not know (old recordings)."""
    try:
        found = entrant(label)
        return found.method.arithmetic(device, loop, cpu) if isinstance(found, Contestant) else OVER_HTTP
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
