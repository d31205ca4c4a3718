"""What the server holds for its pages between events: how to run and stop a job, and what was found. No gradio."""

from __future__ import annotations

import itertools
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from llmq.cache import sweep, workplace
from llmq.classroom.classes import Classes
from llmq.machine.door import Question
from llmq.machine.jobs import Jobs
from llmq.ui.shell.access import ANYBODY, Access

KEPT_FINDINGS = 32  # outlier reports and readings stay on the server; the browser gets pictures of them
MOST_FILE_BYTES = 1_000_000_000  # of what visitors uploaded and may download
FOLDER = "llmq-server-"  # what folders of servers begin with
KEPT_RECORDINGS = 64  # of runs whose page has yet to ask for them


@dataclass
class AppState:
    """What the tabs need, one object for all visitors: how to run and stop, what to offer first, files for download."""

    run: Callable[[Question, str], Iterator[object]]
    stop: Callable[[str], int]
    device: str
    device_label: str
    access: Access = ANYBODY
    frames: tuple[str, ...] = ()  # sites that may show the page, besides those that every server's may
    model: str = "demo"
    model_reason: str = ""
    unable: str = ""  # why nothing can run here, where that is so
    methods: tuple[str, ...] = ("fp16", "bnb-int8")
    recorded_runs: dict[str, Path] = field(default_factory=dict)
    recorded_answers: dict[str, Path] = field(default_factory=dict)  # of labs, by kind
    opened: threading.Event = field(default_factory=threading.Event)  # set once somebody has opened the page
    classes: Classes | None = None  # of the lesson, where the server has them
    jobs: Jobs | None = None  # those that `run` runs, where the server is to watch over them
    devices: str = ""  # of a comparison, which may have several; `device` is their first

    def __post_init__(self):
        self.devices = self.devices or self.device
        self._numbers = itertools.count(1)
        sweep(Path(tempfile.gettempdir()), FOLDER)
        opened = ExitStack()
        self.folder = opened.enter_context(workplace(Path(tempfile.gettempdir()), FOLDER))
        self.close = weakref.finalize(self, opened.close)  # at the end of the process at the latest
        self._findings: OrderedDict[str, object] = OrderedDict()
        self._recordings: OrderedDict[str, Path] = OrderedDict()

    def next_run(self) -> str:
        """A name no other run of this server has."""
        return f"run-{next(self._numbers)}"

    def download_path(self, name: str) -> Path:
        """Where a file for download is written."""
        self.prune()
        return self.folder / name

    def prune(self) -> None:
        """Delete the oldest files of visitors until MOST_FILE_BYTES are left at most."""
        found = []
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # another visitor's file, or Gradio's, may go meanwhile
                found += [(path, path.stat())] if path.is_file() else []
        total = sum(stat.st_size for _, stat in found)
        for path, stat in sorted(found, key=lambda pair: pair[1].st_mtime):
            if total <= MOST_FILE_BYTES:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size

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
