"""What a change elsewhere in a call does to a text: its logits, and the columns that become outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmq.hooks import Watched, kind_and_layer, linear_modules

if TYPE_CHECKING:
    from llmq.engine.hf import HFEngine

Place = tuple[str, int | None]  # the kind of a linear layer's input, and the decoder layer


@dataclass(frozen=True)
class Call:
    """One call. `logits`: float32 (tokens, vocabulary) of its first text, on the host. `columns`: those that each input
    of a linear layer had in 16 bit; `peaks`: (in,) the largest |x| of each column among the tokens that change."""

    logits: torch.Tensor
    columns: dict[Place, set[int]]
    peaks: dict[Place, torch.Tensor]


def read_call(engine: HFEngine, texts: list[list[int]], changing: int) -> Call:
    """Read several texts of one length in one call; the tokens from `changing` on of the last one are those that
    change. Layers that share an input count once."""
    places: dict[Place, tuple[str, nn.Module]] = {}
    for name, module in linear_modules(engine.model).items():
        places.setdefault(kind_and_layer(name), (name, module))
    place_of = {name: place for place, (name, _) in places.items()}
    columns, peaks = {}, {}

    def before(name: str, module: nn.Module, x: torch.Tensor) -> None:
        peaks[place_of[name]] = x.reshape(len(texts), -1, x.shape[-1])[-1, changing:].abs().amax(0).float().cpu()

    def after(name: str, module: nn.Module, y: torch.Tensor) -> None:
        found = engine.method.outlier_columns(module)
        if found is not None:
            columns[place_of[name]] = set(found.tolist())

    engine.settle()
    with torch.inference_mode(), Watched(dict(places.values()), before, after):
        logits = engine.model(torch.tensor(texts, device=engine.device), use_cache=False).logits[0]
    return Call(logits.float().cpu(), columns, peaks)


def joined(before: Call, after: Call) -> list[tuple[int | None, str, int, float]]:
    """(layer, input, column, its largest |x| in the new tokens) of the columns that are outliers after a change and
    were none before."""
    return [
        (layer, kind, column, float(after.peaks[kind, layer][column]))
        for (kind, layer), columns in after.columns.items()
        for column in sorted(columns - before.columns[kind, layer])
    ]
