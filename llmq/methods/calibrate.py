"""Calibration: statistics of the linear layers' inputs, collected while ordinary forward passes run.

    with Calibration(model, method) as found:
        model(tokens)
    found.statistics  # {layer's name: tensor}

What is collected is the method's to say (`Method.observer`). Statistics are kept on disk by checkpoint, text and what
was collected, and found again beside a checkpoint that brings its own (`FOLDER` inside its folder).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmq.methods.swap import linear_layers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.base import Method

FOLDER = "calibration"


class ChannelMaximum:
    """The largest |x| of every input channel: (in_features,) float32."""

    def __init__(self):
        self._largest: torch.Tensor | None = None

    def update(self, x: torch.Tensor) -> None:
        found = x.reshape(-1, x.shape[-1]).abs().amax(0).float()
        self._largest = found if self._largest is None else self._largest.maximum(found)

    def result(self) -> torch.Tensor:
        assert self._largest is not None, "the layer was never run"
        return self._largest.cpu()


class InputSample(ChannelMaximum):
    """The largest |x| of every input channel, then some rows of the input, spread evenly over each call: (1 + rows,
    in_features) float32."""

    ROWS = 64  # of a call

    def __init__(self):
        super().__init__()
        self._rows: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        super().update(x)
        rows = x.reshape(-1, x.shape[-1])
        self._rows.append(rows[:: -(-len(rows) // self.ROWS)].float().cpu())

    def result(self) -> torch.Tensor:
        import torch

        return torch.cat((super().result()[None], *self._rows))


class SecondMoments:
    """The mean of |x| and of xᵀ x: (1 + in_features, in_features) float32; the first row is the former. `even`: every
    token counts alike, as x / |x|."""

    def __init__(self, *, even: bool = False):
        self._even = even
        self._sum: torch.Tensor | None = None
        self._rows = 0

    def update(self, x: torch.Tensor) -> None:
        import torch

        rows = x.reshape(-1, x.shape[-1]).float()
        if self._even:
            rows = torch.nn.functional.normalize(rows, dim=1)
        found = torch.cat((rows.abs().sum(0, keepdim=True), rows.T @ rows))
        self._sum = found if self._sum is None else self._sum.add_(found)
        self._rows += len(rows)

    def result(self) -> torch.Tensor:
        assert self._sum is not None, "the layer was never run"
        return (self._sum / self._rows).cpu()


class Calibration:
    """Watches every linear layer that `method` quantizes, inside the `with` block only; no hook is left afterwards."""

    def __init__(self, model: nn.Module, method: Method):
        from llmq.hooks import Watched

        layers = dict(linear_layers(model))
        self._observers = {name: method.observer(layer) for name, layer in layers.items()}
        self._watched = Watched(layers, on_input=lambda name, module, x: self._observers[name].update(x))

    def __enter__(self) -> Calibration:
        self._watched.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._watched.__exit__(*exception)

    @property
    def statistics(self) -> dict[str, torch.Tensor]:
        """What was collected, by the layers' names."""
        return {name: observer.result() for name, observer in self._observers.items()}


def file_name(method: Method) -> str:
    """Of the statistics of `method` inside a folder; methods that collect the same share one file."""
    return f"{method.calibration}.safetensors"


def save_statistics(statistics: dict[str, torch.Tensor], path: Path) -> None:
    """Write `statistics` to `path` in one step, as safetensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(statistics, partial)
    partial.replace(path)
