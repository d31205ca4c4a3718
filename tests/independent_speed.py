"""Decode speed of plain transformers loops beside what `llmq` measures of the same model, in one process and in turn.

Nothing collects it: `python tests/independent_speed.py [folder of the demo model]`; without a folder, the shape of
LLaMA-2-7B with random weights. `plain` has nothing of ours in it: transformers' model, one wait at the end. `token by
token` waits for every token, as whoever shows them has to. `ours` is told twice, as every result file does: by the
steps' own clock, and by the wall clock over all of them.
"""

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


def ours(engine):
    """Seconds a token by the steps' clock, and by the wall clock."""
    generation = engine.start(IDS, SamplingSettings(max_new_tokens=NEW))
    generation.prefill()
    started = time.perf_counter()
    seconds = sum(generation.step().seconds for _ in range(NEW - 1))
    wall = time.perf_counter() - started
    generation.close()
    return seconds / (NEW - 1), wall / (NEW - 1)


def report(name, model, method):
    engine = HFEngine(model.eval(), parse_method(method), DEVICE)
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
    report("demo fp16", AutoModelForCausalLM.from_pretrained(folder, **at), "fp16")
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    report("demo bnb", AutoModelForCausalLM.from_pretrained(folder, quantization_config=int8, **at), "bnb-int8")
else:
    torch.set_default_dtype(torch.float16)
    with torch.device(DEVICE):
        shape = LlamaConfig(num_hidden_layers=32)  # whose other defaults are LLaMA-2-7B's, too
        report("7b fp16", AutoModelForCausalLM.from_config(shape), "fp16")
