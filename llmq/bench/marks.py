"""Which step of a computation took how long, by the device's own clock: CUDA events, or the host's clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

TRIED_MARKS = 1000


class Clock(Protocol):
    """`now` marks a moment, which costs what `Marks.cost` finds; `settle` waits until all of them have come."""

    def now(self) -> Any: ...
    def seconds(self, first: Any, last: Any) -> float: ...
    def settle(self) -> None: ...


class HostClock:
    """Of a device that has computed what was asked when the call returns."""

    now = staticmethod(time.perf_counter)

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def settle(self) -> None:
        """There is nothing to wait for."""


class EventClock:
    """A moment is an event in the stream: it has come when all that was launched before it is done. After `settle` the
    same events are used again."""

    def __init__(self, device: str):
        import torch

        self._cuda, self._stream = torch.cuda, torch.cuda.current_stream(device)
        self._events, self._used = [], 0

    def now(self):
        if self._used == len(self._events):
            self._events.append(self._cuda.Event(enable_timing=True))
        event = self._events[self._used]
        self._used += 1
        event.record(self._stream)
        return event

    def seconds(self, first, last) -> float:
        return first.elapsed_time(last) / 1000

    def settle(self) -> None:
        self._stream.synchronize()
        self._used = 0


def clock_of(device: str) -> Clock:
    return EventClock(device) if device.startswith("cuda") else HostClock()


class Marks:
    """Called with the name of a step as it begins, which ends the one before. `cost`: seconds of a mark, at first of
    one that follows another; among other work it meets cold caches and takes about twice as long (`reprice`)."""

    def __init__(self, clock: Clock):
        self._clock, self._steps, self._moments = clock, [], []
        self._calls, self._left_out = 0, None
        for _ in range(2):  # the first time events are made
            self.cost = 0.0
            self.cost = self.took(lambda: [self("") for _ in range(TRIED_MARKS)])[""] / (TRIED_MARKS + 1)

    def __call__(self, step: str) -> None:
        self._calls += 1
        if self._calls % 2 != self._left_out:
            self._mark(step)

    def _mark(self, step: str) -> None:
        self._steps.append(step)
        self._moments.append(self._clock.now())

    def reprice(self, work: Callable[[], dict[str, float]], times: int) -> None:
        """Set `cost` to what a mark takes inside `work`, which is `took` of something that marks: how much sooner it is
        done without every second mark, and without the others. Nobody asks what it takes without any."""
        found = []
        for _ in range(times):
            self.cost, self._calls = 0.0, 0
            complete, marked = sum(work().values()), self._calls
            sooner = [complete - self._lacking(work, left_out) for left_out in (0, 1)]
            found.append(sum(sooner) / marked)
        self.cost = max(0.0, statistics.median(found))

    def _lacking(self, work: Callable[[], dict[str, float]], left_out: int) -> float:
        """Seconds of `work` without the marks whose number is even (0) or odd (1)."""
        self._calls, self._left_out = 0, left_out
        try:
            return sum(work().values())
        finally:
            self._left_out = None

    def took(self, work: Callable[[], object], first: str = "") -> dict[str, float]:
        """Do `work`, whose first step is `first`; the seconds of each step, less what marking it cost."""
        self._clock.settle()
        self._mark(first)
        work()
        self._mark("")
        self._clock.settle()
        found: dict[str, float] = {}
        for step, begun, ended in zip(self._steps, self._moments, self._moments[1:], strict=False):
            found[step] = found.get(step, 0.0) + self._clock.seconds(begun, ended) - self.cost
        self._steps, self._moments = [], []
        return found


def counted(device: str, work: Callable[[], object]) -> dict[str, float | None]:
    """How often the host waits for the GPU during `work`, how many kernels it launches, and the seconds that these
    compute; None on a CPU, which has none of it, and where the profiler sees no kernel."""
    found = dict.fromkeys(("host_syncs", "kernel_launches", "kernel_seconds"))
    if not device.startswith("cuda"):
        return found
    found["host_syncs"] = _host_syncs(device, work)
    if seconds := _kernel_seconds(device, work):
        found |= {"kernel_launches": len(seconds), "kernel_seconds": sum(seconds)}
    return found


def _host_syncs(device: str, work: Callable[[], object]) -> int:
    """Warnings of torch about calls that wait."""
    import warnings

    import torch

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing" in str(warning.message) for warning in told)


def _kernel_seconds(device: str, work: Callable[[], object]) -> list[float]:
    """Of each that ran on the GPU, without copies and fills of memory."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize(device)
    ran = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
    return [event.time_range.elapsed_us() / 1e6 for event in ran if not event.name.startswith(("Memcpy", "Memset"))]
