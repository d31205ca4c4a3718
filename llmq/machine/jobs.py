"""Who may ask the machine, for how long, and who still listens: one object for every visitor of a server.

Admission is apart from computing: a job is let in, waits in line and is stopped here, wherever it computes. One thread
looks at all jobs now and then, and ends those whose time is over or whom nobody hears.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from llmq.errors import Ended, UserError
from llmq.events import Waiting
from llmq.machine.door import Machine, Question, Stop

LOOK_SECONDS = 0.25  # between two looks at all jobs
BY_OWNER = "the owner of this server ended it"
BY_END = "the server is ending"
UNHEARD = "nobody listened to the answer"


@dataclass(frozen=True)
class Limits:
    """What the visitors of one server may ask of it. A job alone has `seconds` of the device; with n others in line
    that many divided by n + 1, but at least `least_seconds`."""

    pending: int = 96
    pending_an_address: int = 32  # a class may sit behind one
    seconds: float = 900.0
    least_seconds: float = 120.0
    unheard_seconds: float = 15.0  # from the question until somebody listens to the answer
    left_seconds: float = 0.5  # after whoever listened has gone: no stream of answers is opened again

    def seconds_beside(self, others: int) -> float:
        return max(self.least_seconds, self.seconds / (1 + others))


class Visitor(str):
    """The session that asks; `address` is where it asks from, '' where nobody can tell."""

    address = ""

    @classmethod
    def of(cls, session: str, address: str) -> Visitor:
        visitor = cls(session)
        visitor.address = address
        return visitor


class Busy(UserError):
    """A question that is not let in now."""


class Listeners:
    """How many listen to each session's answers. Without a server that tells, everybody counts as listening, and so
    does a call without a session, which is answered where it is made."""

    def __init__(self):
        self._count: Counter[str] = Counter()
        self._changed = threading.Condition()
        self.told = False

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        self._add(session, 1)
        try:
            yield
        finally:
            self._add(session, -1)

    def hear(self, session: str) -> bool:
        return not (self.told and session) or self._count[session] > 0

    def wait(self, session: str, seconds: float) -> bool:
        """Wait for somebody to listen; whether somebody does."""
        with self._changed:
            return self._changed.wait_for(lambda: self.hear(session), seconds)

    def _add(self, session: str, number: int) -> None:
        with self._changed:
            self._count[session] += number
            self._count += Counter()  # drops those with none left
            self._changed.notify_all()


@dataclass(eq=False)
class Job:
    """One question and where it stands. `asked`, `started` and `heard` are times; `ended` says why it was ended."""

    number: int
    question: Question
    owner: str
    asked: float
    stop: Stop = field(default_factory=threading.Event)
    started: float | None = None
    heard: float | None = None
    ended: str = ""

    @property
    def address(self) -> str:
        return getattr(self.owner, "address", "")

    @property
    def patient(self) -> bool:
        return getattr(self.question, "patient", True)

    def end(self, why: str) -> None:
        self.ended = self.ended or why
        self.stop.set()


class Jobs:
    """Lets jobs in, runs them and stops them by name. One object serves every visitor."""

    def __init__(
        self,
        machine: Machine | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.machine, self.limits, self.clock = machine or Machine(), limits or Limits(), clock
        self.listeners = Listeners()
        self._jobs: list[Job] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._closed = False

    def __iter__(self) -> Iterator[Job]:
        with self._lock:
            return iter(list(self._jobs))

    def run(self, question: Question, owner: str) -> Iterator[object]:
        """Run a question for `owner` (a browser session); `stop(owner)` ends it. Raises Busy where it is not let in,
        Ended after its last item where it was ended early."""
        with self._admitted(question, owner) as job:
            if not self.listeners.hear(owner):
                yield Waiting(seconds=0.0, position=self.machine.queue.waiting)
            if self._heard(job):
                with closing(self.machine.run(question, job.stop, job.address)) as items:
                    for item in items:
                        if job.started is None and not isinstance(item, Waiting):
                            job.started = self.clock()
                        yield item
        if job.ended:
            raise Ended(job.ended)

    def stop(self, owner: str) -> int:
        """Ask every job of `owner` to end; how many there were. Asking twice is harmless."""
        return self._end((job for job in self if job.owner == owner), "")

    def end(self, number: int, why: str = BY_OWNER) -> int:
        """End one job, whoever's it is, and say why; how many there were."""
        return self._end((job for job in self if job.number == number), why)

    def close(self) -> None:
        """Let nobody in any more, and end whatever runs."""
        self._closed = True
        self._end(self, BY_END)

    def look(self) -> None:
        """End the jobs whose time is over, and those whom nobody hears."""
        now, others = self.clock(), max(0, self.machine.queue.waiting - 1)
        for job in self:
            if job.started is not None and now - job.started > (most := self.limits.seconds_beside(others)):
                job.end(f"its {most:.0f} seconds were over" + (", and others wait" if others > 0 else ""))
            if self.listeners.hear(job.owner):
                job.heard = now
            elif job.heard is not None and now - job.heard > self.limits.left_seconds:
                job.end(UNHEARD)
        self.machine.queue.wake()

    def _end(self, jobs: Iterable[Job], why: str) -> int:
        ended = [job.end(why) for job in jobs]
        self.machine.queue.wake()
        return len(ended)

    def _heard(self, job: Job) -> bool:
        """Wait until somebody listens to the answer: who asks and goes away never has the device."""
        until = job.asked + self.limits.unheard_seconds
        while not job.stop.is_set() and not self.listeners.wait(job.owner, LOOK_SECONDS):
            if self.clock() > until:
                job.end(f"{UNHEARD} within {self.limits.unheard_seconds:.0f} seconds")
        job.heard = self.clock()
        return not job.stop.is_set()

    @contextmanager
    def _admitted(self, question: Question, owner: str) -> Iterator[Job]:
        job = Job(next(self._numbers), question, owner, self.clock())
        with self._lock:
            if job.patient:
                self._check(job)
            self._jobs.append(job)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="llmq-jobs", daemon=True)
                self._watcher.start()
        try:
            yield job
        finally:
            with self._lock:
                self._jobs.remove(job)

    def _check(self, job: Job) -> None:
        """Raise Busy where the door is shut. A job that was asked to stop is as good as gone."""
        pending = [other for other in self._jobs if other.patient and not other.stop.is_set()]
        if self._closed:
            raise Busy(BY_END)
        if any(other.owner == job.owner for other in pending):
            raise Busy("your question before this one is still going on; stop it, or wait until it is answered")
        if sum(other.address == job.address for other in pending) >= self.limits.pending_an_address:
            raise Busy(f"{self.limits.pending_an_address} questions from your network wait already; ask again soon")
        if len(pending) >= self.limits.pending:
            raise Busy(f"{len(pending)} questions wait already; ask again in a minute")

    def _watch(self) -> None:
        """Look at the jobs for as long as there are any."""
        while True:
            time.sleep(LOOK_SECONDS)
            with self._lock:
                if not self._jobs:
                    self._watcher = None
                    return
            self.look()
