"""What Linux's control groups leave this process, as in a container: versions 1 and 2, its own group and all above.

Where nothing is limited, or there are no such groups, the answer is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")  # a line is 'number:controllers:/path', without controllers in version 2


def processors() -> float:
    """How many processors' time the quotas grant: 1.5 is one and a half of every second."""
    files = ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    return _smallest("cpu", files, lambda group, quota, period: quota / period)


def memory_room() -> float:
    """Bytes left under the limits. Cached file pages count as used there, and give way when memory is needed."""
    files = ["memory.max", "memory.current"], ["memory.limit_in_bytes", "memory.usage_in_bytes"]
    return _smallest("memory", files, lambda group, limit, used: limit - used + _reclaimable(group / "memory.stat"))


def _smallest(controller: str, choices: tuple[list[str], ...], value: Callable[..., float]) -> float:
    found = ((group, _numbers(group, files)) for group in _groups(controller) for files in choices)
    return min((value(group, *numbers) for group, numbers in found if len(numbers) == 2), default=math.inf)


def _groups(controller: str) -> Iterator[Path]:
    """Where the process's groups may be. A container may see its own as the root, whatever its path says."""
    lines = [line.split(":", 2) for line in OWN.read_text().splitlines()] if OWN.exists() else []
    paths = {path.lstrip("/") for _, names, path in lines if not names or controller in names.split(",")}
    for base in (ROOT, ROOT / "unified", ROOT / controller):
        for path in map(PurePosixPath, {"", *paths}):
            yield from (base / part for part in (path, *path.parents))


def _numbers(group: Path, files: list[str]) -> list[float]:
    """All numbers of these files, no limit ('max', -1) as infinite; [] where they cannot be read."""
    try:
        words = " ".join((group / name).read_text() for name in files).split()
        return [math.inf if word in ("max", "-1") else float(word) for word in words]
    except (OSError, ValueError):
        return []


def _reclaimable(statistics: Path) -> float:
    """Version 1 counts the groups below under 'total_…', version 2 in every figure."""
    found = dict(line.split() for line in statistics.read_text().splitlines()) if statistics.exists() else {}
    return float(found.get("total_inactive_file", found.get("inactive_file", 0)))
