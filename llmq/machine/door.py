"""The machine's one door: a question waits in line, fetches and loads what it needs, and computes in the one thread.

A question is a frozen record with a `device` and `run(lease)`, which yields events, progress and results and knows no
lock. What it yields reaches the caller one item at a time; closing the stream or setting `stop` ends it and gives the
device back. Running out of memory is caught and worded here, for every question alike, and a question that hangs is
given up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from llmq import memory, telemetry
from llmq.contestant import Contestant
from llmq.engine.base import Engine, Interrupted
from llmq.engine.loading import Key, loading_bytes, needs_statistics, statistics_file
from llmq.errors import OutOfMemory, is_allocation_failure
from llmq.events import Event, Loaded, Loading, Progress, Waiting
from llmq.machine.allocator import let_segments_grow
from llmq.machine.pool import Pool
from llmq.machine.queue import DeviceQueue, Turn
from llmq.machine.thread import ComputeThread, Stuck
from llmq.methods import METHODS, Method
from llmq.methods.calibrate import Calibration, save_statistics
from llmq.methods.coverage import coverage
from llmq.methods.swap import telling
from llmq.models.opening import Model, describe_model, open_model
from llmq.models.reference_text import CALIBRATION, windows
from llmq.servers.reach import ANYWHERE, Reach

if TYPE_CHECKING:
    from llmq.memory import Prediction

POLL_SECONDS = 0.5  # between two looks of somebody who waits
ADVICE = "Choose a smaller model, or a shorter prompt and answer."


class Question(Protocol):
    """What the door lets in. `device`: a torch device; `patient`: waits while somebody else computes."""

    device: str
    patient: bool

    def run(self, lease: Lease) -> Iterator[object]:
        """Yield events, progress and results. Raises UserError for what a person should read."""


class Stop(Protocol):
    """What ends a question; a `threading.Event`, or what stands for one in another process."""

    def is_set(self) -> bool: ...
    def set(self) -> None: ...


class Machine:
    """The queue, the thread and the loaded engines of one process. `load` makes an engine; tests pass their own.
    `open` finds the model of a name for every question, `reach` says which servers may be asked."""

    open: Callable[..., Model] = staticmethod(open_model)
    reach: Reach = ANYWHERE

    def __init__(
        self,
        load: Callable[[Key], Engine] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        thread: ComputeThread | None = None,
    ):
        let_segments_grow()
        self.pool, self.queue, self.clock = Pool(load, clock), DeviceQueue(), clock
        self.thread = thread or ComputeThread()

    def run(self, question: Question, stop: Stop | None = None, address: str = "") -> Iterator[object]:
        """Yield `Waiting` until it is the question's turn, then all that it yields; nothing more once `stop` is set.
        `address`: where it comes from, for a line that is fair.

        The first event comes before any waiting, so that whoever listens can already stop it.
        """
        stop = stop or threading.Event()
        with self.queue.turn(address) as turn:
            if (turn.position == 0 or getattr(question, "patient", True)) and (yield from self._wait(turn, stop)):
                yield from self.compute(question, stop)

    def compute(self, question: Question, stop: Stop) -> Iterator[object]:
        """Yield what a question whose turn it is yields. Raises Stuck when it hangs: what was loaded is let go then."""
        self.pool.begin()
        lease = Lease(self, question.device, _WatchedStop(stop, self.thread))
        try:
            yield from self.thread.run(self._answer(question, lease), lease.aside)
        except Stuck:
            hung, self.pool = self.pool, self.pool.emptied()
            hung.forget()
            raise

    def _wait(self, turn: Turn, stop: Stop) -> Generator[Waiting, None, bool]:
        """Tell the position whenever it has changed. Returns False when stopped before it is the question's turn."""
        started, told = self.clock(), turn.position
        yield Waiting(seconds=0.0, position=told)
        while not turn.wait(POLL_SECONDS, stop.is_set) and not stop.is_set():
            if (position := turn.position) != told:
                told = position
                yield Waiting(seconds=round(self.clock() - started, 1), position=position)
        return not stop.is_set()

    def _answer(self, question: Question, lease: Lease) -> Iterator[object]:
        try:
            device = lease.device
            with out_of_memory(lambda: f"out of memory on {device}: {_free(telemetry.free_bytes(device))}. {ADVICE}"):
                yield from question.run(lease)
        except Interrupted:
            return
        except OutOfMemory:
            for key in lease.loaded:
                self.pool.drop(key)
            raise


@dataclass(frozen=True)
class _WatchedStop:
    """A stop that takes being asked for a sign of life: a long prefill asks at every layer."""

    stop: Stop
    thread: ComputeThread

    def is_set(self) -> bool:
        self.thread.alive()
        return self.stop.is_set()

    def set(self) -> None:
        self.stop.set()


