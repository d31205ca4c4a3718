"""Quantize a transformers model that is loaded already, in place, by any method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.errors import BadChoice
from llmq.kernels.backend import current
from llmq.methods import Method, parse_method, swap
from llmq.methods.calibrate import Calibration
from llmq.methods.layers.linear_8bit import convert_
from llmq.methods.llm_int8 import LlmInt8
from llmq.models.config import context_of
from llmq.models.reference_text import WINDOW
from llmq.transformers import NAME, Int8Config, Int8Quantizer, is_linear


class Unsaved(HfQuantizer):
    """Stands beside a model under a method that has no format of its own, so that nobody saves codes without scales."""

    is_trainable = False

    def is_serializable(self) -> bool:
        name = self.quantization_config.quant_method
        raise BadChoice(f"a model under {name} cannot be saved by transformers; llm-int8 can")


def quantize(
    model: PreTrainedModel, method: str | Method = "llm-int8", *, text: str | Sequence[int] | None = None
) -> PreTrainedModel:
    """Convert a loaded transformers model in place, where it is, and return it in eval mode.

    `method`: as at the command line, such as 'gptq@bits=4'. 'llm-int8' keeps the type of what stays and gives what
    `Int8Config` gives: a model to save and to compile. Any other brings the type of its label, and cannot be saved.
    `text`: what a calibrated method reads first, or its token ids. Raises BadChoice for what cannot be used.

        llmq.quantize(model, "llm-int8@4")
    """
    method = parse_method(method) if isinstance(method, str) else method
    device = _device_of(model, method)
    statistics = _statistics(model, method, text)
    with current(device):
        if type(method) is LlmInt8 and method.packed and not method.by_row:
            return _quantize_to_save(model, method.threshold)
        method.quantize_(model, device, statistics)
    if not method.dense:
        model.hf_quantizer = Unsaved(QuantizationConfigMixin(method.name))
    return model


def _device_of(model: PreTrainedModel, method: Method) -> str:
    """Where the whole model is. Raises BadChoice for a model that cannot be converted."""
    if not isinstance(model, PreTrainedModel):
        raise BadChoice(f"{type(model).__name__} is no model of transformers: load it with from_pretrained")
    quantized = getattr(model, "hf_quantizer", None)
    if quantized and not (swap.opened_int8(model) and method.opens_int8):
        name = getattr(quantized.quantization_config.quant_method, "value", quantized.quantization_config.quant_method)
        raise BadChoice(f"the model is quantized already ({name}): load it in 16 or 32 bit")
    devices = sorted({str(tensor.device) for tensor in swap.stored_tensors(model)})
    if len(devices) != 1 or devices == ["meta"]:
        raise BadChoice(f"the model is on {', '.join(devices)}; load it on one device")
    return devices[0]


def _statistics(model: PreTrainedModel, method: Method, text: str | Sequence[int] | None) -> dict | None:
    """Of the inputs of every linear layer while the model reads `text`; None for a method that needs none."""
    if not method.calibrated:
        if text is not None:
            raise BadChoice(f"{method.name} reads no text: leave out text")
        return None
    ids = _tokens(model, text) if isinstance(text, str) else list(text or ())
    if not ids:
        raise BadChoice(f"{method.name} is calibrated: give it a text to read, or its token ids, as text")
    length = min(WINDOW, context_of(model.config))
    with Calibration(model.eval(), method) as found, torch.inference_mode():
        for start in range(0, len(ids), length):
            model(torch.tensor([ids[start : start + length]], device=model.device), use_cache=False)
    return found.statistics


def _tokens(model: PreTrainedModel, text: str) -> list[int]:
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)(text)["input_ids"]
    except (OSError, ValueError) as error:
        raise BadChoice(f"no tokenizer is found under {model.name_or_path!r}: give token ids as text") from error


def _quantize_to_save(model: PreTrainedModel, threshold: float) -> PreTrainedModel:
    """As if `Int8Config` had loaded it."""
    convert_(model, threshold)
    left = [name for name, layer in model.named_modules() if is_linear(layer)]
    model.hf_quantizer = Int8Quantizer(Int8Config(threshold, left), pre_quantized=False)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.quantization_method, model.is_quantized = NAME, True
    return model.eval()
