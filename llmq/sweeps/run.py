"""A sweep from its beginning, or from where it was left, to its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from llmq.events import Progress
from llmq.sweeps.grid import Folder, Grid
from llmq.sweeps.places import Processes, Ray
from llmq.sweeps.table import SweepAnswer, swept


def sweep(
    grid: Grid, path: Path, devices: Sequence[str], *, ray: bool = False, again: bool = False
) -> Iterator[Progress | SweepAnswer]:
    """Measure every cell of `grid` that has no file in the folder `path`, one at a time on each of `devices`, or on a
    Ray cluster; yield progress and at last what all come to. A cell is written when it is done, so whatever ends a
    sweep loses what was running, and asking again goes on from there; cells that failed are tried `again` where that is
    asked for. Raises UserError for a folder of another sweep."""
    folder = Folder(path)
    folder.begin(grid)
    cells = folder.open_cells(grid, again=again)
    there = len(grid.cells) - len(cells)
    places = Ray(devices[0]) if ray and cells else Processes(devices)
    asked = [partial(cell.arguments, tokens=grid.tokens) for cell in cells]
    yield Progress(f"{there} of {len(grid.cells)} cells are there", there / len(grid.cells))
    with closing(places.run(asked)) as ended:
        for count, (number, found) in enumerate(ended, there + 1):
            cell = cells[number]
            if found.answer:
                folder.keep(cell, found.answer)
            else:
                folder.keep_failure(cell, found.reason, cell.arguments(devices[0], grid.tokens))
            yield Progress(f"{cell.title}: {found.reason or 'measured'}", count / len(grid.cells))
    yield swept(folder, grid)
