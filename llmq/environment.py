"""What a figure was measured on: device, driver, versions, model revision, date. Stored with every run and result."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from llmq import cgroup, telemetry
from llmq.devices import first, parts
from llmq.errors import BadChoice, UserError
from llmq.models.loading import Source, revision_of

MOST_LOAD = 0.5  # of the cores: the average of the last minute over which the machine was not quiet
PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "gradio")


def default_device() -> str:
    """The first CUDA device where there is one, else the CPU."""
    return "cuda:0" if _gpus() else "cpu"


def device_named(name: str | None, *, several: bool = False) -> str:
    """'cpu', 'cuda', 'cuda:N' or None (choose) as a torch device string with its index; where `several` can be used,
    also 'cuda:0,cuda:1'."""
    if not name:
        return default_device()
    if name == "cpu":
        return name
    if "://" in name:
        raise BadChoice(f"device {name!r} is a server; name it among the methods: vllm@http://host:8000/v1#model")
    if "," in name:
        return _several_named(name, several)
    choices = ["cpu", *(f"cuda:{i}" for i in range(_gpus()))]
    name = "cuda:0" if name == "cuda" else name
    if name not in choices:
        raise BadChoice(f"device {name!r} is not here; choose from {', '.join(choices)}")
    return name


def _several_named(name: str, several: bool) -> str:
    if not several:
        raise BadChoice(f"device {name!r} names several devices, over which only compare and the page spread a model")
    names = [one.strip() for one in name.split(",")]
    if not all(names):
        raise BadChoice(f"device {name!r} has a comma with no device beside it")
    found = [device_named(one) for one in names]
    if "cpu" in found:
        raise BadChoice(f"device {name!r} mixes the CPU with others; name GPUs, such as cuda:0,cuda:1")
    if len(set(found)) < len(found):
        raise BadChoice(f"device {name!r} names one twice")
    return ",".join(found)


def every_device() -> list[str]:
    """All CUDA devices, or the CPU where there is none."""
    return [f"cuda:{number}" for number in range(_gpus())] or ["cpu"]


def _gpus() -> int:
    """How many GPUs torch can use. It is not imported (2.5 s on two cores) to hear that there is no driver."""
    if "torch" not in sys.modules and not _may_have_a_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def _may_have_a_driver() -> bool:
    """Whether NVIDIA's driver, or AMD's, is there to be asked."""
    if sys.platform == "darwin":
        return False
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def device_label(device: str) -> str:
    """The device as people call it."""
    if device.startswith("cuda"):
        import torch

        names = [torch.cuda.get_device_name(one) for one in parts(device)]
        return " + ".join(f"{count} × {name}" if count > 1 else name for name, count in Counter(names).items())
    cores, granted = os.cpu_count(), cgroup.processors()
    return f"{_cpu_name()}, {cores} cores" + (f", {granted:g} of them granted" if granted < cores else "")


def cpu_capability() -> str:
    """The vector instructions torch found on this processor, by its name for them: 'AVX2', 'AVX512', 'DEFAULT'."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def describe(device: str, source: Source | None = None) -> dict:
    """Plain JSON: everything needed to judge or repeat a measurement."""
    import torch

    from llmq import __version__

    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "device_name": device_label(device),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"llmq": __version__} | _versions(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": cpu_capability(),
        "host": host(),
        "commit": commit(),
    }
    if device.startswith("cuda"):
        nvml = telemetry.Nvml.for_torch_device(first(device))
        facts |= {"driver": nvml.driver if nvml else None, "cuda": torch.version.cuda}
    if source:
        facts |= {"model": source.name, "model_revision": None}
        with suppress(UserError):
            facts["model_revision"] = revision_of(source)
    return facts


def host() -> dict:
    """The processor that drives the measurement and how it is clocked; None for what the system does not tell."""
    import psutil

    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        clock = None
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "highest_mhz": (clock and clock.max) or None,
        "governor": governor.read_text().strip() if governor.exists() else None,
    }


def doubts(device: str) -> Iterator[str]:
    """What speaks against measuring here and now, a sentence each: files that differ from the commit, others at work
    on the GPU or the processors."""
    import psutil

    if (found := commit() or "").endswith("-dirty"):
        yield f"files differed from commit {found.removesuffix('-dirty')}, so nobody can repeat this; commit first"
    if device.startswith("cuda") and (others := telemetry.other_processes(device)):
        yield f"other processes on the GPU: {others}"
    busy, cores = psutil.getloadavg()[0], os.cpu_count()
    if busy > cores * MOST_LOAD:
        yield f"the processors were busy before: load {busy:.1f} on {cores} cores"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str | None:
    """The commit of this checkout, marked when files differ from it; LLMQ_COMMIT names it elsewhere."""
    if named := os.environ.get("LLMQ_COMMIT"):
        return named
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():  # an installed package may lie inside somebody else's checkout
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
