"""Memory in huge pages: where it lies, that it is given back, and systems that have none."""

from __future__ import annotations

import gc
import mmap
import weakref

import psutil
import pytest
import torch

from llmq.kernels.cpu.pages import HUGE, LINE, REGION, Pages


def spans(parts: list[torch.Tensor]) -> list[tuple[int, int]]:
    return sorted((part.data_ptr(), part.data_ptr() + len(part)) for part in parts)


def test_parts_lie_apart_on_lines_of_the_cache():
    made = Pages()
    parts = [made.empty(size) for size in (1, 64, 65, 1000, REGION // 2, REGION // 2, 3, REGION + 1)]
    assert all(part.data_ptr() % LINE == 0 and part.dtype == torch.uint8 for part in parts)
    found = spans(parts)
    assert all(end <= begin for (_, end), (begin, _) in zip(found, found[1:], strict=False))
    for part in parts:
        part.fill_(7)
    assert all((part == 7).all() for part in parts)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_a_region_begins_a_huge_page_and_takes_what_is_written():
    before = psutil.Process().memory_info().rss
    part = Pages().empty(HUGE)
    assert part.data_ptr() % HUGE == 0
    assert psutil.Process().memory_info().rss - before < REGION / 4  # mapped, and not there yet


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_a_region_goes_with_its_last_tensor(monkeypatch):
    made, mapped = [], mmap.mmap

    def recorded(*arguments, **options):
        region = mapped(*arguments, **options)
        made.append(weakref.ref(region))
        return region

    monkeypatch.setattr(mmap, "mmap", recorded)
    arena = Pages()
    first, second, large = arena.empty(100), arena.empty(200), arena.empty(REGION)
    assert len(made) == 2
    del arena, first, large
    gc.collect()
    assert made[0]() is not None and made[1]() is None
    second.fill_(1)
    del second
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize("missing", [True, False])
def test_a_system_without_them_gives_plain_memory(monkeypatch, missing):
    if missing:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 10**6, raising=False)  # an advice that no kernel knows
    part = Pages().empty(1000)
    assert len(part) == 1000 and part.fill_(3).sum() == 3000
