"""A recorded run as one value that a browser plays by itself: the first picture, then frames of what changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmq.events import Event, Run

GROWING = ("texts", "samples")  # of these a frame holds what was added


class Pace:
    """A clock that nobody waits for: sleeping moves it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def events(self, run: Run) -> Iterator[Event]:
        """The events of `run`, each at the time at which a replay shows it."""
        return run.replay(self.sleep, self)


def recorded(values: Iterable[dict], pace: Pace) -> dict:
    """The first of `values` with `frames`: `at` (seconds), `set` (keys that changed), `texts` and `samples` (added)."""
    frames: list[dict] = []
    first = before = None
    for value in values:
        if before is None:
            first = value
        else:
            frames.append({"at": round(pace.now, 2), **_changes(before, value)})
        before = value
    return {**(first or {}), "frames": frames}


def _changes(before: dict, after: dict) -> dict:
    changed = {key: value for key, value in after.items() if key not in GROWING and before.get(key) != value}
    added = [text[len(old) :] for old, text in zip(before["texts"], after["texts"], strict=True)]
    return {"set": changed, "texts": added, "samples": after["samples"][len(before["samples"]) :]}