class Lease:
    """The device while a question holds it: what the question opens, loads and asks for."""

    def __init__(self, machine: Machine, device: str, stop: Stop):
        self.device, self.stop, self.pool, self.clock = device, stop, machine.pool, machine.clock
        self.find, self.reach = machine.open, machine.reach
        self.loaded: list[Key] = []  # engines that this question brought into memory
        self.aside: SimpleQueue = SimpleQueue()  # what is to be heard before the next item, while that is being made

    def check(self) -> None:
        """Raise Interrupted when the question was stopped."""
        if self.stop.is_set():
            raise Interrupted

    def progress(self, message: str, fraction: float | None = None) -> Progress:
        """Progress to yield before a piece of work; raises Interrupted when the question was stopped."""
        self.check()
        return Progress(message, fraction)

    def open(self, name: str, *, random_weights: bool = False) -> Generator[Loading, None, Model]:
        """Open a model, fetching or converting what is missing. Raises Interrupted when stopped, UserError else."""
        model = self.find(name, random_weights=random_weights)
        for progress in model.prepare():
            self.check()
            yield Loading(contestant="", message=f"{progress.message} · {progress.fraction:.0%}")
        self.check()
        return model

    def describe(self, name: str) -> Model:
        """A model to count and not to run, of those that may be opened: no weights are fetched."""
        described, fetching = describe_model(name), self.find(name).source.fetching
        return replace(described, source=replace(described.source, fetching=fetching))

    def load(
        self, key: Key, contestant: Contestant, prediction: Prediction | None = None, note: str = ""
    ) -> Generator[Event, None, Engine]:
        """Bring an engine into memory, or find it there. Raises OutOfMemory with predicted and free bytes before
        anything is loaded that will not fit."""
        self.check()
        yield from self.calibrate(key)
        yield Loading(contestant=contestant.label, message=note)
        resident = key in self.pool
        if not resident:
            prediction = prediction or predicted(key, tokens=512)
            self.pool.make_room(key.device, max(prediction.weights + prediction.scales, prediction.loading))
            free = telemetry.free_bytes(key.device)
            if prediction.most > free:
                raise OutOfMemory(shortage(contestant.label, prediction.most, free))
            self.loaded.append(key)
        with out_of_memory(lambda: shortage(contestant.label, prediction.most, telemetry.free_bytes(key.device))):
            engine, seconds = self._got(key, contestant.method, contestant.label)
        yield Loaded(
            contestant=contestant.label,
            weight_bytes=engine.weight_bytes,
            seconds=seconds,
            resident=resident,
            engine=engine.name,
            coverage=coverage(engine.model).shares,
        )
        return engine

    def get(self, key: Key, method: Method) -> Engine:
        """An engine without events on the way; what a calibrated method still needs is collected first."""
        for _ in self.calibrate(key):
            self.check()
        return self._got(key, method)[0]

    def _got(self, key: Key, method: Method | None = None, label: str = "") -> tuple[Engine, float]:
        """What the pool has or loads. Whoever waits for slow layers hears of them; a stop is heard between two."""
        heard = self.clock()

        def told(share: float) -> None:
            nonlocal heard
            self.check()
            if label and self.clock() - heard >= POLL_SECONDS:
                heard = self.clock()
                self.aside.put(Loading(contestant=label, message=f"quantizing · {share:.0%}"))

        with telling(told):
            return self.pool.get(key, method)

    def calibrate(self, key: Key) -> Generator[Progress, None, None]:
        """Collect the statistics that a calibrated method needs of this checkpoint, once, in passes over the text for
        it by the dense model of the method's type."""
        if not needs_statistics(key) or (file := statistics_file(key)).exists():
            return
        import torch

        dense = next(method for method in METHODS.values() if method.dense and method.dtype == key.method.dtype)
        wanted, what = Key.of(key.model, dense, key.device), f"calibrating {key.method.name}"
        texts = windows(key.model, key.method.calibration_windows, CALIBRATION)
        yield self.progress(what, 0.0)
        resident = wanted in self.pool
        engine, _ = self._got(wanted)
        try:
            with Calibration(engine.model, key.method) as found, torch.inference_mode():
                for number, ids in enumerate(texts, 1):
                    engine.logits(ids, self.stop.is_set)
                    yield self.progress(f"{what}: window {number} of {len(texts)}", number / len(texts))
            save_statistics(found.statistics, file)
        finally:
            del engine
            if not resident:
                self.pool.drop(wanted)


def predicted(key: Key, **asked) -> Prediction:
    """What an engine will need, and while it loads; `asked` as `memory.predict` takes it."""
    found = memory.predict(key.model.shape, key.method, **asked, loop=key.loop, device=key.device)
    return replace(found, loading=loading_bytes(key))


@contextmanager
def out_of_memory(describe: Callable[[], str] = lambda: f"out of memory. {ADVICE}") -> Iterator[None]:
    """Turn whatever is raised inside when memory runs out into OutOfMemory with `describe()` as its message.

    The failed call's frames hold the tensors that did not fit, so they are let go before the message is made.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not is_allocation_failure(error):
            raise
        error.__traceback__ = None
        raise OutOfMemory(describe()) from None


def shortage(what: str, predicted: int, free: int) -> str:
    """What is missing, in bytes."""
    needed = f"{what} needs about {predicted / 1e9:.2f} GB ({predicted:,} bytes predicted)"
    return f"out of memory: {needed} and {_free(free)}. {ADVICE}"


def _free(free: int) -> str:
    return f"{free / 1e9:.2f} GB ({free:,} bytes) are free"
