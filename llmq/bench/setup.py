"""What every speed benchmark shares: what is measured, the fixed prompt, the rounds and what a row says of them."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from llmq import memory, telemetry
from llmq.bench.bandwidth import bytes_to_read
from llmq.bench.rounds import ALONE, SCHEDULE, ratio, turns, wide_figures
from llmq.contestant import Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.loading import Key
from llmq.environment import describe, doubts
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.machine.door import Lease
from llmq.machine.pool import FreedMemory
from llmq.models.loading import Source
from llmq.models.opening import Model
from llmq.models.reference_text import reference_text


@dataclass(frozen=True)
class Setup:
    """A benchmark ready to run: each contestant with what it is loaded as. `apart`: why not all are in memory at once;
    `doubts`: what spoke against the machine beforehand; `clocks`: the device's in MHz, after every counted round."""

    model: Model
    prompt_ids: list[int]
    entries: list[tuple[Contestant, Key]]
    apart: str = ""
    doubts: tuple[str, ...] = ()
    clocks: list[float] = field(default_factory=list)

    def note_clock(self, device: str) -> None:
        if (clock := telemetry.clock_mhz(device)) is not None:
            self.clocks.append(clock)


@dataclass
class Side:
    """One contestant during its rounds: what loading it told, and the figures of every counted turn. It holds no
    engine, so that memory given back is seen to come back."""

    contestant: Contestant
    key: Key
    known: dict = field(default_factory=dict)
    turns: list[dict] = field(default_factory=list)
    freed: FreedMemory | None = None

    @property
    def label(self) -> str:
        return self.contestant.label

    @property
    def title(self) -> str:
        """As it is told on the way."""
        return self.label

    def of(self, name: str) -> list:
        """One figure of every counted turn."""
        return [turn[name] for turn in self.turns]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Who is measured, where, and in how many rounds that count. A subclass names its `kind`, which is its word at the
    command line, and the `columns` that people see."""

    kind: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    contestants: tuple[Contestant, ...]
    device: str = "cpu"
    repeats: int = 5

    def __post_init__(self):
        require_whole("repeats", self.repeats, 1)

    def circumstances(self, clocks: list[float], source: Source | None = None) -> dict:
        """How and on what this was measured."""
        clock_mhz = [min(clocks), max(clocks)] if clocks else None
        asked = {"repeats": self.repeats, "clock_mhz": clock_mhz, "command": self.typed()}
        return asked | describe(self.device, source)

    def typed(self) -> str:
        """The words that ask for this benchmark at the command line."""
        words = ["python", "-m", "llmq", "bench", self.kind, "--device", self.device]
        words += ["--methods", ",".join(contestant.label for contestant in self.contestants)]
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name not in ("contestants", "device") and value != setting.default:
                words += [f"--{setting.name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class Bench(Asked):
    """What to measure. The prompt is `prompt_tokens` tokens of a fixed text, fed as they are. Every figure is a median
    over `repeats` rounds, in each of which every contestant has a turn; one more round before them is not counted.

    A subclass names the figures that are `compared` with FP16's, each by the key of the ratio, and says what to note of
    an engine once loaded (`begin`), what one turn measures (`turn`) and what a row has (`row`).
    """

    compared: ClassVar[Mapping[str, str]] = {}
    model: str = "demo"
    random_weights: bool = False
    prompt_tokens: int = 64
    engine: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        require_whole("prompt_tokens", self.prompt_tokens, 1)

    def run(self, lease: Lease) -> Iterator[Event | Progress | dict]:
        """Everybody in turn, round by round; last comes the result with the stable keys of `bench --json`. Where not
        all fit into memory at once, each has its rounds alone, and the result says so."""
        conditions = self.conditions()
        setup = yield from self.prepare(lease)
        sides = self.sides(setup)
        for group in self.groups(sides, apart=bool(setup.apart)):
            yield from self._measure(lease, setup, group)
        rows = [self._row(side, sides, setup) for side in sides]
        yield self.result(setup, rows, conditions, self.facts(sides))

    def sides(self, setup: Setup) -> list[Side]:
        """Who takes part."""
        return [Side(contestant, key) for contestant, key in setup.entries]

    def groups(self, sides: list[Side], *, apart: bool) -> list[list[Side]]:
        """Who is in memory together."""
        return [[side] for side in sides] if apart else [sides]

    def _measure(self, lease: Lease, setup: Setup, sides: list[Side]) -> Iterator[Event | Progress]:
        """Load these, let everybody have a turn in every round, and free them."""
        for side in sides:
            yield from lease.calibrate(side.key)
            yield lease.progress(f"loading {side.title}")
            side.known = self.begin(lease, side, setup)
        for number in range(self.repeats + 1):
            for side in turns(sides, number):
                yield lease.progress(f"round {number} of {self.repeats}: {side.title}")
                turn = self.turn(lease, side, setup, number)
                side.turns += [turn] if number else []
            if number:
                setup.note_clock(self.device)
                self.end_round(sides)
        self.end(lease, setup, sides)

    def begin(self, lease: Lease, side: Side, setup: Setup) -> dict:
        """Load a contestant; the part of its row that no turn changes."""
        engine = lease.get(side.key, side.contestant.method)
        engine.warm_up(setup.prompt_ids)
        return {"engine": engine.name, "weight_bytes": engine.weight_bytes}

    def turn(self, lease: Lease, side: Side, setup: Setup, number: int) -> dict:
        """The figures of one turn. Nothing of the engine may outlive the call: it is then seen to be freed."""
        raise NotImplementedError

    def end_round(self, sides: list[Side]) -> None:
        """Measure what belongs to the round as a whole."""

    def end(self, lease: Lease, setup: Setup, sides: list[Side]) -> None:
        """Free every engine, and note whether its memory was seen to come back."""
        freed = {key: lease.pool.drop(key) for key in dict.fromkeys(side.key for side in sides)}
        for side in sides:
            side.freed = freed[side.key]

    def row(self, side: Side) -> dict:
        """What the turns of a contestant come to."""
        raise NotImplementedError

    def _row(self, side: Side, sides: list[Side], setup: Setup) -> dict:
        row = {"method": side.label, "memory_freed": bool(side.freed and side.freed.verified), **side.known}
        row |= {**self.row(side), **self.beside(side, sides, setup)}
        return row | {"notes": list(notes_of(row))}

    def beside(self, side: Side, sides: list[Side], setup: Setup) -> dict:
        """What a contestant is against the others: how many times FP16's figures in the same loop."""
        fp16 = next((other for other in sides if other.label == "fp16"), None)
        found = dict.fromkeys(self.compared)
        if not found or fp16 is None:
            return found
        if (loop := fp16.known["engine"]) != side.known["engine"]:
            reason = f"no ratio to FP16, which ran through another loop ({loop}); --engine hf puts both through one"
            return found | {"over_fp16_refused": reason}
        for name, figure in self.compared.items():
            found |= ratio(name, side.of(figure), fp16.of(figure), rounds=not setup.apart)
        return found

    def conditions(self) -> dict:
        """What belongs beside the figures, as it is before anything runs."""
        return {}

    def facts(self, sides: list[Side]) -> dict:
        """What was measured of the machine itself."""
        return {}

    def loop_of(self, contestant: Contestant, model: Model) -> str:
        """The loop that a contestant runs through."""
        return choose_engines(self.engine, [contestant.method], model.config.to_dict(), self.device)[0]

    @property
    def positions(self) -> int:
        """Tokens that prompt and answer need together."""
        return self.prompt_tokens + 1

    def prepare(self, lease: Lease) -> Generator[Event, None, Setup]:
        """Make the model ready, free what was loaded before, and choose the loops: each takes the best it has, also
        where there are two, and is labelled with it. Raises BadChoice for more tokens than the model reads.
        """
        model = yield from lease.open(self.model, random_weights=self.random_weights)
        if self.positions > model.context:
            needed = f"prompt and answer are {self.positions:,} tokens"
            raise BadChoice(f"{needed} and {self.model} reads {model.context:,}; choose fewer")
        lease.pool.drop_others(set())
        keys = [Key.of(model, c.method, self.device, self.loop_of(c, model)) for c in self.contestants]
        entries = list(zip(self.contestants, keys, strict=True))
        told = tuple(doubts(self.device))
        return Setup(model, fixed_prompt(model, self.prompt_tokens), entries, self._apart(keys), told)

    def _apart(self, keys: list[Key]) -> str:
        """Why not everybody can be in memory at once, with room for a reading of the bandwidth; '' where all can."""
        free = telemetry.free_bytes(self.device) - bytes_to_read(self.device)
        wanted = [memory.predict(key.model.shape, key.method, tokens=self.positions) for key in dict.fromkeys(keys)]
        reason = memory.plan("interleave", wanted, free).reason if len(wanted) > 1 else ""
        return reason and f"no rounds, and no ratio within one: {reason}"

    def result(self, setup: Setup, results: list[dict], conditions: dict, facts: dict | None = None) -> dict:
        """The stable keys around a benchmark's rows."""
        conditions = {
            "random_weights": self.random_weights,
            "prompt_tokens": self.prompt_tokens,
            "batch": 1,
            "rounds": not setup.apart,
            "schedule": ALONE if setup.apart else SCHEDULE,
            **conditions,
            **self.circumstances(setup.clocks, setup.model.source),
        }
        told = [*filter(None, [setup.apart]), *setup.doubts, *wide_figures(facts or {})]
        asked = {"kind": self.kind, "device": self.device, "model": self.model}
        return {**asked, "conditions": conditions, "notes": told, "results": results, **(facts or {})}


