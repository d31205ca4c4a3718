"""The interface of every engine, and the loop over tokens that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from llmq.errors import NOT_A_NUMBER, UserError

if TYPE_CHECKING:
    import torch

    from llmq.engine.sampling import SamplingSettings
    from llmq.methods import Method

SHORTEST_CAPACITY = 256
WARM_UP_TOKENS = 16


def capacity_for(tokens: int, context: int) -> int:
    """Return the positions the lean loop allocates: the next power of two, so that few graphs serve many lengths."""
    return min(context, max(SHORTEST_CAPACITY, 1 << (tokens - 1).bit_length()))


def warm_up_length(tokens: int, device: str) -> int:
    """Return how many tokens of a prompt a warm-up reads. A GPU loads kernels by shape, so there the whole prompt goes
    through; a CPU has nothing shape-bound to load, and would read a long one twice."""
    return tokens if device.startswith("cuda") else min(tokens, WARM_UP_TOKENS)


class Interrupted(Exception):
    """Raised out of a forward pass when the run was stopped."""


@dataclass(frozen=True)
class Token:
    """One sampled token, the natural log of its probability, and the seconds its forward pass and sampling took.
    `end`: why no other follows: 'eos', 'length' or 'context'; '' where one does."""

    token_id: int
    logprob: float
    seconds: float
    end: str = ""


def token_of(token_id: float, logprob: float, seconds: float) -> Token:
    """Make a Token of what a loop found. Raises UserError where its probability is not a number."""
    if math.isnan(logprob):
        raise UserError(NOT_A_NUMBER)
    return Token(int(token_id), logprob, seconds)


class Generation(Protocol):
    """One generation under way: `prefill()` gives token 0, each `step()` the next; `close()` frees its KV cache.

    Bytes: `kv_bytes` of the cache as allocated, `workspace_bytes` the most a call needed beyond weights and cache,
    `peak_bytes` the most both took together, `allocator_peak_bytes` everyone's on the device during our calls.
    """

    kv_bytes: int
    workspace_bytes: int
    peak_bytes: int
    allocator_peak_bytes: int

    def prefill(self, stopped: Callable[[], bool] | None = None) -> Token: ...
    def step(self) -> Token: ...
    def best(self, last: Token, count: int) -> dict[int, float]:
        """Return the `count` likeliest tokens at the place of the last one, id -> probability, before temperature and
        filters. Its time is no part of a step's."""

    def close(self) -> None: ...


class Writer(Protocol):
    """The smallest engine: it continues a prompt, wherever it runs. `name` is the loop it runs through, and speeds
    compare within one. What it cannot tell (bytes, say) is None. `prompt_checks`: how often a prefill asks `stopped`,
    evenly while it goes on; None where that says nothing, as on a GPU, which the asking runs ahead of."""

    name: str
    device: str
    weight_bytes: int | None
    context: int
    eos_ids: frozenset[int]
    prompt_checks: int | None

    def start(self, prompt_ids: list[int], settings: SamplingSettings) -> Generation: ...
    def warm_up(self, prompt_ids: list[int]) -> None: ...


class Engine(Writer, Protocol):
    """An engine that holds a model in this process: one model under one method on one device.

    `model` holds the weights; `reserved_bytes` is what stays allocated beside them between generations. `under` gives a
    view of the same weights with other live fields (a threshold), for generations of its own.
    """

    model: object
    method: Method
    scale_bytes: int
    reserved_bytes: int
    read_bytes_per_token: int

    def under(self, method: Method) -> Engine: ...
    def outlier_share(self, ids: list[int]) -> float: ...
    def logits(self, ids: list[int], stopped: Callable[[], bool] | None = None) -> torch.Tensor:
        """Return (tokens, vocab_size) next-token logits after each of `ids`, in one call. `stopped` as in `prefill`."""

    def decode_logits(self, ids: list[int], stopped: Callable[[], bool] | None = None) -> torch.Tensor:
        """As `logits`, through the decode step with its KV cache: a call a token, each fed the text's own."""


def generate(
    engine: Writer, prompt_ids: list[int], settings: SamplingSettings, stopped: Callable[[], bool] | None = None
) -> Iterator[Token]:
    """Yield the tokens that `engine` writes after a prompt; the last one says why it is the last. The cache is freed
    when the stream ends or is closed. Raises Interrupted when stopped."""
    generation = engine.start(prompt_ids, settings)
    try:
        yield from tokens_of(generation, engine, len(prompt_ids), settings, stopped)
    finally:
        generation.close()


def tokens_of(
    generation: Generation,
    engine: Writer,
    prompt_tokens: int,
    settings: SamplingSettings,
    stopped: Callable[[], bool] | None = None,
) -> Iterator[Token]:
    """Yield the tokens of a generation until it ends: the one loop over tokens. An end-of-text is yielded, as 'eos'."""
    for number in range(1, settings.max_new_tokens + 1):
        token = generation.step() if number > 1 else generation.prefill(stopped)
        if token.token_id in engine.eos_ids:
            token = replace(token, end="eos")
        elif number == settings.max_new_tokens:
            token = replace(token, end="length")
        elif prompt_tokens + number >= engine.context:
            token = replace(token, end="context")
        yield token
        if token.end:
            return
        if stopped is not None and stopped():
            raise Interrupted
