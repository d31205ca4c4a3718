"""Checkpoints of int8 weights, in the format transformers and bitsandbytes write: they open ours, and we open theirs.

Beside every quantized `X.weight` (int8) stand `X.SCB` (float32, the rows' absmax) and `X.weight_format` (uint8, 0: row
by row); `config.json` names the quantization. Half the download, and nothing to quantize when it is opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.cache import require_space, sweep, workplace
from llmq.errors import BadChoice, UserError
from llmq.events import Progress
from llmq.kernels.primitives import quantize_rows
from llmq.methods.base import DEFAULT_THRESHOLD
from llmq.methods.swap import is_conv1d, linear_layers
from llmq.models.checkpoint import INDEX, CheckpointTensors, require_model
from llmq.models.loading import Source, folder_of, transformers_config
from llmq.models.skeleton import meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHARD_BYTES = 2_000_000_000
ROW_FORMAT = 0
WORK = ".llmq-int8-"  # beside the folder that a person names; no name a person would choose


def save_int8(source: Source, folder: Path) -> Iterator[Progress]:
    """Write `source` with int8 linear weights to `folder`, tensor by tensor, yielding progress.

    The folder appears in one rename, whole. Raises BadChoice for a folder that exists and for a model that is int8
    already; UserError where the disk has no room.
    """
    config, origin = transformers_config(source), folder_of(source)
    if folder.exists():
        raise BadChoice(f"{folder} exists; choose a folder that does not")
    if getattr(config, "quantization_config", None):
        raise BadChoice(f"{source.name} is quantized already")
    tensors, quantized = CheckpointTensors(origin), _quantized_names(config)
    if absent := [name for name in quantized if name not in tensors]:
        raise BadChoice(f"{source.name} calls its tensors by other names than its layers: there is no {absent[0]!r}")
    needed = sum(path.stat().st_size for path in require_model(origin, source.name))
    sweep(folder.parent, WORK)
    require_space(folder.parent, needed, "the int8 weights")
    try:
        with workplace(folder.parent, WORK) as work:
            (made := work / folder.name).mkdir()  # with the permissions of any new folder
            yield from _write(tensors, quantized, made)
            _write_settings(origin, config, made)
            made.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def _quantized_names(config: PretrainedConfig) -> dict[str, bool]:
    """The weights that LLM.int8() stores as int8, and whether the checkpoint has them (in, out), as GPT-2's."""
    return {f"{name}.weight": is_conv1d(module) for name, module in linear_layers(meta_model(config))}


def _write(tensors: CheckpointTensors, quantized: dict[str, bool], folder: Path) -> Iterator[Progress]:
    import torch
    from safetensors.torch import save_file

    places, shard, number = {}, {}, 1
    for done, name in enumerate(names := tensors.names(), 1):
        tensor = tensors.get(name, "cpu")
        if name in quantized:
            made, layer = quantize_rows(tensor.t() if quantized[name] else tensor), name.removesuffix(".weight")
            found = {name: made.codes, f"{layer}.SCB": made.absmax}
            found[f"{layer}.weight_format"] = torch.tensor(ROW_FORMAT, dtype=torch.uint8)
        else:
            found = {name: tensor.half() if tensor.is_floating_point() else tensor}
        shard |= {key: value.contiguous() for key, value in found.items()}
        if done == len(names) or sum(value.nbytes for value in shard.values()) > SHARD_BYTES:
            file = f"model-{number:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
        yield Progress(f"quantizing {name}", done / len(names))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _write_settings(origin: Path, config: PretrainedConfig, folder: Path) -> None:
    from transformers import BitsAndBytesConfig

    for path in origin.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model") and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, folder / path.name)
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=DEFAULT_THRESHOLD)
    settings = config.to_dict() | {"dtype": "float16", "quantization_config": quantization.to_dict()}
    (folder / "config.json").write_text(json.dumps(settings, indent=1, default=str), encoding="utf-8")
