"""What the live panel shows, accumulated from the event stream. Plain Python: no gradio, no torch.

Gradio sends only the difference between two values of a component, and every changed place costs a path. So samples
are rows (one path a row; as columns they cost five times as much), their list only ever grows, numbers are rounded, and
a row that was sent is never touched again: an update costs the new rows and the changed card fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmq.contestant import shown_about, shown_name
from llmq.errors import unknown
from llmq.events import Event, Failed, Finished, Freed, Loaded, Loading, Memory, Planned, Prefilled, Waiting
from llmq.formatting import MISSING, format_bytes, format_count, format_seconds, format_speed
from llmq.summary import Outcome

SPEED_WINDOW = 16  # decode steps behind one point of the speed curve
SPACING_SECONDS = 0.15  # of kept samples; the browser draws four times a second, the machine is sampled ten times
FULL_RATE = 600  # samples kept at that spacing: the first two minutes
THEN_EVERY = 300  # after that the spacing doubles every so many kept samples
STATE_TEXT = {"waiting": "Waiting", "loading": "Loading", "prefill": "Reading", "decoding": "Writing"}
REASON_TEXT = {
    "eos": "Finished: end of text",
    "length": "Finished: token limit",
    "context": "Finished: context full",
    "time": "Finished: time limit",
    "stopped": "Stopped",
}
# Memory field -> (column, name in the legend). A sample that has any device figure shows no process memory.
DEVICE_SERIES = {
    "device_bytes": ("device", "whole device"),
    "device_process_bytes": ("device_process", "this process"),
    "allocated_bytes": ("allocated", "live tensors (torch)"),
}
PROCESS_SERIES = {"process_bytes": ("process", "whole process")}


@dataclass
class _Progress:
    """One contestant so far. `drawn`: how many of its decode steps the speed curve has seen."""

    outcome: Outcome
    arithmetic: str
    state: str = "waiting"
    state_text: str = STATE_TEXT["waiting"]
    note: str = ""
    peak_bytes: int | None = None
    drawn: int = 0

    def enter(self, state: str, *, text: str | None = None, note: str = "") -> None:
        self.state, self.state_text, self.note = state, text or STATE_TEXT[state], note

    def raise_peak(self, count: int | None) -> None:
        """At least `count`; None is not known."""
        if count is not None:
            self.peak_bytes = max(count, self.peak_bytes or 0)

    def window_speed(self) -> float | None:
        """Tokens per second over the last decode steps; None when not decoding and nothing came since the last call."""
        steps = self.outcome.step_seconds
        if len(steps) == self.drawn and not (self.state == "decoding" and steps):
            return None
        self.drawn, recent = len(steps), steps[-SPEED_WINDOW:]
        return round(len(recent) / sum(recent), 2) if sum(recent) > 0 else 0.0

    def card(self) -> dict[str, str]:
        found, tokens = self.outcome, len(self.outcome.token_ids)
        return {
            "arithmetic": self.arithmetic,
            "state": self.state,
            "state_text": self.state_text,
            "note": self.note,
            "first_token": format_seconds(found.prefill_seconds),
            "speed": format_speed(found.decode_tokens_per_second),
            "weights": format_bytes(found.weight_bytes),
            "peak": format_bytes(self.peak_bytes),
            "tokens": format_count(tokens) if tokens else MISSING,
        }


class LiveState:
    """Consumes events; `value()` is what the live panel draws.

    `contestants` maps each label of the run to its arithmetic label, in the order of the panes; `run` is any string
    that differs from the run before, and makes the panel start over.
    """

    def __init__(self, contestants: Mapping[str, str], *, run: str):
        self._run = run
        self._contestants = [{"title": shown_name(label), "about": shown_about(label)} for label in contestants]
        self._progress = {label: _Progress(Outcome(label), text) for label, text in contestants.items()}
        self._columns: dict[str, dict] = {}
        self._samples: list[list[float | None]] = []
        self._held: dict[str, float] = {}  # the peaks of samples not kept since the last kept one
        self._held_at: float | None = None
        for key, axis in (("ledger", "memory"), ("speed", "speed")):
            for index, label in enumerate(contestants):
                self._column(f"{key}{index}", shown_name(label), axis, index)

    def add(self, event: Event) -> None:
        """Take one event in. Raises BadChoice for a contestant that this run does not have."""
        match event:
            case Memory():
                self._sample(event)
            case Waiting() | Planned():
                self._wait(event)
            case _:
                self._progress_event(event)

    def describe(self, contestant: str, arithmetic: str) -> None:
        """Another arithmetic label, when it is known which loop the contestant runs through."""
        self._progress[contestant].arithmetic = arithmetic

    def value(self) -> dict:
        """A JSON-able snapshot; its lists are copies, because Gradio compares it with the one before.

        A row of `samples` is the time in seconds, then one figure for each of `columns`: memory in MB (1e6 bytes),
        speed in tokens per second, None where there is nothing to draw. Early rows may be shorter: a column that comes
        later has no figure there. `cards` holds finished text.
        """
        return {
            "run": self._run,
            "memory": self.memory_label,
            "contestants": list(self._contestants),
            "columns": list(self._columns.values()),
            "samples": list(self._samples),
            "cards": [progress.card() for progress in self._progress.values()],
        }

    @property
    def memory_label(self) -> str:
        """'VRAM' on a GPU, 'Process memory' elsewhere, 'Memory' until a sample says which."""
        if any(key in self._columns for key, _ in DEVICE_SERIES.values()):
            return "VRAM"
        return "Process memory" if "process" in self._columns else "Memory"

    def _wait(self, event: Waiting | Planned) -> None:
        note = _waiting_note(event) if isinstance(event, Waiting) else ""
        for progress in self._progress.values():
            progress.enter("waiting", note=note)

    def _progress_event(self, event: Event) -> None:
        if event.contestant not in self._progress:
            raise unknown("contestant", event.contestant, self._progress)
        progress = self._progress[event.contestant]
        progress.outcome.add(event)
        match event:
            case Loading():
                progress.enter("loading", note=event.message)
            case Loaded():
                progress.enter("prefill")
            case Prefilled():
                progress.enter("decoding")
            case Finished():
                self._keep()
                progress.raise_peak(event.peak_bytes)
                said = REASON_TEXT.get(event.reason, f"Finished: {event.reason}")
                progress.enter("finished", text=said, note=_cache_note(event))
            case Failed():
                progress.enter("failed", text="Failed", note=event.message)
            case Freed() if progress.state != "failed":  # a failure's message is worth more
                progress.note = _freed_note(event)

    def _sample(self, memory: Memory) -> None:
        """Keep this sample, or hold it until the spacing is reached: a kept sample has the peaks of those held."""
        for label, bytes_by_kind in memory.ledger.items():
            if label in self._progress:
                self._progress[label].raise_peak(sum(bytes_by_kind.values()))
        self._held, self._held_at = _highest(self._held, self._memory_row(memory)), round(memory.at, 2)
        if not self._samples or self._held_at - self._samples[-1][0] >= _spacing(len(self._samples)):
            self._keep()

    def _keep(self) -> None:
        if self._held_at is None:
            return
        row = {**self._held, **self._speed_row()}
        self._samples.append([self._held_at, *(row.get(key) for key in self._columns)])
        self._held, self._held_at = {}, None

    def _memory_row(self, memory: Memory) -> dict[str, float]:
        """The sample's memory figures by column, in MB; a machine's figure gets its column when first seen."""
        found = {}
        for table in (DEVICE_SERIES, PROCESS_SERIES):
            for name, (key, text) in table.items():
                if getattr(memory, name) is not None:
                    self._column(key, text, "memory")
                    found[key] = _megabytes(getattr(memory, name))
            if found:
                break
        for index, label in enumerate(self._progress):
            if label in memory.ledger:
                found[f"ledger{index}"] = _megabytes(sum(memory.ledger[label].values()))
        return found

    def _speed_row(self) -> dict[str, float | None]:
        return {f"speed{index}": progress.window_speed() for index, progress in enumerate(self._progress.values())}

    def _column(self, key: str, name: str, axis: str, contestant: int | None = None) -> None:
        """Columns keep the order of their first appearance, which is the order of a row's figures."""
        self._columns.setdefault(key, {"key": key, "name": name, "axis": axis, "contestant": contestant})


def _megabytes(count: int) -> float:
    return round(count / 1e6, 1)


def _spacing(kept: int) -> float:
    """Seconds from the last of `kept` samples to the next: doubled ever more rarely, so a long run stays drawable."""
    return SPACING_SECONDS * (1 if kept < FULL_RATE else 2 ** ((kept - FULL_RATE) // THEN_EVERY + 1))


def _highest(held: Mapping[str, float], new: Mapping[str, float]) -> dict[str, float]:
    return {**held, **{key: max(held.get(key, value), value) for key, value in new.items()}}


def _waiting_note(event: Waiting) -> str:
    return f"runs in front of this one: {event.position}" if event.position else "another run holds the device"


def _cache_note(event: Finished) -> str:
    return "" if event.cache_share is None else f"{event.cache_share:.1%} of the server's KV cache was in use"


def _freed_note(event: Freed) -> str:
    if event.verified:
        return f"memory freed: {format_bytes(event.freed_bytes)}"
    return f"only {format_bytes(event.freed_bytes)} of {format_bytes(event.expected_bytes)} came back"
