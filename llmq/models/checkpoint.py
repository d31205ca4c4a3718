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
POINTER = b"version https://git-lfs"


def weight_files(names: Collection[str], read: Callable[[str], str], where: str) -> list[str]:
    """Choose a model's files among the `names` in its folder or repository: `model.safetensors`, else the shards that
    its index names, sorted. Nothing else counts: no other format, no copy, no adapter.

    `read` gives the text of a file, `where` is the name for messages. Raises ModelUnavailable for anything else that
    is there instead, and for shards that are not there.
    """
    if "adapter_config.json" in names:
        raise ModelUnavailable(f"{where} is an adapter of another model: merge the two, then open the merged model")
    if WEIGHTS not in names and INDEX not in names:
        raise ModelUnavailable(_what_else(names, where))
    if "config.json" not in names:
        raise ModelUnavailable(f"{where} holds no model: it has no config.json")
    if WEIGHTS in names:
        return [WEIGHTS]
    try:
        shards = sorted(set(json.loads(read(INDEX))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{INDEX} of {where} cannot be read: fetch it again") from error
    if missing := [shard for shard in shards if shard not in names]:
        raise ModelUnavailable(f"{where} lacks {len(missing)} of {len(shards)} files: {missing[0]}; fetch it again")
    return shards


def _what_else(names: Collection[str], where: str) -> str:
    """What a folder without weights holds, and what to do."""
    if any(name.endswith(".gguf") for name in names):
        return f"{where} holds GGUF files, whose weights are rounded already: choose the model's safetensors repository"
    if any(name == "params.json" or name.startswith("consolidated") for name in names):
        return f"{where} is in the format of the model's makers: choose the repository in transformers' format"
    if any(name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")) for name in names):
        return f"{where} has no safetensors weights, and files of other formats can run code: convert it to safetensors"
    if "config.json" not in names:
        return f"{where} holds no model: it has no config.json"
    return f"{where} has no safetensors weights; llmq opens no other kind of checkpoint"


def require_model(folder: Path, where: str) -> list[Path]:
    """The weight files of the model in `folder`. Raises ModelUnavailable, one line, for a folder that cannot be opened;
    `where` names it."""
    names = {path.name for path in folder.iterdir()}
    files = [folder / name for name in weight_files(names, lambda name: (folder / name).read_text("utf-8"), where)]
    for path in (*files, folder / "tokenizer.json", folder / "tokenizer.model"):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER):
            raise ModelUnavailable(f"{path.name} of {where} is a Git LFS pointer, not the file: run git lfs pull there")
    return files


class CheckpointTensors:
    """The tensors in a folder by name. Raises ModelUnavailable for a folder without weights or a missing tensor;
    `where` names the folder there."""

    def __init__(self, folder: Path, where: str = ""):
        from safetensors import safe_open

        self._where = where or str(folder)
        opened = [safe_open(path, "pt") for path in require_model(folder, self._where)]
        # By what the files hold, not by the index: a tensor in two of them is the last one's, as in transformers.
        self._file = {name: file for file in opened for name in file.keys()}

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def names(self) -> list[str]:
        """Every tensor, in the checkpoint's order."""
        return list(self._file)

    def get(self, name: str, device: str) -> torch.Tensor:
        """The tensor called `name` on `device`. To a GPU it goes through page-locked memory, which the copy needs
        anyway: without it the driver makes its own copy first."""
        if name not in self._file:
            raise ModelUnavailable(f"the checkpoint of {self._where} has no tensor {name!r}")
        tensor = self._file[name].get_tensor(name)
        return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor

    def require_stated_int8(self, stated: bool) -> None:
        """Raises ModelUnavailable unless every linear layer of a LLaMA but the head is int8, where the configuration
        says int8, or none."""
        names = self.names()
        layers = {name.removesuffix(".weight") for name in names if stated and name.endswith("_proj.weight")}
        _require_none(self._where, layers ^ _scaled(names))


def require_whole(where: str, model: nn.Module, found: Mapping) -> None:
    """Raises ModelUnavailable unless transformers `found` every tensor of `model` in its checkpoint, of the shape and
    the type that the configuration says."""
    if missing := sorted(found["missing_keys"]):
        raise ModelUnavailable(f"the checkpoint of {where} has no tensor {missing[0]!r} ({len(missing)} in all)")
    if wrong := sorted(found["mismatched_keys"]):
        name, shape, stated = wrong[0]
        raise ModelUnavailable(f"{name} of {where} is {tuple(shape)}; the configuration says {tuple(stated)}")
    for_codes = ((name, layer) for name, layer in model.named_modules() if type(layer).__name__ == "Linear8bitLt")
    without = {name for name, layer in for_codes if layer.weight.is_floating_point()}
    _require_none(where, without | _scaled(found["unexpected_keys"]))


def _scaled(names: Iterable[str]) -> set[str]:
    """The layers whose weights are int8 codes: bitsandbytes keeps their scales beside them."""
    return {name.removesuffix(".SCB") for name in names if name.endswith(".SCB")}


def _require_none(where: str, wrong: set[str]) -> None:
    if wrong:
        layers = f"{sorted(wrong)[0]} ({len(wrong)} layers in all)"
        raise ModelUnavailable(f"{where} is not int8 where its config.json says so: {layers}")
