"""A checkpoint as transformers reads it: a folder that appears whole or not at all, its shards and its settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.cache import require_space, sweep, workplace
from llmq.errors import BadChoice, UserError
from llmq.models.checkpoint import INDEX

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2_000_000_000
WORK = ".llmq-new-"  # beside the folder that a person names; no name a person would choose
SETTINGS = (".json", ".jinja", ".model")  # of the tokenizer, the chat template, the generation
TERMS = ("license", "licence", "notice", "use_policy")  # a model's, which bind whoever passes it on


def require_new(folder: Path) -> None:
    """Raises BadChoice for a folder that exists."""
    if folder.exists():
        raise BadChoice(f"{folder} exists; choose a folder that does not")


@contextmanager
def new_folder(folder: Path, needed_bytes: int, what: str) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` in one rename when the block ends well, and nothing otherwise.
    Raises BadChoice for one that exists, UserError where the disk has no room or cannot be written."""
    require_new(folder)
    sweep(folder.parent, WORK)
    require_space(folder.parent, needed_bytes, what)
    try:
        with workplace(folder.parent, WORK) as work:
            (made := work / folder.name).mkdir()  # with the permissions of any new folder
            yield made
            made.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


class Shards:
    """Writes tensors into files of at most `SHARD_BYTES` and, at the end, the index of all."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, str] = {}  # of every tensor written
        self._waiting: dict[str, torch.Tensor] = {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        self._waiting |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self._waiting.values()) > SHARD_BYTES:
            self._write()

    def close(self) -> None:
        if self._waiting:
            self._write()
        total = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": self._files}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _write(self) -> None:
        from safetensors.torch import save_file

        file = f"model-{len(set(self._files.values())) + 1:05}.safetensors"
        save_file(self._waiting, self._folder / file, metadata={"format": "pt"})
        self._files |= dict.fromkeys(self._waiting, file)
        self._waiting = {}


def write_settings(origin: Path, config: dict, folder: Path) -> None:
    """Write `config` to `folder`, beside the tokenizer, the generation settings and the licence of `origin`."""
    for path in origin.iterdir():
        travels = path.suffix in SETTINGS or path.name.lower().startswith(TERMS)
        if path.is_file() and travels and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")
