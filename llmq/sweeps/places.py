"""Where the cells of a sweep run: processes of this machine, one for each device, or those of a Ray cluster.

A cell is a process of its own: what kills it, or leaves memory behind, is over with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from llmq.errors import UserError

LONGEST_REASON = 500  # characters of why a cell failed
RAY_ADVICE = "Ray is not installed; install it with: pip install 'ray>=2.40'"


@dataclass(frozen=True)
class Ended:
    """A cell that has run: its answer as JSON, or why there is none."""

    answer: str = ""
    reason: str = ""


@dataclass
class Processes:
    """Those of this machine: one at a time on each of `devices`."""

    devices: Sequence[str]
    _running: set[subprocess.Popen] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, asked: Sequence[Callable[[str], list[str]]]) -> Iterator[tuple[int, Ended]]:
        """Yield what each comes to, as soon as it is over; `asked` makes the arguments for a device. Closing this ends
        those that are running."""
        free: SimpleQueue[str] = SimpleQueue()
        for device in self.devices:
            free.put(device)

        def one(arguments: Callable[[str], list[str]]) -> Ended:
            device = free.get()
            try:
                return answer_of(arguments(device), self._started)
            finally:
                free.put(device)

        with ThreadPoolExecutor(len(self.devices)) as threads:
            numbers = {threads.submit(one, arguments): number for number, arguments in enumerate(asked)}
            try:
                yield from _as_they_end(numbers)
            finally:
                for future in numbers:
                    future.cancel()
                self._end()

    def _started(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._running.add(process)

    def _end(self) -> None:
        with self._lock:
            for process in self._running:
                with suppress(ProcessLookupError):
                    process.kill()


@dataclass(frozen=True)
class Ray:
    """The machines of a Ray cluster: that of `RAY_ADDRESS`, or of this machine where there is none. A cell takes a GPU
    of its own on `cuda`, two processors elsewhere; the package has to be installed on each."""

    device: str

    def run(self, asked: Sequence[Callable[[str], list[str]]]) -> Iterator[tuple[int, Ended]]:
        """As `Processes.run`. Raises UserError where Ray is not installed."""
        try:
            import ray
        except ImportError:
            raise UserError(RAY_ADVICE) from None
        root = str(Path(__file__).parents[2])
        needs = {"num_gpus": 1} if self.device.startswith("cuda") else {"num_cpus": 2}
        ray.init(
            address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": root}},
        )  # fmt: skip
        try:
            remote = ray.remote(**needs, max_retries=0)(answer_of)
            left = {remote.remote(arguments(self.device)): number for number, arguments in enumerate(asked)}
            while left:
                (done, *_), _ = ray.wait(list(left), num_returns=1)
                number = left.pop(done)
                try:
                    yield number, ray.get(done)
                except ray.exceptions.RayError as error:
                    yield number, Ended(reason=_short(str(error)))
        finally:
            ray.shutdown()


def answer_of(arguments: list[str], started: Callable[[subprocess.Popen], None] = lambda process: None) -> Ended:
    """Ask the command line in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="llmq-sweep-") as folder:
        file = Path(folder) / "answer.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "llmq", *arguments, "--save", str(file)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started(process)
        _, errors = process.communicate()
        if process.returncode == 0 and file.exists():
            answer = file.read_text(encoding="utf-8")
            with suppress(ValueError):
                json.loads(answer)
                return Ended(answer)
        lines = [line for line in errors.splitlines() if line.strip()]
        how = f"ended by signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        return Ended(reason=_short(lines[-1] if lines and process.returncode > 0 else how))


def _short(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON]


def _as_they_end(numbers: dict[Future, int]) -> Iterator[tuple[int, Ended]]:
    left = set(numbers)
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        for future in done:
            yield numbers[future], future.result()
