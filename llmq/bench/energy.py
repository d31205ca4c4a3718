"""Joules a token: what a prompt and what an answer take, by method, from the device's own counter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from llmq.bench.joules import Meter, Stretch, meter_of
from llmq.bench.rounds import spread
from llmq.bench.setup import DecodingBench, Setup, Side, require_whole
from llmq.engine.base import Engine
from llmq.engine.sampling import SamplingSettings
from llmq.machine.door import Lease

PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class EnergyBench(DecodingBench):
    """In every round every contestant reads the prompt again and again for `seconds`, and then writes `new_tokens`
    tokens after it until that has taken `seconds` too; at the end of the round nobody computes for as long, with all
    models loaded: the power that is idle. Nothing else of the machine is counted, a GPU's host least of all."""

    kind = "energy"
    compared: ClassVar[Mapping[str, str]] = {f"{p}_joules_over_fp16": f"{p}_joules_per_token" for p in PHASES}
    columns = ("method", "engine", *chain.from_iterable(
        (f"{p}_joules_per_token", f"{p}_joules_per_token_over_idle", f"{p}_joules_over_fp16") for p in PHASES
    ))  # fmt: skip
    prompt_tokens: int = 512
    new_tokens: int = 512
    repeats: int = 3
    seconds: int = 3

    def __post_init__(self):
        super().__post_init__()
        require_whole("seconds", self.seconds, 1)

    def conditions(self) -> dict:
        meter = meter_of(self.device)
        counter = {"counter": meter.source, "counter_step_seconds": meter.step_seconds()}
        return super().conditions() | {"seconds": self.seconds} | counter

    def turn(self, lease: Lease, side: Side, setup: Setup, number: int) -> dict:
        """The stretches of both phases; what they come to is known once the round's idle power is."""
        engine, meter = lease.get(side.key, side.contestant.method), meter_of(self.device)
        reading = meter.of(lambda: self._read(engine, setup.prompt_ids, meter.clock, lease.check))
        return {"prefill": reading, "decode": self._written(engine, setup.prompt_ids, meter, lease.check)}

    def _read(self, engine: Engine, prompt_ids: list[int], clock: Callable[[], float], check: Callable) -> int:
        """Read the prompt until `seconds` are over."""
        started, tokens = clock(), 0
        while clock() - started < self.seconds:
            check()
            with closing(engine.start(prompt_ids, SamplingSettings(max_new_tokens=1))) as generation:
                generation.prefill()
            tokens += len(prompt_ids)
        return tokens

    def _written(self, engine: Engine, prompt_ids: list[int], meter: Meter, check: Callable) -> Stretch:
        """Generations until their steps took `seconds`; the prompt is read before each stretch begins."""
        found = Stretch(0, 0.0, 0.0, 0.0)
        while found.seconds < self.seconds:
            check()
            settings = SamplingSettings(max_new_tokens=self.new_tokens)
            with closing(engine.start(prompt_ids, settings)) as generation:
                generation.prefill()
                found += meter.of(lambda write=generation.step: len([write() for _ in range(self.new_tokens - 1)]))
        return found

    def end_round(self, sides: list[Side]) -> None:
        idle = meter_of(self.device).idle_watts(self.seconds)
        for turn in (side.turns[-1] for side in sides):
            turn["idle_watts"] = idle
            for phase in PHASES:
                turn |= {f"{phase}_{name}": value for name, value in turn[phase].figures(idle).items()}

    def row(self, side: Side) -> dict:
        names = ("joules_per_token", "joules_per_token_over_idle", "watts", "tokens_per_second")
        found = (spread(f"{phase}_{name}", side.of(f"{phase}_{name}")) for phase in PHASES for name in names)
        return dict(chain.from_iterable(figures.items() for figures in found))

    def facts(self, sides: list[Side]) -> dict:
        readings = dict.fromkeys(chain.from_iterable(side.of("idle_watts") for side in sides))
        return spread("idle_watts", list(readings))
