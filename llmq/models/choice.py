"""Which model the app opens with, and the sentence that says why."""

from __future__ import annotations

from dataclasses import dataclass

from llmq import telemetry
from llmq.errors import ModelUnavailable
from llmq.models import hub
from llmq.models.presets import PRESETS

GPU_DEFAULT = "llama-2-7b-chat"
HOSTED_DEFAULT = "smollm2-1.7b-instruct"  # of a Space or a notebook with a GPU: needs no account, soon there
HOSTED_BYTES = 8e9  # FP16 and int8 weights of 1.7 B parameters side by side, with caches and workspace
GPU_BYTES = 15e9  # FP16 weights of 7 B parameters, a KV cache and workspace; the int8 copy is then loaded in turn


@dataclass(frozen=True)
class Choice:
    model: str
    reason: str


def choose_model(asked: str | None, device: str, *, hosted: bool = False) -> Choice:
    """Return the model asked for; else a GPU's default where the GPU holds it: of a host for a while SmolLM2-1.7B,
    elsewhere LLaMA-2-7B-chat where it is here; else the demo model."""
    if asked:
        return Choice(asked, "")
    if not device.startswith("cuda"):
        return Choice("demo", "The small demo model, because there is no GPU here.")
    name, size, needed = (HOSTED_DEFAULT, "1.7 B", HOSTED_BYTES) if hosted else (GPU_DEFAULT, "7 B", GPU_BYTES)
    free = telemetry.free_bytes(device)
    if free < needed:
        room = f"{free / 1e9:.0f} GB of VRAM are free and {size} needs {needed / 1e9:.0f}"
        return Choice("demo", f"The small demo model, because {room}.")
    try:
        found = hub.plan(PRESETS[name].hub_id)
    except ModelUnavailable:
        return Choice("demo", "The small demo model, because the model hub cannot be reached from here.")
    if hosted:
        return Choice(name, "Chosen because it is soon there and loads within seconds.")
    if found.cached:
        return Choice(GPU_DEFAULT, "Chosen because this GPU holds it and this machine has it.")
    get = f"`python app.py --model {GPU_DEFAULT}` fetches its {found.bytes / 1e9:.1f} GB"
    disk = f"{found.free_bytes / 1e9:.0f} GB are free on the disk"
    return Choice("demo", f"The small demo model, because {GPU_DEFAULT} is not here yet: {get}; {disk}.")
