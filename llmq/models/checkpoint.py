"""Which files are a model's weights, chosen as transformers chooses them; and their tensors one at a time, from disk to
host to device, nothing kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(names: Collection[str], read: Callable[[str], str], where: str) -> list[str]:
    """Choose a model's files among the `names` in its folder or repository: `model.safetensors`, else the shards that
    its index names, sorted; never another format, a copy or an adapter. `read` gives the text of a file. Raises
    ModelUnavailable that tells what is in `where` instead, or which shard is not."""
    if not {WEIGHTS, INDEX} & {*names} or "config.json" not in names or "adapter_config.json" in names:
        raise ModelUnavailable(f"{where} {_what_else(names)}")
    if WEIGHTS in names:
        return [WEIGHTS]
    try:
        shards = sorted(set(json.loads(read(INDEX))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{INDEX} of {where} cannot be read: fetch it again") from error
    if missing := [shard for shard in shards if shard not in names]:
        raise ModelUnavailable(f"{where} lacks {len(missing)} of {len(shards)} files: {missing[0]}; fetch it again")
    return shards


def _what_else(names: Collection[str]) -> str:
    """What a folder without a model holds, and what to do."""
    if "adapter_config.json" in names:
        return "is an adapter of another model: merge the two, then open the merged model"
    if any(name.endswith(".gguf") for name in names):
        return "holds GGUF files, whose weights are rounded already: choose the model's safetensors repository"
    if any(name == "params.json" or name.startswith("consolidated") for name in names):
        return "is in the format of the model's makers: choose the repository in transformers' format"
    if "config.json" not in names:
        return "holds no model: it has no config.json"
    if any(name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")) for name in names):
        return "has no safetensors weights, and files of other formats can run code: convert it to safetensors"
    return "has no safetensors weights; llmq opens no other kind of checkpoint"


def require_model(folder: Path, where: str) -> list[Path]:
    """Return the weight files of the model in `folder`. Raises ModelUnavailable where they cannot be opened."""
    names = {path.name for path in folder.iterdir()}
    files = [folder / name for name in weight_files(names, lambda name: (folder / name).read_text("utf-8"), where)]
    for path in (*files, *(folder / name for name in names if name.endswith((".json", ".model")))):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise ModelUnavailable(f"{path.name} of {where} is a Git LFS pointer, not the file: run git lfs pull there")
    return files


def stamps(files: Iterable[Path]) -> tuple:
    """Name, bytes and time of each file: something else whenever one of them changes."""
    return tuple((file.name, found.st_size, found.st_mtime_ns) for file in files for found in [file.stat()])


class CheckpointTensors:
    """The tensors in a folder by name. Raises ModelUnavailable, with the name `where`, for what is missing."""

    def __init__(self, folder: Path, where: str = ""):
        from safetensors import safe_open

        self._where = where or str(folder)
        opened = [safe_open(path, "pt") for path in require_model(folder, self._where)]
        # By what the files hold, not by the index: a tensor in two of them is the last one's, as in transformers.
        self._file = {name: file for file in opened for name in file.keys()}

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def names(self) -> list[str]:
        """Return every tensor, in the checkpoint's order."""
        return list(self._file)

    def get(self, name: str, device: str) -> torch.Tensor:
        """Return the tensor called `name` on `device`. To a GPU it goes through page-locked memory, which the copy
        needs anyway: without it the driver makes its own copy first."""
        if name not in self._file:
            raise ModelUnavailable(f"the checkpoint of {self._where} has no tensor {name!r}")
        tensor = self._file[name].get_tensor(name)
        return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor


def require_whole(where: str, model: nn.Module, found: Mapping) -> None:
    """Raises ModelUnavailable unless transformers `found` every tensor of `model` in its checkpoint, of the shape and
    the type that the configuration says."""
    if missing := sorted(found["missing_keys"]):
        raise ModelUnavailable(f"the checkpoint of {where} has no tensor {missing[0]!r} ({len(missing)} in all)")
    if wrong := sorted(found["mismatched_keys"]):
        name, shape, stated = wrong[0]
        raise ModelUnavailable(f"{name} of {where} is {tuple(shape)}; the configuration says {tuple(stated)}")
    for_codes = {name: m for name, m in model.named_modules() if type(m).__name__ == "Linear8bitLt"}
    without = {name for name, layer in for_codes.items() if layer.weight.is_floating_point()}
    require_scales(where, without, found["unexpected_keys"])


def require_scales(where: str, layers: set[str], names: Iterable[str]) -> None:
    """Raises ModelUnavailable unless the tensors' `names` have the scales of int8 codes for just these `layers`."""
    if wrong := sorted(layers ^ {name.removesuffix(".SCB") for name in names if name.endswith(".SCB")}):
        layers = f"{wrong[0]} ({len(wrong)} layers in all)"
        raise ModelUnavailable(f"{where} is not int8 where its config.json says so: {layers}")
