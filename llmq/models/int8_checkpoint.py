"""Checkpoints of int8 weights, in the format transformers and bitsandbytes write: they open ours, and we open theirs.

Beside every quantized `X.weight` (int8) stand `X.SCB` (float32, the rows' absmax) and `X.weight_format` (uint8, 0: row
by row); `config.json` names the quantization. Half the download, and nothing to quantize when it is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.kernels.primitives import quantize_rows
from llmq.methods.base import DEFAULT_THRESHOLD
from llmq.methods.swap import is_conv1d, linear_layers
from llmq.models.checkpoint import CheckpointTensors, require_model
from llmq.models.loading import Source, folder_of, transformers_config
from llmq.models.skeleton import meta_model
from llmq.models.writing import Shards, new_folder, require_new, write_settings

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

ROW_FORMAT = 0


def save_int8(source: Source, folder: Path, threshold: float = DEFAULT_THRESHOLD) -> Iterator[Progress]:
    """Write `source` with int8 linear weights to `folder`, tensor by tensor, yielding progress. `threshold`: of the
    outlier columns, which bitsandbytes takes from the folder.

    The folder appears in one rename, whole. Raises BadChoice for a folder that exists and for a model that is int8
    already; UserError where the disk has no room.
    """
    config, origin = transformers_config(source), folder_of(source)
    require_new(folder)
    if getattr(config, "quantization_config", None):
        raise BadChoice(f"{source.name} is quantized already")
    tensors, quantized = CheckpointTensors(origin), _quantized_names(config)
    if absent := [name for name in quantized if name not in tensors]:
        raise BadChoice(f"{source.name} calls its tensors by other names than its layers: there is no {absent[0]!r}")
    needed = sum(path.stat().st_size for path in require_model(origin, source.name))
    with new_folder(folder, needed, "the int8 weights") as made:
        yield from _write(tensors, quantized, made)
        write_settings(origin, _settings(config, threshold), made)


def _quantized_names(config: PretrainedConfig) -> dict[str, bool]:
    """The weights that LLM.int8() stores as int8, and whether the checkpoint has them (in, out), as GPT-2's."""
    return {f"{name}.weight": is_conv1d(module) for name, module in linear_layers(meta_model(config))}


def _write(tensors: CheckpointTensors, quantized: dict[str, bool], folder: Path) -> Iterator[Progress]:
    shards = Shards(folder)
    for done, name in enumerate(names := tensors.names(), 1):
        tensor = tensors.get(name, "cpu")
        if name in quantized:
            shards.add(_int8(name, tensor.t() if quantized[name] else tensor))
        else:
            shards.add({name: tensor.half() if tensor.is_floating_point() else tensor})
        yield Progress(f"quantizing {name}", done / len(names))
    shards.close()


def _int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    made, layer = quantize_rows(weight), name.removesuffix(".weight")
    row_format = torch.tensor(ROW_FORMAT, dtype=torch.uint8)
    return {name: made.codes, f"{layer}.SCB": made.absmax, f"{layer}.weight_format": row_format}


def _settings(config: PretrainedConfig, threshold: float) -> dict:
    from transformers import BitsAndBytesConfig

    threshold = threshold if math.isfinite(threshold) else 0.0  # which is off, too, and a number in JSON
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return config.to_dict() | {"dtype": "float16", "quantization_config": quantization.to_dict()}
