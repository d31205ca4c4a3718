"""How long a step took, by the clock of the device it ran on."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmq.devices import first, parts


class HostTimer:
    """Seconds between entering and leaving; `growth_bytes` stays 0: a CPU has no allocator to ask."""

    growth_bytes = peak_bytes = 0

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock

    def __enter__(self):
        self._start = self._clock()

    def __exit__(self, *_):
        self.seconds = self._clock() - self._start


def allocated_bytes(device: str) -> tuple[int, int]:
    """Return what torch's allocator has handed out on a GPU, now and at its peak. `torch.cuda.memory_allocated` lists
    a hundred figures to read one, 0.1 ms each time that a token is waited for."""
    import torch

    found = torch.cuda.memory.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
    return found["current"], found["peak"]


class CudaTimer:
    """Seconds between two CUDA events; `growth_bytes` is the allocator's peak over the level it started from. Of
    several devices the events are on the first, to which the logits come back, and the peaks are added up."""

    def __init__(self, device: str):
        import torch

        self._torch, self._device, self._all = torch, first(device), parts(device)
        with torch.cuda.device(self._device):
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __enter__(self):
        cuda = self._torch.cuda
        for one in self._all:
            cuda.synchronize(one)
            cuda.reset_peak_memory_stats(one)
        self._level = self._allocated()[0]
        self._begin.record(cuda.current_stream(self._device))

    def __exit__(self, *_):
        cuda = self._torch.cuda
        self._end.record(cuda.current_stream(self._device))
        self._end.synchronize()
        self.seconds = self._begin.elapsed_time(self._end) / 1e3
        self.peak_bytes = self._allocated()[1]
        self.growth_bytes = self.peak_bytes - self._level

    def _allocated(self) -> tuple[int, int]:
        found = [allocated_bytes(one) for one in self._all]
        return sum(now for now, _ in found), sum(peak for _, peak in found)


def timer_for(device: str, clock: Callable[[], float] = time.perf_counter) -> HostTimer | CudaTimer:
    """Return the timer of a device; `clock` returns seconds and is used on a CPU only."""
    return CudaTimer(device) if device.startswith("cuda") else HostTimer(clock)
