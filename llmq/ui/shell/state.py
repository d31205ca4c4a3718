"""What the server holds for its pages between events: who is running what, and how to stop it. No gradio.

A job runs through one function, `run`, given by the composition root: on a shared-GPU host that function is the one
wrapped so that everything touching the GPU happens inside it.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llmq.machine.door import Machine, Question
from llmq.ui.shell.access import ANYBODY, Access

MAX_SECONDS = 900.0  # one visitor's comparison may hold the device this long, a browser's or a program's
KEPT_FINDINGS = 32  # outlier reports and readings stay on the server; the browser gets pictures of them
KEPT_FILES = 256  # written for download; Gradio copies a file when it offers it
KEPT_RECORDINGS = 64  # of runs whose page has yet to ask for them


class Jobs:
    """Runs jobs and stops them by name. One object serves every visitor."""

    def __init__(self, machine: Machine | None = None):
        self.machine = machine or Machine()
        self._stops: dict[str, set[threading.Event]] = {}
        self._lock = threading.Lock()

    def run(self, job: Question, owner: str) -> Iterator[object]:
        """Run `job` for `owner` (a browser session); `stop(owner)` ends it."""
        with self._stoppable(owner) as stop:
            yield from self.machine.run(job, stop)

    def stop(self, owner: str) -> int:
        """Ask every job of `owner` to end; how many there were. Asking twice is harmless."""
        with self._lock:
            stops = list(self._stops.get(owner, ()))
        for stop in stops:
            stop.set()
        return len(stops)

    @contextmanager
    def _stoppable(self, owner: str) -> Iterator[threading.Event]:
        stop = threading.Event()
        with self._lock:
            self._stops.setdefault(owner, set()).add(stop)
        try:
            yield stop
        finally:
            with self._lock:
                self._stops[owner].discard(stop)
                if not self._stops[owner]:
                    del self._stops[owner]


@dataclass
class AppState:
    """What the tabs need, one object for all visitors: how to run and stop, what to offer first, files for download."""

    run: Callable[[Question, str], Iterator[object]]
    stop: Callable[[str], int]
    device: str
    device_label: str
    access: Access = ANYBODY
    model: str = "demo"
    model_reason: str = ""
    methods: tuple[str, ...] = ("fp16", "bnb-int8")
    recorded_runs: dict[str, Path] = field(default_factory=dict)
    recorded_answers: dict[str, Path] = field(default_factory=dict)  # of labs, by kind

    def __post_init__(self):
        self._numbers = itertools.count(1)
        self._downloads = tempfile.TemporaryDirectory(prefix="llmq-downloads-")
        self._files: deque[Path] = deque()
        self._findings: OrderedDict[str, object] = OrderedDict()
        self._recordings: OrderedDict[str, Path] = OrderedDict()

    def next_run(self) -> str:
        """A name no other run of this server has."""
        return f"run-{next(self._numbers)}"

    def download_path(self, name: str) -> Path:
        """Where a file for download is written; the oldest of many are deleted."""
        self._files.append(Path(self._downloads.name) / name)
        while len(self._files) > KEPT_FILES:
            self._files.popleft().unlink(missing_ok=True)
        return self._files[-1]

    def keep(self, finding: object) -> str:
        """Keep a report or a reading for later questions; the oldest of many are forgotten."""
        key = self.next_run()
        self._findings[key] = finding
        while len(self._findings) > KEPT_FINDINGS:
            self._findings.popitem(last=False)
        return key

    def kept(self, key: str | None) -> object | None:
        """What was kept under `key`; None when it is forgotten."""
        return self._findings.get(key or "")

    def keep_recording(self, owner: str, path: Path) -> None:
        """Keep where `owner`'s last run is saved, until the page takes it."""
        self._recordings[owner] = path
        while len(self._recordings) > KEPT_RECORDINGS:
            self._recordings.popitem(last=False)

    def take_recording(self, owner: str) -> Path | None:
        return self._recordings.pop(owner, None)
