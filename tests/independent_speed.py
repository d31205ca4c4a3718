"""Decode speed and peak memory of plain transformers loops beside what `llmq` tells of the same model, in one process
and in turn.

Nothing collects it: `python tests/independent_speed.py [folder of the demo model]`; without a folder, the shape of
LLaMA-2-7B with random weights. `plain` has nothing of ours in it: transformers' model, one wait at the end. `token by
token` waits for every token, as whoever shows them has to. `ours` is told twice, as every result file does: by the
steps' own clock, and by the wall clock over all of them.
Memory on a GPU: the highest level of torch's allocator over what it was before the model came, less what cuBLAS took
for itself; `last logits` asks for those of the last token only, as we do.
"""

import gc
import os
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from llmq.engine.hf import HFEngine
from llmq.engine.sampling import SamplingSettings
from llmq.methods import parse_method

PROMPT, NEW, ROUNDS = 64, 24, int(os.environ.get("ROUNDS", "41"))
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
IDS = [i * 37 % 30000 + 5 for i in range(PROMPT)]


def settle():
    if DEVICE != "cpu":
        torch.cuda.synchronize()


@torch.inference_mode()
def plain(model, waits=False):
    """Seconds a token after the prompt, greedily."""
    out = model(torch.tensor([IDS], device=DEVICE), use_cache=True)
    token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
    settle()
    started = time.perf_counter()
    for _ in range(NEW - 1):
        out = model(token, past_key_values=past, use_cache=True)
        token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
        if waits:
            token.item()
    settle()
    return (time.perf_counter() - started) / (NEW - 1)


@torch.inference_mode()
def last_logits(model):
    """As `plain`, but for the prompt's other logits, which nobody reads."""
    out = model(torch.tensor([IDS], device=DEVICE), use_cache=True, logits_to_keep=1)
    token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
    for _ in range(NEW - 1):
        out = model(token, past_key_values=past, use_cache=True)
        token, past = out.logits[:, -1:].argmax(-1), out.past_key_values


def peak_over(base, run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


def report_memory(name, model, engine, base):
    """Bytes at the highest, of two plain loops and as they are told here."""
    plain(model)
    with_library = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    library = with_library - torch.cuda.memory_allocated()
    plain(model)  # by which cuBLAS has it again
    generation = engine.start(IDS, SamplingSettings(max_new_tokens=NEW))
    generation.prefill()
    for _ in range(NEW - 1):
        generation.step()
    told = engine.weight_bytes + engine.scale_bytes + generation.peak_bytes
    generation.close()
    for loop, run in (("plain", plain), ("last logits", last_logits)):
        run(model)
        peak = peak_over(base, lambda run=run: run(model)) - library
        print(
            f"{name:10} {loop:15} {peak / 1e6:9.2f} MB, told {told / 1e6:9.2f} MB: {told / peak - 1:+.2%}", flush=True
        )


def ours(engine):
    """Seconds a token by the steps' clock, and by the wall clock."""
    generation = engine.start(IDS, SamplingSettings(max_new_tokens=NEW))
    generation.prefill()
    started = time.perf_counter()
    seconds = sum(generation.step().seconds for _ in range(NEW - 1))
    wall = time.perf_counter() - started
    generation.close()
    return seconds / (NEW - 1), wall / (NEW - 1)


def report(name, load, method):
    base = 0
    if DEVICE != "cpu":
        gc.collect()
        torch.zeros(1, device=DEVICE)
        torch._C._cuda_clearCublasWorkspaces()
        base = torch.cuda.memory_allocated()
    model = load().eval()
    engine = HFEngine(model, parse_method(method), DEVICE)
    if DEVICE != "cpu":
        report_memory(name, model, engine, base)
    rounds = []
    for number in range(ROUNDS + 2):
        turns = {
            "plain": lambda: plain(model),
            "token by token": lambda: plain(model, waits=True),
            "ours": lambda: ours(engine),
        }
        order = list(turns)[number % 3 :] + list(turns)[: number % 3]
        times = {turn: turns[turn]() for turn in order}
        times["ours"], times["ours, wall"] = times["ours"]
        rounds.append(times)
    for turn in ("plain", "token by token", "ours", "ours, wall"):
        speeds = [1 / times[turn] for times in rounds[2:]]
        over = [times["plain"] / times[turn] for times in rounds[2:]]
        said = f"{statistics.median(speeds):8.2f} tok/s ({min(speeds):.2f} to {max(speeds):.2f})"
        print(f"{name:10} {turn:15} {said}  over plain {statistics.median(over):.3f}", flush=True)


if len(sys.argv) > 1:
    folder, at = sys.argv[1], {"dtype": torch.float16, "device_map": DEVICE}
    int8 = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    report("demo fp16", lambda: AutoModelForCausalLM.from_pretrained(folder, **at), "fp16")
    report("demo bnb", lambda: AutoModelForCausalLM.from_pretrained(folder, **int8, **at), "bnb-int8")
else:
    torch.set_default_dtype(torch.float16)
    with torch.device(DEVICE):
        shape = LlamaConfig(num_hidden_layers=32)  # whose other defaults are LLaMA-2-7B's, too
        report("7b fp16", lambda: AutoModelForCausalLM.from_config(shape), "fp16")
