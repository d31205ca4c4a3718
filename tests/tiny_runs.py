"""Comparisons over the tiny LLaMA: fast enough to run dozens, and everything about them is known exactly."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmq.cli import main
from llmq.contestant import Contestant
from llmq.engine.hf import HFEngine
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.events import Event, Finished, Memory, Step
from llmq.labs.compare import Comparison
from llmq.machine.door import Lease, Machine
from llmq.methods import parse_method
from llmq.models.loading import Source, resolve
from llmq.models.opening import Model

RUN_KEYS = {"model", "device", "schedule", "contestants", "agreement"}  # of `compare --json`, at least
CONTESTANT_KEYS = {
    "method",
    "text",
    "token_ids",
    "prompt_tokens",
    "load_seconds",
    "prefill_seconds",
    "decode_tokens_per_second",
    "weight_bytes",
    "kv_bytes",
    "peak_bytes",
}
PROMPT = "Hello LLaMA"  # eleven bytes, eleven tokens
# Keys and values · 2 layers · 2 heads · 8 wide · bytes of one number
KV_BYTES_A_TOKEN = {"fp32": 256, "bf16": 128, "fp16": 128, "bnb-int8": 128}


@contextmanager
def light() -> Iterator[None]:
    """Tiny products on one thread, and the libraries' objects out of the collector's sight: measured 4 times faster.

    Two threads wait for each other longer than a tiny product takes; every run collects garbage when it ends, and
    walking through torch and transformers is most of that. What is made inside the block is collected as ever.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def comparison(folder, methods: str = "fp32,bf16", *, prompt: str = PROMPT, schedule: str = "interleave", **sampling):
    """A comparison on the CPU; `sampling` changes the settings (6 greedy tokens by default)."""
    return Comparison(
        prompt=prompt,
        model=str(folder),
        contestants=tuple(Contestant.parse(name) for name in methods.split(",")),
        sampling=SamplingSettings(**({"max_new_tokens": 6} | sampling)),
        schedule=schedule,
    )


def best_of(engine, ids: list[int], count: int) -> dict[int, float]:
    """The likeliest tokens after `ids`, by reading them in one call."""
    found = engine.logits(ids)[-1].float().softmax(-1).topk(count)
    return dict(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def source_of(folder) -> Source:
    return resolve(str(folder))


def key_of(model, method: str, device: str = "cpu", loop: str = "hf") -> Key:
    """Of a folder or of what a name was resolved to."""
    source = model if isinstance(model, Source) else source_of(model)
    return Key.of(Model(source), parse_method(method), device, loop)


def engine_of(machine: Machine, folder, method: str) -> HFEngine:
    """Of a folder or of what a name was resolved to; calibrated where its method needs it."""
    return Lease(machine, "cpu", threading.Event()).get(key_of(folder, method), parse_method(method))


def without_memory(events) -> list[Event]:
    return [event for event in events if not isinstance(event, Memory)]


def outline(events) -> list[tuple[str, str]]:
    """(kind, contestant) of every event but the memory samples."""
    return [(type(event).__name__, getattr(event, "contestant", "")) for event in without_memory(events)]


def reasons(events) -> dict[str, str]:
    return {event.contestant: event.reason for event in events if isinstance(event, Finished)}


def token_ids(events, contestant: str) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Step) and event.contestant == contestant]


def stopped_when(comparison: Comparison, machine: Machine, condition) -> list[Event]:
    """Every event of a run that is stopped right after the first event for which `condition(event)` holds."""
    stop, seen = threading.Event(), []
    for event in machine.run(comparison, stop=stop):
        seen.append(event)
        if condition(event):
            stop.set()
    return seen


def sampler_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "llmq-sampler"]


def compare_options(folder, *more) -> list:
    """A short comparison on the command line."""
    return ["compare", PROMPT, "--model", folder, "--device", "cpu", "--max-new-tokens", 4, *more]


def run_cli(capsys, *arguments) -> tuple[int, list[str], list[str]]:
    """Run one command; its exit status, lines of standard output, lines of standard error."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()
