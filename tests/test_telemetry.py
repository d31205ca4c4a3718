"""What the machine says about memory, from a fake machine: exact figures, and None where it says nothing."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch

from llmq import telemetry
from llmq.events import Memory
from llmq.telemetry import MemoryReader, Nvml, Sampler

SOON = 10.0  # seconds a busy machine may need for what takes milliseconds
UUID = "GPU-0000-1111"


class FakeNvml:
    """One GPU; `broken` names the calls that raise, `bytes_names` answers texts as older drivers do."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes=(), broken=(), bytes_names=False):
        self.processes, self.broken, self.bytes_names = processes, broken, bytes_names
        self.asked = []

    def _answer(self, name, value):
        self.asked.append(name)
        if "all" in self.broken or name in self.broken:
            raise self.NVMLError(f"{name}: GPU is lost")
        return value.encode() if self.bytes_names and isinstance(value, str) else value

    def _of(self, handle, name, value):
        if handle != ("handle of", UUID):
            raise self.NVMLError("invalid argument")
        return self._answer(name, value)

    def nvmlInit(self):
        return self._answer("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._answer("handle", ("handle of", uuid))

    def nvmlDeviceGetName(self, handle):
        return self._of(handle, "name", "NVIDIA L4")

    def nvmlSystemGetDriverVersion(self):
        return self._answer("driver", "570.86")

    def nvmlDeviceGetMemoryInfo(self, handle):
        return self._of(handle, "memory", SimpleNamespace(total=24 * 10**9, free=20 * 10**9, used=4_000_000_123))

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        found = [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]
        return self._of(handle, "processes", found)

    NVML_CLOCK_SM = 1

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._of(handle, "clock", 1980 if kind == self.NVML_CLOCK_SM else 0)


def figures(library) -> dict:
    nvml = Nvml(library, UUID)
    return {"name": nvml.name, "driver": nvml.driver, "device": nvml.device_bytes(), "process": nvml.process_bytes()}


@pytest.mark.parametrize("bytes_names", [False, True])
def test_figures_are_the_drivers(bytes_names):
    ours, others = (os.getpid(), 777), (os.getpid() + 1, 10**9)
    assert figures(FakeNvml([others, ours], bytes_names=bytes_names)) == {
        "name": "NVIDIA L4",
        "driver": "570.86",
        "device": 4_000_000_123,
        "process": 777,
    }


def test_a_driver_that_fails_every_call_says_nothing():
    library = FakeNvml([(os.getpid(), 777)], broken=["all"])
    assert figures(library) == {"name": None, "driver": None, "device": None, "process": None}
    assert library.asked == ["handle", "driver"]


@pytest.mark.parametrize(
    ("broken", "lost"), [("name", "name"), ("driver", "driver"), ("memory", "device"), ("processes", "process")]
)
def test_one_failing_call_loses_one_figure(broken, lost):
    library = FakeNvml([(os.getpid(), 777)], broken=[broken])
    found = figures(library)
    assert [name for name, value in found.items() if value is None] == [lost]


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([], None),
        ([(1, 500)], None),  # a container: the driver sees another pid
        ([(os.getpid(), None)], None),  # a MIG slice or Windows: the size is not told
        ([(os.getpid(), 0)], 0),
        ([(os.getpid(), 5), (1, 9), (os.getpid(), 7)], 12),
        ([(os.getpid(), 5), (os.getpid(), None)], 5),
    ],
)
def test_process_bytes_are_ours_or_unknown(processes, expected):
    assert Nvml(FakeNvml(processes), UUID).process_bytes() == expected


@pytest.mark.parametrize(
    ("pids", "others"),
    [([], 0), (["ours"], 0), (["ours", 1, 2], 2), ([1], 0), ([1, 2], 1)],  # a container sees none of its own numbers
)
def test_other_processes_are_counted_without_ours(pids, others, gpu):
    gpu(FakeNvml([(os.getpid() if pid == "ours" else pid, 5) for pid in pids]))
    assert telemetry.other_processes("cuda:0") == others


def test_a_clock_and_other_processes_are_none_where_nobody_tells(gpu, monkeypatch):
    for library in (FakeNvml(broken=["clock", "processes"]), None):
        gpu(library)
        assert telemetry.clock_mhz("cuda:0") is None and telemetry.other_processes("cuda:0") is None
    gpu(FakeNvml())
    assert telemetry.clock_mhz("cuda:0") == 1980
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    assert telemetry.clock_mhz("cpu") is None
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=2600.0))
    assert telemetry.clock_mhz("cpu") == 2600.0


