"""Memory for weights, which every step reads from end to end: in pages of 2 MB where the system has them.

In a virtual machine the address of every 4 kB page is looked up in two tables of several levels, so on a 2-core host
plain reads of 270 MB were 11 to 25 % quicker in huge pages. A system that offers them only where they are asked for is
the usual one, and torch does not ask.
"""

from __future__ import annotations

import mmap

import torch

HUGE = 2 << 20  # bytes of a page
REGION = 64 << 20  # bytes mapped at a time; what is not written takes no memory
LINE = 64


class Pages:
    """Hands out memory that is freed with the last tensor in its region."""

    def __init__(self):
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, size: int) -> torch.Tensor:
        """Return uint8 (size,) that begins a cache line."""
        whole = -(-size // LINE) * LINE
        if whole > len(self._rest):
            self._rest = _region(max(whole, REGION))
        found, self._rest = self._rest[:size], self._rest[whole:]
        return found


def _region(size: int) -> torch.Tensor:
    """At least `size` bytes that begin a huge page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, -(-size // HUGE) * HUGE + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    found = torch.frombuffer(pages, dtype=torch.uint8)
    return found[-found.data_ptr() % HUGE :][: -(-size // HUGE) * HUGE]
