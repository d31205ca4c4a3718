"""A checkpoint's tensors one at a time, from one safetensors file or several: disk to host to device, nothing kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


class CheckpointTensors:
    """The tensors in a folder by name. Raises ModelUnavailable for a folder without safetensors or a missing tensor."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self._files = {path.name: safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))}
        if not self._files:
            raise ModelUnavailable(f"{folder} has no safetensors weights")
        index = folder / INDEX
        if index.exists():
            self._place = json.loads(index.read_text())["weight_map"]
        else:
            self._place = {name: file for file, opened in self._files.items() for name in opened.keys()}

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def names(self) -> list[str]:
        """Every tensor, in the checkpoint's order."""
        return list(self._place)

    def get(self, name: str, device: str) -> torch.Tensor:
        """The tensor called `name` on `device`. To a GPU it goes through page-locked memory, which the copy needs
        anyway: without it the driver makes its own copy first."""
        if name not in self._place:
            raise ModelUnavailable(f"the checkpoint has no tensor {name!r}")
        tensor = self._files[self._place[name]].get_tensor(name)
        return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor
