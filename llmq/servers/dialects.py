"""The kinds of servers: what each takes and tells beyond the protocol that they share.

A field that a server does not know is refused by some (transformers: 422) and ignored by others, so each is sent what
its documentation names. Sources: the API references of vLLM 0.10, SGLang 0.5, llama.cpp's server, TGI 3, Ollama 0.12
and the code of transformers 5.24's `serve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmq.errors import unknown

ECHO = "echo"  # the prompt comes back before the answer, in OpenAI's older form
PROMPT_LOGPROBS = "prompt_logprobs"  # a list beside the answer, by ids


@dataclass(frozen=True)
class Dialect:
    """One kind of server. `ids`: takes a prompt of token ids; `top_k`: filters by it; `most_likeliest`: tokens at a
    place whose log-probabilities it tells, 0 for none at all; `reads`: the field that asks for those of a text that it
    is given, '' where none does (llama.cpp's server tells those of its answer alone, issue 27174, and llama-cpp-python
    tells them one place late, its issue 1983); `own`: fields of its own that are always sent; `metrics`:
    what `/metrics` beside the API calls the share of its cache that is in use, if it tells."""

    name: str
    title: str
    ids: bool = False
    top_k: bool = False
    most_likeliest: int = 5
    reads: str = ""
    own: Mapping[str, Any] = field(default_factory=dict, compare=False)
    metrics: str = ""


_UNPUNISHED = {"repetition_penalty": 1.0}  # else that of the model's own generation settings
_ALL = (
    Dialect("openai", "a server", reads=ECHO),
    Dialect(
        "vllm", "vLLM", ids=True, top_k=True, reads=PROMPT_LOGPROBS, own={"return_token_ids": True} | _UNPUNISHED,
        metrics="vllm:kv_cache_usage_perc",
    ),
    Dialect("sglang", "SGLang", ids=True, top_k=True, reads=ECHO, own=_UNPUNISHED, metrics="sglang:token_usage"),
    Dialect("llama.cpp", "llama.cpp", top_k=True, own={"repeat_penalty": 1.0}),
    Dialect("tgi", "TGI"),
    Dialect("ollama", "Ollama"),
    Dialect("transformers", "transformers", most_likeliest=0),
)  # fmt: skip
DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in _ALL}


def dialect_named(name: str) -> Dialect:
    """Raises BadChoice naming the choices."""
    if name not in DIALECTS:
        raise unknown("kind of server", name, DIALECTS)
    return DIALECTS[name]
