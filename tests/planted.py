"""A tiny LLaMA with outliers planted at known channels, and what its linear layers really read."""

import threading
from collections import defaultdict

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmq.methods import swap

PLANTED = {  # (kind, layer) -> channels
    ("q/k/v", 1): [5],
    ("gate/up", 0): [3, 60],
    ("gate/up", 2): [60],
    ("down", 1): [301],
}
PROMPT = torch.arange(2, 2 + 37)[None]


def planted_llama(dtype=torch.float16):
    """Three layers of uneven widths; norms make every input about N(0, 1), so only what is planted passes 6."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=72, intermediate_size=308, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for (kind, layer), channels in PLANTED.items():
            block = model.model.layers[layer]
            for channel in channels:
                if kind == "down":
                    block.mlp.gate_proj.weight[channel] *= 80
                    block.mlp.up_proj.weight[channel] *= 80
                else:
                    norm = block.input_layernorm if kind == "q/k/v" else block.post_attention_layernorm
                    norm.weight[channel] = 25.0
                    for reader in (block.mlp.gate_proj, block.mlp.up_proj) if kind == "gate/up" else ():
                        reader.weight[:, channel] /= 25.0  # or it would plant others, in down's input
    return model.to(dtype).eval()


def raw_inputs(model, run):
    """Every linear layer's inputs while `run` runs, by a hook of the test's own: name -> one tensor a call."""
    calls, handles = defaultdict(list), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            keep = lambda module, args, name=name: calls[name].append(args[0].detach().clone().flatten(0, -2))  # noqa: E731
            handles.append(module.register_forward_pre_hook(keep))
    result = run()
    for handle in handles:
        handle.remove()
    return calls, result


def hooks_left(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def columns(x, threshold):
    """The definition: bitsandbytes/backends/default/ops.py, int8_vectorwise_quant."""
    return torch.argwhere((x.abs() >= threshold).any(dim=0)).view(-1).tolist()


class StopAfter(threading.Event):
    """Set once it has been asked `calls` times: stops a run at a layer of the test's choice."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def is_set(self):
        self.calls -= 1
        return self.calls < 0


def seen_ones(method, layer: nn.Module) -> torch.Tensor:
    """What the calibration of a layer finds whose inputs are all 1."""
    observer = method.observer(layer)
    observer.update(torch.ones(2, layer.weight.shape[0 if swap.is_conv1d(layer) else 1]))
    return observer.result()
