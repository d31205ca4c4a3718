"""What a batch does to the throughput: several sequences decoded together, through transformers' own `generate` or, on
a GPU, in our own loop.

A step reads the weights once for all its sequences, so the tokens a second grow with the batch until memory holds no
more of them: then a method with smaller weights has room for a larger batch. For every batch the models are loaded
anew: what was compiled for one is none of another's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmq import memory, telemetry
from llmq.bench.generate import Arrivals, GenerateBench, ModeSide, grouped, speeds_of
from llmq.bench.rounds import ratio, spread
from llmq.bench.setup import Setup, Side, whole_numbers
from llmq.contestant import Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.loading import Key, load_engine
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice
from llmq.machine.door import Lease
from llmq.methods import Method
from llmq.models.opening import Model
from llmq.models.reference_text import reference_text

if TYPE_CHECKING:
    from llmq.engine.llama_cuda import CudaLlama


@dataclass
class LeanHome:
    """Where an engine of our own loop is, which keeps the memory of a batch for the next turn; see `Home`."""

    engine: CudaLlama | None = None

    def load(self, key: Key, method: Method) -> int:
        self.engine = self.engine or load_engine(key).under(method)
        return self.engine.weight_bytes + self.engine.scale_bytes

    def generate(self, mode: str, prompts: list[list[int]], new_tokens: int, arrivals: Arrivals) -> list[int]:
        arrivals.put(None)
        found = []
        with closing(self.engine.start_several(prompts, SamplingSettings(max_new_tokens=new_tokens))) as generation:
            for place in range(new_tokens):
                found.append(generation.step() if place else generation.prefill())
                arrivals.put(found[-1])
        return [tokens[0].token_id for tokens in found]

    def forget(self) -> None:
        self.engine.spare.clear()

    def release(self) -> None:
        self.engine = None


@dataclass
class BatchSide(ModeSide):
    """A contestant with one size of batch. `prompts`: of as many tokens each; `predicted`: bytes with that batch;
    `largest`: the batch that fits by prediction into what was free before anything was loaded."""

    prompts: list[list[int]] = field(default_factory=list)
    predicted: int | None = None
    largest: int | None = None

    @property
    def batch(self) -> int:
        return len(self.prompts)

    @property
    def title(self) -> str:
        return f"{self.label}, {self.mode}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class BatchBench(GenerateBench):
    """In every round every contestant decodes once with each of `batches` sequences; each of them is another stretch of
    the fixed text, `prompt_tokens` long."""

    kind = "batch"
    own_loop = "lean"
    columns = ("method", "mode", "batch", "tokens_per_second", "row_tokens_per_second", "over_fp16", "prefill_seconds")
    columns += ("predicted_bytes", "peak_bytes", "largest_batch")
    modes: str = "eager"
    batches: str = "1,2,4,8,16,32,64"

    def __post_init__(self):
        super().__post_init__()
        whole_numbers("batches", self.batches)
        if self.lean and not self.device.startswith("cuda"):
            raise BadChoice("engine 'lean' decodes several sequences together on a GPU only; choose auto or hf")
        if self.lean and self.modes != type(self).modes:
            raise BadChoice("modes are transformers'; engine 'lean' has none")

    @property
    def lean(self) -> bool:
        """Whether it is our own loop that is measured."""
        return self.engine == self.own_loop

    def loop_of(self, contestant: Contestant, model: Model) -> str:
        if not self.lean:
            return super().loop_of(contestant, model)
        return choose_engines(self.engine, [contestant.method], model.config.to_dict(), self.device)[0]

    def conditions(self) -> dict:
        return super().conditions() | {"batch": whole_numbers("batches", self.batches)}

    def sides(self, setup: Setup) -> list[Side]:
        """Batch by batch, so that those whose speeds are compared run one after the other."""
        batches = whole_numbers("batches", self.batches)
        prompts = stretches(setup.model, self.prompt_tokens, max(batches))
        room = memory.HEADROOM * telemetry.free_bytes(self.device)
        found = []
        for batch in batches:
            for side in self._modes(setup):
                facts = {"mode": side.mode, "home": side.home, "prompts": prompts[:batch]}
                found.append(self._limited(BatchSide(side.contestant, side.key, **facts), room))
        return found

    def _modes(self, setup: Setup) -> list[ModeSide]:
        """Who takes part with every batch. Our own loop has no modes."""
        if not self.lean:
            return super().sides(setup)
        return [ModeSide(contestant, key, mode="lean", home=LeanHome()) for contestant, key in setup.entries]

    def groups(self, sides: list[BatchSide], *, apart: bool) -> list[list[BatchSide]]:
        """All with the same batch; alone where they do not fit together."""
        return grouped(sides, lambda side: (side.batch, id(side.home) if apart else None))

    def _limited(self, side: BatchSide, room: float) -> BatchSide:
        """With what it will need through transformers. What does not fit is tried on a GPU, which refuses it; a CPU's
        system would end the process."""
        model, method = side.key.model, side.contestant.method
        if self.lean:  # whose memory for a batch has no formula
            return side
        asked = {"tokens": self.positions, "answer": self.new_tokens}
        found = memory.predict(model.shape, method, **asked, batch=side.batch)
        side.largest = memory.largest_batch(model, method, room, **asked)
        side.predicted = None if found.kv is None else found.total
        if self.device == "cpu" and found.total > room:
            side.error = f"not tried: it needs about {found.total / 1e9:.2f} GB, and {room / 1e9:.2f} may be used"
        return side

    def _apart(self, keys: list) -> str:
        """Why the weights of all and the largest batch of one are not in memory at once; '' where they are."""
        most = max(whole_numbers("batches", self.batches))
        found = [memory.predict(key.model.shape, key.method, tokens=self.positions, batch=most) for key in keys]
        weights = [one.weights + one.scales for one in found]
        beside = [one.total - own for one, own in zip(found, weights, strict=True)]
        needed = sum(weights) + (sum if self.lean else max)(beside)  # our own loop keeps its caches
        free = telemetry.free_bytes(self.device)
        if len(keys) == 1 or needed <= memory.HEADROOM * free:
            return ""
        told = f"loaded together they need {needed / 1e9:.2f} GB for a batch of {most} and {free / 1e9:.2f} GB are free"
        return f"no rounds, and no ratio within one: {told}"

    def begin(self, lease: Lease, side: BatchSide, setup: Setup) -> dict:
        predicted = {"predicted_bytes": side.predicted, "largest_batch": side.largest}
        return super().begin(lease, side, setup) | {"batch": side.batch} | predicted

    def prompts(self, side: BatchSide, setup: Setup) -> list[list[int]]:
        return side.prompts

    def row(self, side: BatchSide) -> dict:
        """Tokens of the whole batch in a second, and of one sequence."""
        row = super().row(side) | {"row_tokens_per_second": None}
        if side.error:
            return row
        speeds = side.of("speed")
        row |= spread("tokens_per_second", [side.batch * speed for speed in speeds])
        return row | {"row_tokens_per_second": statistics.median(speeds)}

    def _row(self, side: BatchSide, sides: list[BatchSide], setup: Setup) -> dict:
        row = super()._row(side, sides, setup)
        return row | {"notes": [f"batch {side.batch}: {note}" for note in row["notes"]]}

    def beside(self, side: BatchSide, sides: list[BatchSide], setup: Setup) -> dict:
        """Against FP16 with the same batch, in the same mode."""
        found = {(other.label, other.mode, other.batch): other for other in sides}
        fp16 = found.get(("fp16", side.mode, side.batch))
        return ratio("over_fp16", speeds_of(side), speeds_of(fp16), rounds=not setup.apart)

    def result(self, setup: Setup, results: list[dict], conditions: dict, facts: dict | None = None) -> dict:
        return super().result(setup, results, conditions, facts) | {"findings": list(findings(results))}


def stretches(model: Model, tokens: int, count: int) -> list[list[int]]:
    """`count` prompts of `tokens` tokens each: one stretch of the text after the other, and from its start again."""
    ids = model.tokenize(reference_text()[: 20 * tokens * count + 200])
    places = range(0, tokens * count, tokens)
    return [[ids[(start + i) % len(ids)] for i in range(tokens)] for start in places]


def findings(rows: list[dict]) -> Iterator[str]:
    """At which batches a method is faster than FP16, and what fits, a sentence each."""
    everybody = dict.fromkeys((row["method"], row["mode"]) for row in rows)
    for method, mode in everybody:
        own = [row for row in rows if (row["method"], row["mode"]) == (method, mode)]
        if method != "fp16" and ("fp16", mode) in everybody:
            yield _crossover(f"{method} ({mode})", own)
        yield _limit(f"{method} ({mode})", own)


def _crossover(method: str, rows: list[dict]) -> str:
    """Faster, or slower, is what a method is in every round."""
    compared = [row for row in rows if row["over_fp16"] is not None]
    if not compared:
        return f"{method} and fp16 decoded no batch both."
    faster = [row["batch"] for row in compared if row.get("over_fp16_min", row["over_fp16"]) > 1]
    slower = [row["batch"] for row in compared if row.get("over_fp16_max", row["over_fp16"]) < 1]
    neither = [row["batch"] for row in compared if row["batch"] not in faster + slower]
    told = [f"{word} at {_listed(batches)}" for word, batches in (("faster", faster), ("slower", slower)) if batches]
    told += [f"neither at {_listed(neither)}, where the rounds disagree"] if neither else []
    against = f"{method} against fp16, by batch: {'; '.join(told)}"
    if faster and slower and min(faster) > max(slower):
        return f"{against}. It overtakes fp16 between batch {max(slower)} and {min(faster)}."
    if faster and slower and max(faster) < min(slower):
        return f"{against}. fp16 overtakes it between batch {max(faster)} and {min(slower)}."
    return f"{against}. There is no crossover."


def _limit(method: str, rows: list[dict]) -> str:
    """The largest batch, predicted and met."""
    met, failed = ([row["batch"] for row in rows if bool(row["error"]) == ended] for ended in (False, True))
    told = f"decoded {max(met)}" if met else "decoded none"
    told += f", failed at {min(failed)}" if failed else ""
    predicted = rows[0]["largest_batch"]
    fits = "not predicted" if predicted is None else f"{predicted:,} by prediction"
    return f"{method}: the largest batch that fits alone is {fits}; {told}."


def _listed(batches: list[int]) -> str:
    return ", ".join(map(str, batches))
