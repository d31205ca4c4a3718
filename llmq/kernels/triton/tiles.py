"""How much of a matrix one program of a matrix-vector product takes: measured, not derived."""

from __future__ import annotations

from typing import NamedTuple

import triton

from llmq.kernels.triton.launch import INTERPRETED


class Tile(NamedTuple):
    """`rows` outputs a program, `columns` inputs at a time."""

    rows: int
    columns: int
    warps: int


class RowsTile(NamedTuple):
    """`rows` and `outputs` of a program, which multiplies `inputs` at a time; the inputs are cut into `parts`."""

    rows: int
    outputs: int
    inputs: int
    parts: int
    warps: int
    stages: int


def rows_tile(rows: int, n_out: int, width: int, gated: bool) -> RowsTile:
    """Return the tile for rows that are multiplied on tensor cores, each with outliers of its own: the best of those
    tried on one H100 at LLaMA-2-7B's shapes and 8, 32 and 64 rows. Where outputs are few, two programs share each."""
    if INTERPRETED:
        return RowsTile(16, 16, 32, 1 if gated else 2, 4, 1)
    height = min(64, max(16, triton.next_power_of_2(rows)))
    if rows > 64 or gated:
        return RowsTile(height, 64, 128, 1, 4, 3)
    if n_out > 8192:
        return RowsTile(height, 64, 256, 1, 4, 3)
    return RowsTile(height, 64, 256, 2, 8 if height > 32 and width > 8192 else 4, 4)


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
