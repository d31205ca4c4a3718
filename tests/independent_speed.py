"""Decode speed and memory of plain transformers loops, with nothing of llmq: what `llmq bench decode --engine hf` says
has to be within 3 % of this. Nothing collects it: `python tests/independent_speed.py [folder of the demo model]`."""

import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

PROMPT, NEW, REPEATS = 64, 64, 5
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def settle():
    if DEVICE != "cpu":
        torch.cuda.synchronize()


@torch.inference_mode()
def decode(model):
    """Tokens a second after the prompt, greedily, with one wait at the end."""
    ids = (torch.arange(PROMPT, device=DEVICE) * 37 % 30000 + 5).unsqueeze(0)
    out = model(ids, use_cache=True)
    token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
    settle()
    started = time.perf_counter()
    for _ in range(NEW - 1):
        out = model(token, past_key_values=past, use_cache=True)
        token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
    settle()
    return (NEW - 1) / (time.perf_counter() - started)


def report(name, model):
    decode(model)
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()
    speeds = [decode(model) for _ in range(REPEATS)]
    peak = torch.cuda.max_memory_allocated() if DEVICE != "cpu" else None
    told = f"{statistics.median(speeds):8.2f} tok/s ({min(speeds):.2f} to {max(speeds):.2f})"
    print(f"{name:12} {told}  weights {size / 1e9:.3f} GB  peak {peak and peak / 1e9} GB", flush=True)


if len(sys.argv) > 1:
    folder, at = sys.argv[1], {"dtype": torch.float16, "device_map": DEVICE}
    report("demo fp16", AutoModelForCausalLM.from_pretrained(folder, **at).eval())
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    report("demo bnb", AutoModelForCausalLM.from_pretrained(folder, quantization_config=int8, **at).eval())
else:
    torch.set_default_dtype(torch.float16)
    with torch.device(DEVICE):
        shape = LlamaConfig(num_hidden_layers=32)  # whose other defaults are LLaMA-2-7B's, too
        report("7b fp16", AutoModelForCausalLM.from_config(shape).eval())
