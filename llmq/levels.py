"""How much memory a process takes on a device, at a moment and at its highest during a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from llmq.telemetry import MemoryReader

NVML_PROCESS, NVML_DEVICE, RESERVED = "NVML, this process", "NVML, the whole device", "torch's reserved memory"
RESIDENT = "the process's resident size"


@dataclass(frozen=True)
class Level:
    """Bytes on a device. `process`: by what `counted` names; by torch's CUDA allocator, 0 on a CPU: what tensors asked
    it for (`requested`; it rounds up, and does not cut a block for less than 1 MB), and what it holds (`reserved`)."""

    process: int
    counted: str
    requested: int = 0
    reserved: int = 0

    @classmethod
    def of(cls, device: str) -> Level:
        if not device.startswith("cuda"):
            return cls(*process_of(MemoryReader(device)(), device))
        import torch

        torch.cuda.synchronize(device)
        requested = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)  # nothing before the first
        reserved = torch.cuda.memory_reserved(device)
        return cls(*process_of(MemoryReader(device)(), device, reserved), requested, reserved)


def process_of(figures: Mapping[str, int | None], device: str, reserved: int = 0) -> tuple[int, str]:
    """What a reading says that the process takes, and by whose count: in a container NVML may know the whole device
    alone, or nothing."""
    if not device.startswith("cuda"):
        return figures["process_bytes"], RESIDENT
    if (own := figures.get("device_process_bytes")) is not None:
        return own, NVML_PROCESS
    if (device_bytes := figures.get("device_bytes")) is not None:
        return device_bytes, NVML_DEVICE
    return reserved, RESERVED


def mapped_files(ending: str) -> list[tuple[range, int]]:
    """(addresses, bytes in memory) of every file of that ending which this process has mapped; none where the system
    does not tell."""
    import psutil

    try:
        maps = psutil.Process().memory_maps(grouped=False)
    except (OSError, psutil.Error, AttributeError, NotImplementedError):
        return []
    ends = ((part.addr.split("-"), part.rss) for part in maps if part.path.endswith(ending))
    return [(range(int(first, 16), int(last, 16)), resident) for (first, last), resident in ends]


def highest_level(call: Callable) -> int:
    """The highest level of the CPU's allocator during a call, above where it began. `torch.profiler` would tell too,
    but its library starts in the main thread only, and in seconds."""
    import torch
    from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy

    kind = (ProfilerState.CPU, False, True, False, False, False)  # of what is recorded: memory, and nothing else
    _enable_profiler_legacy(ProfilerConfig(*kind, torch._C._profiler._ExperimentalConfig()))
    try:
        call()
    finally:
        threads = _disable_profiler_legacy()
    sizes = [e.cpu_memory_usage() for events in threads for e in events if e.kind() == "memory_alloc"]
    return max(accumulate(sizes), default=0)
