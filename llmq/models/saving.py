"""A quantized model written as a checkpoint in a format of the field, with the statistics of its calibration."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.methods.calibrate import FOLDER
from llmq.methods.swap import stored_bytes
from llmq.models.checkpoint import CheckpointTensors
from llmq.models.config import quantization_of
from llmq.models.loading import Source, folder_of, transformers_config
from llmq.models.quantized import RECORD
from llmq.models.writing import Shards, new_folder, require_new, write_settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from llmq.methods import Method
    from llmq.models.formats.base import Format


def require_savable(source: Source, folder: Path) -> None:
    """Raises BadChoice for a folder that exists and for a model that is quantized already: told before anything is
    loaded."""
    require_new(folder)
    if quantization_of(transformers_config(source)):
        raise BadChoice(f"{source.name} is quantized already: choose a model in 16 or 32 bit")


def save_model(
    model: PreTrainedModel, method: Method, source: Source, folder: Path, form: Format, statistics: Path | None = None
) -> Iterator[Progress]:
    """Write `model`, which is `source` under `method`, to `folder` in the format `form`, yielding progress; beside it
    the file `statistics`. Raises BadChoice for a layer that the format has no place for."""
    layers = {name: layer for name, layer in model.named_modules() if form.is_layer(layer)}
    settings, origin = form.settings(method, layers), folder_of(source)
    if absent := sorted({f"{name}.weight" for name in layers} - {*CheckpointTensors(origin).names()}):
        raise BadChoice(f"{source.name} calls its tensors by other names than its layers: there is no {absent[0]!r}")
    needed = stored_bytes(model) + method.scale_bytes(model) + (statistics.stat().st_size if statistics else 0)
    with new_folder(folder, needed, f"{source.name} under {method.spelled}") as made:
        shards, dtype = Shards(made), "float16" if method.dtype == "float32" else method.dtype
        for done, (name, layer) in enumerate(layers.items(), 1):
            shards.add({f"{name}.{end}": tensor for end, tensor in form.write(layer, settings).items()})
            yield Progress(f"writing {name}", done / len(layers))
        shards.add(_others(model, layers, dtype))
        shards.close()
        config = transformers_config(source).to_dict() | {"dtype": dtype, "quantization_config": settings}
        write_settings(origin, config | {RECORD: {"method": method.spelled}}, made)
        if statistics:
            (made / FOLDER).mkdir()
            shutil.copyfile(statistics, made / FOLDER / statistics.name)


def _others(model: PreTrainedModel, layers: Mapping[str, nn.Module], dtype: str) -> dict[str, torch.Tensor]:
    """What is not quantized, the layers' biases among it, FP32 numbers in `dtype`; tied tensors once."""
    import torch

    quantized, stored = {f"{name}.weight" for name in layers}, model.state_dict().keys()
    found = (dict(model.named_parameters()) | dict(model.named_buffers())).items()
    kept = {name: tensor.data for name, tensor in found if name in stored and name not in quantized}
    return {n: t.to(getattr(torch, dtype)) if t.dtype == torch.float32 else t for n, t in kept.items()}
