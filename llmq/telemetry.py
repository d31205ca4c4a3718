"""What the machine says about memory, ten times a second: NVML, torch's allocator, the process.

The only importer of pynvml (package nvidia-ml-py). No GPU, no driver and a GPU that will not answer are normal: what
cannot be read is None. Reading is apart from looping, so tests read a fake and never sleep.

Why the numbers differ on a GPU: the allocator counts live tensors; NVML's per-process figure adds the CUDA context,
library workspaces and memory the allocator caches; NVML's device figure adds every other process.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from llmq import cgroup
from llmq.devices import first, parts
from llmq.events import Memory

DEFAULT_HZ = 10.0
KEPT_SAMPLES = 6000  # ten minutes at 10 Hz; older ones are dropped when nobody drains


class Sampler:
    """Reads memory in a daemon thread while the `with` block runs; `drain()` hands over what has come in.

    `read` returns a dict of Memory's fields; the default reads this process and, for a 'cuda…' device, its GPU.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        hz: float = DEFAULT_HZ,
        read: Callable[[], dict] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        assert hz >= 1, f"a sampler at {hz} Hz would miss a run"
        self._period = 1 / hz
        self._clock = clock
        self._read = read or MemoryReader(device)
        self._samples: deque[Memory] = deque(maxlen=KEPT_SAMPLES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="llmq-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._started = self._clock()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def drain(self) -> list[Memory]:
        """All samples since the last call, oldest first; `at` counts from the beginning of the block."""
        return [self._samples.popleft() for _ in range(len(self._samples))]

    def _loop(self) -> None:
        due = self._clock()
        while not self._stop.wait(max(0.0, due - self._clock())):
            self._samples.append(Memory(at=self._clock() - self._started, **self._read()))
            due = max(due + self._period, self._clock())  # after a long hold of the interpreter, no burst to catch up


class MemoryReader:
    """Reads every figure there is for one device, or of several together; callable, so that it is a Sampler's
    `read`."""

    def __init__(self, device: str = "cpu"):
        import psutil

        self._process = psutil.Process()
        self._devices = parts(device) if device.startswith("cuda") else ()
        found = [Nvml.for_torch_device(one) for one in self._devices]
        self._nvml = found if all(found) else []

    def __call__(self) -> dict:
        figures = {"process_bytes": self._process.memory_info().rss}
        if self._devices:
            import torch

            allocated = {one: torch.cuda.memory_allocated(one) for one in self._devices}
            figures["allocated_bytes"] = sum(allocated.values())
            figures |= {"by_device": allocated} if len(allocated) > 1 else {}
        if self._nvml:
            figures["device_bytes"] = _total(nvml.device_bytes() for nvml in self._nvml)
            figures["device_process_bytes"] = _total(nvml.process_bytes() for nvml in self._nvml)
        return figures


def _total(figures: Iterable[int | None]) -> int | None:
    """Their sum; None where one is not known."""
    known = list(figures)
    return None if None in known else sum(known)


class Nvml:
    """One GPU through NVML, every call guarded: a call that fails is None, and the run goes on without it.

    The GPU is found by UUID, because index 0 of NVML need not be index 0 of this process.
    """

    def __init__(self, library, uuid: str):
        self._nvml = library
        self._handle = self._guarded(lambda: library.nvmlDeviceGetHandleByUUID(uuid))
        self.name = self._text(lambda: library.nvmlDeviceGetName(self._handle))
        self.driver = self._text(library.nvmlSystemGetDriverVersion)

    @classmethod
    def for_torch_device(cls, device: str) -> Nvml | None:
        """The NVML view of a torch CUDA device; None without a driver or the library."""
        import torch

        library = _pynvml()
        if library is None:
            return None
        try:
            library.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
        except (library.NVMLError, OSError, RuntimeError, AttributeError):
            return None
        return cls(library, uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")

    def device_bytes(self) -> int | None:
        """Bytes in use on the whole device, by every process and the driver."""
        info = self._guarded(lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._handle))
        return None if info is None else int(info.used)

    def process_bytes(self) -> int | None:
        """Bytes this process holds there; None where NVML does not see our process (containers, MIG)."""
        running = self._guarded(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        ours = [p.usedGpuMemory for p in running or () if p.pid == os.getpid() and p.usedGpuMemory is not None]
        return sum(ours) if ours else None

    def other_processes(self) -> int | None:
        """How many compute there beside this one. Where none has our number, as in a container, one of them is taken
        to be this one."""
        running = self._guarded(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        if running is None:
            return None
        others = [process for process in running if process.pid != os.getpid()]
        return len(others) if len(others) < len(running) else max(0, len(others) - 1)

    def clock_mhz(self) -> int | None:
        """The clock of the multiprocessors at this moment."""
        return self._guarded(lambda: self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def energy_joules(self) -> float | None:
        """What the whole board took since its driver was loaded; None before Volta, and where MIG hides it."""
        millijoules = self._guarded(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if millijoules is None else millijoules / 1e3

    def _text(self, call) -> str | None:
        value = self._guarded(call)
        return value.decode() if isinstance(value, bytes) else value

    def _guarded(self, call):
        try:
            return call()
        except (self._nvml.NVMLError, OSError):
            return None


def _pynvml():
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def other_processes(device: str) -> int | None:
    """How many other processes compute on a GPU; None where its driver does not tell."""
    found = [Nvml.for_torch_device(one) for one in parts(device)]
    return _total(nvml.other_processes() for nvml in found) if all(found) else None


def clock_mhz(device: str) -> float | None:
    """The clock of the GPU, or the mean of the processors', at this moment; None where the system does not tell."""
    if device.startswith("cuda"):
        nvml = Nvml.for_torch_device(first(device))
        return nvml.clock_mhz() if nvml else None
    import psutil

    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return found.current if found else None


def free_bytes(device: str) -> int:
    """Bytes a new tensor could use on `device`: free VRAM plus what the allocator caches, or available memory. Of
    several GPUs, over which a model is spread evenly, as many times what the fullest has left."""
    if device.startswith("cuda"):
        import torch

        def room(one: str) -> int:
            return torch.cuda.mem_get_info(one)[0] + torch.cuda.memory_reserved(one) - torch.cuda.memory_allocated(one)

        return len(parts(device)) * min(map(room, parts(device)))
    import psutil

    return int(min(psutil.virtual_memory().available, cgroup.memory_room()))


def used_bytes(device: str) -> tuple[int, ...]:
    """What is in use, in every way this machine counts it: memory that was freed shows in at least one of them.

    On a GPU torch's live tensors. On a CPU the process's resident size, which shows mapped files going, and the C
    library's live blocks, which show freed heap memory that it keeps for itself (16 of 48 MB, measured).
    """
    if device.startswith("cuda"):
        import torch

        return (sum(map(torch.cuda.memory_allocated, parts(device))),)
    import psutil

    return psutil.Process().memory_info().rss, _live_heap_bytes()


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _live_heap_bytes() -> int:
    """Bytes in blocks handed out by malloc, heap and mapped; 0 where the C library does not say (not glibc >= 2.33)."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    mallinfo.restype = _MallInfo
    found = mallinfo()
    return found.uordblks + found.hblkhd
