"""What every engine offers, and the two plain things they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llmq.errors import NOT_A_NUMBER, UserError

if TYPE_CHECKING:
    import torch

    from llmq.engine.sampling import SamplingSettings
    from llmq.methods import Method

SHORTEST_CAPACITY = 256


def capacity_for(tokens: int, context: int) -> int:
    """Positions the lean loop makes room for: the next power of two, so that few graphs serve many lengths."""
    return min(context, max(SHORTEST_CAPACITY, 1 << (tokens - 1).bit_length()))


class Interrupted(Exception):
    """Raised out of a forward pass when the run was stopped."""


@dataclass(frozen=True)
class Token:
    """One sampled token, the natural log of its probability, and the seconds its forward pass and sampling took."""

    token_id: int
    logprob: float
    seconds: float


def token_of(token_id: float, logprob: float, seconds: float) -> Token:
    """A token as a loop found it. Raises UserError where its probability is not a number."""
    if math.isnan(logprob):
        raise UserError(NOT_A_NUMBER)
    return Token(int(token_id), logprob, seconds)


class Generation(Protocol):
    """One answer in the making: `prefill()` gives token 0, each `step()` the next; `close()` frees its KV cache.

    Bytes: `kv_bytes` of the cache as allocated, `workspace_bytes` the most a call needed beyond weights and cache,
    `peak_bytes` the most both took together, `allocator_peak_bytes` everyone's on the device during our calls.
    """

    kv_bytes: int
    workspace_bytes: int
    peak_bytes: int
    allocator_peak_bytes: int

    def prefill(self, stopped: Callable[[], bool] | None = None) -> Token: ...
    def step(self) -> Token: ...
    def close(self) -> None: ...


class Engine(Protocol):
    """One model under one method on one device. `name` is the loop it runs through; speeds compare within one loop.
    `under` gives a view of the same weights with other live fields (a threshold), for generations of its own.

    `model` holds the weights; `room_bytes` is what stays allocated beside them between generations.
    """

    name: str
    device: str
    model: object
    method: Method
    weight_bytes: int
    scale_bytes: int
    room_bytes: int
    read_bytes_per_token: int
    context: int
    eos_ids: frozenset[int]

    def under(self, method: Method) -> Engine: ...
    def start(self, prompt_ids: list[int], settings: SamplingSettings) -> Generation: ...
    def warm_up(self, prompt_ids: list[int]) -> None: ...
    def logits(self, ids: list[int], stopped: Callable[[], bool] | None = None) -> torch.Tensor: ...
    def sixteen_bit_share(self, ids: list[int]) -> float: ...