@dataclass(frozen=True, kw_only=True)
class DecodingBench(Bench):
    """A benchmark in which `new_tokens` tokens follow the prompt."""

    new_tokens: int = 64

    def __post_init__(self):
        super().__post_init__()
        require_whole("new_tokens", self.new_tokens, 2)

    @property
    def positions(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def conditions(self) -> dict:
        return {"new_tokens": self.new_tokens}


def notes_of(row: dict) -> Iterator[str]:
    """What speaks against the figures of a row, a sentence each."""
    yield from wide_figures(row)
    yield from (reason for key, reason in row.items() if key.endswith("_refused") and reason)
    if not row.get("memory_freed", True):
        yield "its memory was not seen to be freed"


def require_whole(name: str, value, lowest: int) -> None:
    if not isinstance(value, int) or value < lowest:
        raise BadChoice(f"{name} is {value!r}; choose a whole number of at least {lowest}")


def whole_numbers(name: str, text: str) -> list[int]:
    """'1,2,4' as numbers of at least 1. Raises BadChoice for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise BadChoice(f"{name} is {text!r}; choose whole numbers of at least 1 with commas between them")
    return [int(part) for part in parts]


def fixed_prompt(model: Model, tokens: int) -> list[int]:
    """The first `tokens` token ids of the English text."""
    ids = model.tokenize(reference_text()[: 20 * tokens + 200])
    if len(ids) < tokens:
        raise BadChoice(f"prompt_tokens is {tokens}; the English text gives {len(ids)}")
    return ids[:tokens]
