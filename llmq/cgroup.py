"""What Linux's control groups leave this process, as in a container: versions 1 and 2, its own group and all above.

Where nothing is limited, or there are no such groups, the answer is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def processors() -> float:
    """How many processors' time the quotas grant: 1.5 is one and a half of every second."""
    granted = math.inf
    for group in _groups("cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            match _numbers(group, files):
                case quota, period if period:
                    granted = min(granted, quota / period)
    return granted


def memory_room() -> float:
    """Bytes left under the limits. Cached file pages count as used there, and give way when memory is needed."""
    room = math.inf
    for group in _groups("memory"):
        for files in (["memory.max", "memory.current"], ["memory.limit_in_bytes", "memory.usage_in_bytes"]):
            match _numbers(group, files):
                case limit, used:
                    room = min(room, limit - used + _reclaimable(group / "memory.stat"))
    return room


def _groups(controller: str) -> Iterator[Path]:
    """The folders that the process's groups may have. A container may see its own group as the root, whatever its path
    says."""
    for base in (ROOT, ROOT / "unified", ROOT / controller):
        for path in {PurePosixPath(), *_own_paths(controller)}:
            yield from {base / path, *(base / above for above in path.parents)}


def _own_paths(controller: str) -> Iterator[PurePosixPath]:
    """A line is 'number:controllers:/path'; version 2 has no controllers in its line."""
    for line in OWN.read_text().splitlines() if OWN.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            yield PurePosixPath(path.lstrip("/"))


def _numbers(group: Path, files: list[str]) -> list[float]:
    """All numbers of these files, no limit ('max', -1) as infinite; [] where they cannot be read."""
    try:
        words = " ".join((group / name).read_text() for name in files).split()
        return [math.inf if word in ("max", "-1") else float(word) for word in words]
    except (OSError, ValueError):
        return []


def _reclaimable(statistics: Path) -> float:
    """Version 1 counts the groups below under 'total_…', version 2 in every figure."""
    if not statistics.exists():
        return 0
    found = dict(line.split() for line in statistics.read_text().splitlines())
    return float(found.get("total_inactive_file", found.get("inactive_file", 0)))
