"""Which model the app opens with, and the sentence that says why."""

from __future__ import annotations

from dataclasses import dataclass

from llmq import telemetry
from llmq.errors import ModelUnavailable
from llmq.models import hub
from llmq.models.presets import PRESETS

GPU_DEFAULT = "llama-2-7b-chat"
GPU_BYTES = 15e9  # FP16 weights of 7 B parameters, a KV cache and workspace; the int8 copy is then loaded in turn


@dataclass(frozen=True)
class Choice:
    model: str
    reason: str


def choose_model(asked: str | None, device: str) -> Choice:
    """Return the model asked for; else LLaMA-2-7B-chat where it is here and a GPU holds it; else the demo model."""
    if asked:
        return Choice(asked, "")
    if not device.startswith("cuda"):
        return Choice("demo", "The small demo model, because there is no GPU here.")
    free = telemetry.free_bytes(device)
    if free < GPU_BYTES:
        return Choice("demo", f"The small demo model, because {free / 1e9:.0f} GB of VRAM are free and 7 B needs 15.")
    try:
        found = hub.plan(PRESETS[GPU_DEFAULT].hub_id)
    except ModelUnavailable:
        return Choice("demo", "The small demo model, because the model hub cannot be reached from here.")
    if found.cached:
        return Choice(GPU_DEFAULT, "Chosen because this GPU holds it and this machine has it.")
    get = f"`python app.py --model {GPU_DEFAULT}` fetches its {found.bytes / 1e9:.1f} GB"
    disk = f"{found.free_bytes / 1e9:.0f} GB are free on the disk"
    return Choice("demo", f"The small demo model, because {GPU_DEFAULT} is not here yet: {get}; {disk}.")
