"""LLM.int8() for a transformers program, in the place of bitsandbytes: two lines.

    from llmq.transformers import Int8Config
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=Int8Config(threshold=6.0))

Each weight is quantized as it is read, so memory holds the int8 model and one weight in 16 bit, never the whole 16-bit
model. `generate` runs eagerly or, with `cache_implementation="static"`, compiled into CUDA graphs. `save_pretrained`
writes bitsandbytes' format, which transformers opens with bitsandbytes and, once this module is imported, without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.errors import BadChoice
from llmq.kernels.backend import current
from llmq.methods import swap
from llmq.methods.base import DEFAULT_THRESHOLD, THRESHOLD
from llmq.methods.layers.int8_linear import int8_weight
from llmq.methods.layers.linear_8bit import Linear8bit, group_layers, layers_of

__all__ = ["Int8Config"]

NAME = "llmq-int8"


@register_quantization_config(NAME)
class Int8Config(QuantizationConfigMixin):
    """How to quantize on the way in, or how to open a checkpoint of int8 weights.

    `threshold`: columns of a layer's input with any |x| of at least this keep their 16 bits; 0 turns that off; None is
    what an int8 checkpoint says, else 6. `llm_int8_skip_modules`: modules that stay as they are, as in bitsandbytes;
    None is the output head. Raises BadChoice for a value that cannot be used.
    """

    def __init__(self, threshold: float | None = None, llm_int8_skip_modules: list[str] | None = None):
        skip = llm_int8_skip_modules
        if skip is not None and not (isinstance(skip, list | tuple) and all(isinstance(name, str) for name in skip)):
            raise BadChoice(f"llm_int8_skip_modules is {skip!r}; give a list of modules' names")
        self.quant_method = NAME
        self.threshold = None if threshold is None else THRESHOLD.check("threshold", threshold)
        self.llm_int8_skip_modules = None if skip is None else list(skip)

    @property
    def outlier_threshold(self) -> float:
        """The threshold that layers get."""
        return DEFAULT_THRESHOLD if self.threshold is None else float(self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` says: bitsandbytes' settings, and who wrote them."""
        theirs = BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=self.outlier_threshold,
            llm_int8_skip_modules=self.llm_int8_skip_modules,
        )
        return theirs.to_dict() | {"written_by": NAME}

    def opening(self, stored: dict[str, Any]) -> Int8Config:
        """The configuration for a checkpoint whose `config.json` says `stored`. Raises BadChoice unless it is int8."""
        skip = stored.get("llm_int8_skip_modules")
        if not stored.get("load_in_8bit"):
            kind = stored.get("quant_method")
            raise BadChoice(
                f"the checkpoint holds {kind} weights: Int8Config takes 16 or 32 bit, or bitsandbytes' int8"
            )
        if self.llm_int8_skip_modules not in (None, skip):
            raise BadChoice(f"llm_int8_skip_modules is {self.llm_int8_skip_modules}; the int8 checkpoint has {skip}")
        return Int8Config(stored["llm_int8_threshold"] if self.threshold is None else self.threshold, skip)


@register_quantizer(NAME)
class Int8Quantizer(HfQuantizer):
    """Puts `Linear8bit` in the place of linear layers before their weights are read."""

    is_compileable = True
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, device_map=None, **_) -> None:
        if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            raise BadChoice(f"device_map names {len(set(device_map.values()))} devices; Int8Config takes one")

    def update_device_map(self, device_map):
        """A GPU where there is one and none is named, as with bitsandbytes."""
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def _process_model_before_weight_loading(self, model, **_) -> None:
        config = self.quantization_config
        tied = sorted({name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair})
        if config.llm_int8_skip_modules is not None:  # else they are left out anyway
            config.llm_int8_skip_modules = [*dict.fromkeys([*config.llm_int8_skip_modules, *tied])]
        skip = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
        layers = [(name, layer) for name, layer in model.named_modules() if is_linear(layer)]
        layers = [(name, layer) for name, layer in layers if should_convert_module(name, skip)]
        self.transposed = {f"{name}.weight" for name, layer in layers if swap.is_conv1d(layer)}
        swap.replace_(model, layers, self._emptied, {})

    def _emptied(self, linear: nn.Linear, _: None) -> Linear8bit:
        """A layer on the meta device; what is int8 in the file has that type here."""
        weight = linear.weight
        if self.pre_quantized:
            weight = nn.Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)
        return Linear8bit(weight, linear.bias, self.quantization_config.outlier_threshold, "meta")

    def param_needs_quantization(self, model, param_name: str, **_) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear8bit) and name != "bias"

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        """Bytes that a number of `param` will take."""
        codes = param_name.endswith("weight") and self.param_needs_quantization(model, param_name)
        return 1 if codes else super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> QuantizeRows:
        return QuantizeRows(self)

    def _process_model_after_weight_loading(self, model, **_):
        for name, layer in layers_of(model):
            layer.require_whole(name)
        group_layers(model)
        return model


class QuantizeRows(ConversionOps):
    """A weight in 16 or 32 bit as it comes, into codes and row scales on its device."""

    def __init__(self, quantizer: Int8Quantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict, **_) -> dict[str, torch.Tensor]:
        """Return {name: codes, and the scales under theirs}."""
        found = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if name in self.quantizer.transposed:
                weight = weight.t()
            with current(str(weight.device)):
                made = int8_weight(weight.contiguous())
            layer = name.removesuffix("weight")
            row_by_row = torch.zeros((), dtype=torch.uint8, device=weight.device)
            found |= {name: made.codes, f"{layer}SCB": made.absmax, f"{layer}weight_format": row_by_row}
        return found


def is_linear(module: nn.Module) -> bool:
    """Whether transformers' quantizers would replace `module`."""
    return type(module) is nn.Linear or swap.is_conv1d(module)


def _let_checkpoints_name_us() -> None:
    """Have transformers ask us about int8 checkpoints that we wrote, or that an Int8Config is given for: its registry
    knows a checkpoint by `load_in_8bit` alone, and refuses a configuration of another class."""
    theirs = AutoHfQuantizer.merge_quantization_configs

    def merge(stored, given):
        settings = stored if isinstance(stored, dict) else stored.to_dict()
        if isinstance(given, Int8Config) or (given is None and settings.get("written_by") == NAME):
            return (given or Int8Config()).opening(settings)
        return theirs(stored, given)

    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge)


_let_checkpoints_name_us()
