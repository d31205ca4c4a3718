"""An engine that takes as long as a script says, and a clock that moves only when something takes time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from llmq.engine.base import Token
from llmq.engine.sampling import SamplingSettings
from llmq.methods import METHODS, Method


class Clock:
    """Seconds that pass only in `take`."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True)
class Script:
    """One generation: its seconds by the engine's own timer, `between` what the host takes beside every step."""

    prefill: float = 1.0
    steps: tuple[float, ...] = ()
    between: float = 0.0
    kv_bytes: int = 0
    workspace_bytes: int = 0
    peak_bytes: int = 0


class Weightless:
    """Stands for a model that nobody looks into."""


@dataclass
class ScriptedEngine:
    """`script(engine)` is asked at every prefill; `under` gives a view with another method. Where `model` is a module,
    every call runs it, so that hooks see something."""

    clock: Clock
    script: Callable[[ScriptedEngine], Script]
    method: Method = METHODS["fp16"]
    name: str = "scripted"
    device: str = "cpu"
    model: object = field(default_factory=Weightless)
    warm_up_seconds: float = 0.0
    weight_bytes: int = 0
    scale_bytes: int = 0
    reserved_bytes: int = 0
    read_bytes_per_token: int = 0
    context: int = 128
    eos_ids: frozenset[int] = frozenset()
    share: float = 0.0
    prompt_checks: int | None = None

    def under(self, method: Method) -> ScriptedEngine:
        view = copy.copy(self)
        view.method = method
        return view

    def start(self, prompt_ids: list[int], settings: SamplingSettings) -> ScriptedGeneration:
        return ScriptedGeneration(self, prompt_ids, settings.max_new_tokens)

    def warm_up(self, prompt_ids: list[int]) -> None:
        self.clock.take(self.warm_up_seconds)

    def logits(self, ids: list[int], stopped=None) -> torch.Tensor:
        return torch.zeros(len(ids), 259)

    def outlier_share(self, ids: list[int]) -> float:
        return self.share


class ScriptedGeneration:
    """Fails when it is asked for more or for fewer tokens than its script has."""

    def __init__(self, engine: ScriptedEngine, prompt_ids: list[int], max_new_tokens: int):
        self.engine, self.prompt_ids, self.left = engine, prompt_ids, max_new_tokens
        self.script, self.steps = Script(), []

    kv_bytes = property(lambda self: self.script.kv_bytes)
    workspace_bytes = property(lambda self: self.script.workspace_bytes)
    peak_bytes = property(lambda self: self.script.peak_bytes)

    def prefill(self, stopped=None) -> Token:
        self.script = self.engine.script(self.engine)
        self.steps = list(self.script.steps)
        return self._token(self.prompt_ids, self.script.prefill)

    def step(self) -> Token:
        self.engine.clock.take(self.script.between)
        return self._token([0], self.steps.pop(0))

    def _token(self, ids: list[int], seconds: float) -> Token:
        assert self.left > 0, "more tokens than the settings allow"
        self.left -= 1
        self.engine.clock.take(seconds)
        if isinstance(self.engine.model, nn.Module):
            with torch.inference_mode():
                self.engine.model(torch.tensor([ids]))
        return Token(0, -1.0, seconds)

    def best(self, last: Token, count: int) -> dict[int, float]:
        return {0: 1.0}

    def close(self) -> None:
        assert not self.steps, "a step of the script was not taken"


def in_order(scripts: Iterable[Script]) -> Callable[[ScriptedEngine], Script]:
    """One script after the other, whichever view of the engine asks."""
    waiting = iter(scripts)
    return lambda engine: next(waiting)