@pytest.fixture
def gpu(monkeypatch):
    """A torch that has a GPU with this UUID and this much memory allocated; returns where to put the NVML library."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0000-1111"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4321)

    def install(library):
        monkeypatch.setattr(telemetry, "_pynvml", lambda: library)

    return install


def test_the_gpu_is_found_by_its_uuid(gpu):
    gpu(FakeNvml([(os.getpid(), 777)]))
    assert MemoryReader("cuda:0")() == {
        "process_bytes": pytest.approx(psutil.Process().memory_info().rss, rel=0.2),
        "allocated_bytes": 4321,
        "device_bytes": 4_000_000_123,
        "device_process_bytes": 777,
    }


@pytest.mark.parametrize("library", [None, FakeNvml(broken=["init"])], ids=["no library", "no driver"])
def test_without_a_driver_there_are_the_other_figures(library, gpu):
    gpu(library)
    assert Nvml.for_torch_device("cuda:0") is None
    assert MemoryReader("cuda:0")().keys() == {"process_bytes", "allocated_bytes"}


def test_a_mig_slice_keeps_its_own_name(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="MIG-77"))
    library, uuids = FakeNvml(), []
    gpu(library)
    library.nvmlDeviceGetHandleByUUID = uuids.append
    Nvml.for_torch_device("cuda:0")
    assert uuids == ["MIG-77"]


def test_a_torch_that_does_not_tell_the_uuid_is_no_failure(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    gpu(FakeNvml())
    assert Nvml.for_torch_device("cuda:0") is None


def test_a_cpu_has_process_memory_only():
    found = MemoryReader("cpu")()
    assert found == {"process_bytes": pytest.approx(psutil.Process().memory_info().rss, rel=0.2)}


def wait_for(condition) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_samples_come_at_the_rate_asked_for():
    reads = []
    started = time.monotonic()
    with Sampler(hz=50, read=lambda: reads.append(time.monotonic()) or {"process_bytes": len(reads)}) as sampler:
        wait_for(lambda: len(reads) >= 10)
        samples = sampler.drain()
    elapsed = reads[-1] - started
    assert elapsed >= 9 / 50 - 0.02  # ten samples take nine periods, and never less
    assert [sample.process_bytes for sample in samples] == list(range(1, len(samples) + 1))
    assert [sample.at for sample in samples] == sorted(sample.at for sample in samples)
    assert all(0 <= sample.at <= SOON for sample in samples)


def test_a_long_pause_is_not_made_up_for_with_a_burst():
    """The interpreter was held for 300 ms, six periods: what follows comes at the old pace."""
    reads = []

    def read():
        reads.append(time.monotonic())
        if len(reads) == 1:
            time.sleep(0.3)
        return {}

    with Sampler(hz=20, read=read):
        wait_for(lambda: len(reads) >= 4)
    gaps = [b - a for a, b in zip(reads, reads[1:], strict=False)]
    assert gaps[0] >= 0.3
    assert sum(gaps[1:3]) >= 0.05  # at most one of them follows at once


def test_draining_hands_over_everything_once():
    with Sampler(hz=100, read=lambda: {"device_bytes": 7}) as sampler:
        wait_for(lambda: len(sampler._samples) >= 3)
    first = sampler.drain()
    assert len(first) >= 3 and {sample.device_bytes for sample in first} == {7}
    assert sampler.drain() == []


def test_a_sample_has_the_time_of_the_clock():
    ticks = iter([100.0] + [100.5 + i / 4 for i in range(10_000)])
    with Sampler(hz=1000, read=dict, clock=lambda: next(ticks)) as sampler:
        wait_for(lambda: sampler._samples)
    first = sampler.drain()[0]
    assert first == Memory(at=first.at) and first.at >= 0.5 and first.at % 0.25 == 0


def test_leaving_stops_at_once():
    with Sampler(hz=1, read=dict):
        assert sum(thread.name == "llmq-sampler" for thread in threading.enumerate()) == 1
        started = time.monotonic()
    assert time.monotonic() - started < 0.9  # not a whole period
    assert not any(thread.name == "llmq-sampler" for thread in threading.enumerate())


def test_a_rate_too_low_to_see_a_run_is_refused():
    with pytest.raises(AssertionError, match="0.1 Hz"):
        Sampler(hz=0.1)


LIBC = ctypes.CDLL(None)
LIBC.malloc.restype, LIBC.malloc.argtypes, LIBC.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="a C library that does not count its blocks")
@pytest.mark.parametrize(("blocks", "size"), [(1, 64 << 20), (4096, 16 << 10)], ids=["mapped", "heap"])
def test_blocks_of_the_c_library_are_seen_to_come_and_go(blocks, size):
    """64 MB: as one block, which the system maps by itself; and as many, which lie in the heap and stay there."""
    before = telemetry.used_bytes("cpu")[1]
    made = [LIBC.malloc(size) for _ in range(blocks)]
    between = telemetry.used_bytes("cpu")[1]
    for block in made:
        LIBC.free(block)
    after = telemetry.used_bytes("cpu")[1]
    assert between - before == pytest.approx(blocks * size, rel=0.05)
    assert between - after == pytest.approx(blocks * size, rel=0.05)


def test_the_resident_size_shows_a_tensor_once_it_is_written_to():
    """Until then the system has only promised the memory. Mapped by itself: a heap has room that is written."""
    size, seen = 64 << 20, [telemetry.used_bytes("cpu")[0]]
    tensor = torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    seen.append(telemetry.used_bytes("cpu")[0])
    tensor.fill_(1)
    seen.append(telemetry.used_bytes("cpu")[0])
    del tensor
    seen.append(telemetry.used_bytes("cpu")[0])
    changes = [after - before for before, after in pairwise(seen)]
    assert changes == pytest.approx([0, size, -size], abs=0.05 * size)


def test_a_gpu_s_used_bytes_are_torch_s_live_tensors(gpu):
    assert telemetry.used_bytes("cuda:0") == (4321,)


def test_free_bytes_of_this_machine():
    assert 0 < telemetry.free_bytes("cpu") <= psutil.virtual_memory().total


def test_free_bytes_of_a_gpu_count_what_the_allocator_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert telemetry.free_bytes("cuda:0") == 1200
