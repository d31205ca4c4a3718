"""A preset's shape with random weights: right for speed and memory, meaningless as text, and labelled so.

Outliers are planted, because the decomposition's cost depends on them: in every layer six channels of each norm's gain
and of the inputs of the o and down projections are amplified, so that every linear layer sees inputs over 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

OUTLIER_CHANNELS = 6
NORM_GAIN = 30.0  # a norm's output is about N(0, 1) a channel; a planted one about N(0, 30)
VALUE_GAIN = 400.0  # attention averages values over the context, which shrinks a planted one again
GATED_GAIN = 300.0  # SiLU(gate)·up of two N(0, 0.5) is about 0.1
OUTPUT_SPREAD = 0.5  # standard deviation of every linear layer's output, so that few unplanted inputs reach 6


def random_llama(config: LlamaConfig, device: str, seed: int = 0) -> LlamaForCausalLM:
    """An fp16 LLaMA of `config`'s shape on `device`, drawn on the device from `seed`, with planted outliers."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                scale = 1.0 if "embed" in name else _spread(parameter.shape[1])
                parameter.normal_(0.0, scale, generator=generator)
        _plant_outliers(model)
    # Buffers (rotary frequencies) are computed, not drawn: to_empty left them unset.
    rotary = model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    rotary.original_inv_freq = rotary.original_inv_freq.clone()  # a tensor of its own, as in a loaded model
    return model.eval()


def _spread(inputs: int) -> float:
    """Of the weights, so that a layer fed N(0, 1) and the planted channels puts out N(0, OUTPUT_SPREAD)."""
    return OUTPUT_SPREAD * (inputs + OUTLIER_CHANNELS * NORM_GAIN**2) ** -0.5


def _plant_outliers(model) -> None:
    for index, layer in enumerate(model.model.layers):
        hidden = layer.input_layernorm.weight.shape[0]
        chosen = [(index * 31 + 97 * k) % hidden for k in range(OUTLIER_CHANNELS)]
        layer.input_layernorm.weight[chosen] *= NORM_GAIN
        layer.post_attention_layernorm.weight[chosen] *= NORM_GAIN
        for producer, gain in ((layer.self_attn.v_proj, VALUE_GAIN), (layer.mlp.up_proj, GATED_GAIN)):
            rows = [row % producer.out_features for row in chosen]
            producer.weight[rows] *= gain
