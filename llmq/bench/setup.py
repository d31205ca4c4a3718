"""What every speed benchmark shares: what is measured, the fixed prompt, the loops, the machine's own read speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from llmq.contestant import Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.loading import Key
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.machine.door import Lease
from llmq.models.opening import Model
from llmq.models.reference_text import reference_text

BANDWIDTH_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
BANDWIDTH_REPEATS = 9


@dataclass(frozen=True)
class Setup:
    """A benchmark ready to run: each contestant with what it is loaded as. `facts`: what was measured beforehand."""

    model: Model
    prompt_ids: list[int]
    entries: list[tuple[Contestant, Key]]
    facts: dict


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure. The prompt is `prompt_tokens` tokens of a fixed text, fed as they are.

    A subclass names its `kind`, the `columns` that people see, and measures one contestant in `measure`.
    """

    kind: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    model: str = "demo"
    contestants: tuple[Contestant, ...]
    device: str = "cpu"
    random_weights: bool = False
    prompt_tokens: int = 64
    repeats: int = 5
    engine: str = "auto"

    def __post_init__(self):
        for name in ("prompt_tokens", "repeats"):
            require_whole(name, getattr(self, name), 1)

    def run(self, lease: Lease) -> Iterator[Event | Progress | dict]:
        """Measure one contestant after the other, each alone in memory; last comes the result with the stable keys of
        `bench --json`."""
        conditions = self.conditions()
        setup = yield from self.prepare(lease)
        results = []
        for contestant, key in setup.entries:
            yield from lease.calibrate(key)
            yield lease.progress(f"measuring {contestant.label}")
            row = {"method": contestant.label, **self.measure(lease, contestant, key, setup)}
            results.append(row | {"memory_freed": lease.pool.drop(key).verified})
            yield lease.progress(f"{contestant.label}: {self.told(row)}")
        yield self.result(setup, results, conditions)

    def measure(self, lease: Lease, contestant: Contestant, key: Key, setup: Setup) -> dict:
        """The figures of one contestant. Nothing of its engine may outlive the call: it is then seen to be freed."""
        raise NotImplementedError

    def told(self, row: dict) -> str:
        """The most important figure of a finished row, in words."""
        raise NotImplementedError

    def conditions(self) -> dict:
        """What belongs beside the figures, as it is before anything runs."""
        return {}

    def facts(self) -> dict:
        """What is measured of the machine itself before the first contestant."""
        return {}

    def loop_of(self, contestant: Contestant, model: Model) -> str:
        """The loop that a contestant runs through."""
        return choose_engines(self.engine, [contestant.method], model.config.to_dict(), self.device)[0]

    @property
    def positions(self) -> int:
        """Tokens that prompt and answer need together."""
        return self.prompt_tokens + 1

    def prepare(self, lease: Lease) -> Generator[Event, None, Setup]:
        """Make the model ready and choose the loops.

        One contestant after the other and each labelled with its loop: each takes the best it has, also where there are
        two. Raises BadChoice for more tokens than the model reads.
        """
        model = yield from lease.open(self.model, random_weights=self.random_weights)
        if self.positions > model.context:
            needed = f"prompt and answer are {self.positions:,} tokens"
            raise BadChoice(f"{needed} and {self.model} reads {model.context:,}; choose fewer")
        keys = [Key.of(model, c.method, self.device, self.loop_of(c, model)) for c in self.contestants]
        entries = list(zip(self.contestants, keys, strict=True))
        return Setup(model, fixed_prompt(model, self.prompt_tokens), entries, self.facts())

    def result(self, setup: Setup, results: list[dict], conditions: dict) -> dict:
        """The stable keys around a benchmark's rows."""
        return {
            "kind": self.kind,
            "device": self.device,
            "model": self.model,
            "conditions": {
                "random_weights": self.random_weights,
                "prompt_tokens": self.prompt_tokens,
                "repeats": self.repeats,
                "batch": 1,
                **conditions,
                **describe(self.device, setup.model.source),
            },
            "results": results,
            **setup.facts,
        }


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median, and the lowest and the highest beside it."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def require_whole(name: str, value, lowest: int) -> None:
    if not isinstance(value, int) or value < lowest:
        raise BadChoice(f"{name} is {value!r}; choose a whole number of at least {lowest}")


def fixed_prompt(model: Model, tokens: int) -> list[int]:
    """The first `tokens` token ids of the English text."""
    ids = model.tokenize(reference_text()[: 20 * tokens + 200])
    if len(ids) < tokens:
        raise BadChoice(f"prompt_tokens is {tokens}; the English text gives {len(ids)}")
    return ids[:tokens]


def read_bandwidth(device: str) -> float:
    """Bytes per second this device reads from memory: the median time to sum a tensor much larger than its caches."""
    import torch

    cuda = device.startswith("cuda")
    data = torch.ones(BANDWIDTH_BYTES["cuda" if cuda else "cpu"] // 4, dtype=torch.float32, device=device)
    return data.nbytes / statistics.median(list(_sum_seconds(data, cuda))[2:])


def bandwidth_fraction(bytes_per_token: int | None, tokens_per_second: float, bandwidth: float) -> float | None:
    """Share of the read bandwidth that decoding used; None where the bytes are not known, and over 1: then the two were
    not measured alike."""
    if bytes_per_token is None:
        return None
    share = bytes_per_token * tokens_per_second / bandwidth
    return share if share <= 1 else None


def _sum_seconds(data, cuda: bool) -> Iterator[float]:
    import torch

    for _ in range(BANDWIDTH_REPEATS + 2):  # the first two warm up
        if cuda:
            torch.cuda.synchronize(data.device)
        started = time.perf_counter()
        data.sum().item()
        yield time.perf_counter() - started
