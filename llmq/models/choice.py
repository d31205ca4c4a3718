"""Which model the app opens with, and the sentence that says why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.request import Request, urlopen

from llmq import telemetry
from llmq.models.presets import PRESETS

GPU_DEFAULT = "llama-2-7b-chat"
GPU_BYTES = 15e9  # FP16 weights of 7 B parameters, a KV cache and workspace; the int8 copy is then loaded in turn
HUB_TIMEOUT_SECONDS = 3


@dataclass(frozen=True)
class Choice:
    model: str
    reason: str


def choose_model(asked: str | None, device: str) -> Choice:
    """The model asked for; else LLaMA-2-7B-chat where a GPU holds it and the hub answers; else the demo model."""
    if asked:
        return Choice(asked, "")
    if not device.startswith("cuda"):
        return Choice("demo", "The small demo model, because there is no GPU here.")
    free = telemetry.free_bytes(device)
    if free < GPU_BYTES:
        return Choice("demo", f"The small demo model, because {free / 1e9:.0f} GB of VRAM are free and 7 B needs 15.")
    if not hub_has(PRESETS[GPU_DEFAULT].hub_id):
        return Choice("demo", "The small demo model, because the model hub cannot be reached from here.")
    return Choice(GPU_DEFAULT, "Chosen because this GPU holds it and the model hub answers.")


def hub_has(repository: str) -> bool:
    """Whether the repository's configuration is in the local cache, or the hub answers for it in a few seconds."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, "config.json"), str):
        return True
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    question = Request(hf_hub_url(repository, "config.json"), method="HEAD")
    try:
        with urlopen(question, timeout=HUB_TIMEOUT_SECONDS):
            return True
    except OSError:  # no name, no route, a refusal, a time-out, an HTTP error
        return False
