"""The memory ledger: the bytes that were predicted of a model beside those that it takes, line by line.

Each method is loaded, reads the prompt, writes its tokens and is freed, by itself; nothing else is loaded. The first
round is not counted: it brings libraries and compiled kernels into the process, so that what a later one adds is the
model's. What is measured in all is what the process takes more than before the model was loaded, at its highest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from llmq import memory, telemetry
from llmq.bench.setup import DecodingBench, Setup, Side, require_whole
from llmq.bench.speed import free_library_workspace
from llmq.engine.base import Engine, Generation
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice
from llmq.events import Loading
from llmq.formatting import format_bytes, format_change
from llmq.levels import Level, highest_level, mapped_files, process_of
from llmq.machine.door import Lease
from llmq.machine.pool import reclaim
from llmq.methods.swap import stored_tensors
from llmq.models.opening import Model

BOUNDS = {"weights_kv_error": 0.03, "error": 0.15}
LINES = {  # measured; together they are the process's
    "weight_bytes": "weights and scales",
    "kv_bytes": "KV cache",
    "activation_bytes": "activations",
    "library_bytes": "workspace of libraries",
    "slack_bytes": "the allocator's slack",
    "unexplained_bytes": "not explained",
}
WATCHED_HZ = 100.0  # a layer of a small model takes longer than a hundredth of a second to read a prompt


@dataclass(frozen=True)
class Moment:
    """KV cache and activations of a generation at once."""

    kv: int
    activations: int


@dataclass(frozen=True, kw_only=True)
class LedgerBench(DecodingBench):
    """`window`: tokens of a sliding window, as Mistral's, of a shape with random weights; 0 for none."""

    kind = "memory"
    columns = ("method", "engine", "predicted_bytes", "process_bytes", "error", "weights_kv_error", *LINES)
    repeats: int = 1
    window: int = 0

    def __post_init__(self):
        super().__post_init__()
        require_whole("window", self.window, 0)
        if self.window and not self.random_weights:
            raise BadChoice(f"window is {self.window}; give it with --random-weights: a trained model has its own")

    def conditions(self) -> dict:
        level = Level.of(self.device)
        return super().conditions() | {"window": self.window, "counted": level.counted, "schedule": "each alone"}

    def opened(self, lease: Lease) -> Generator[Loading, None, Model]:
        model = yield from super().opened(lease)
        return Model(replace(model.source, window=self.window)) if self.window else model

    def _apart(self, keys: list) -> str:
        return ""  # one at a time, in every round

    def begin(self, lease: Lease, side: Side, setup: Setup) -> dict:
        asked = {"tokens": self.positions, "answer": self.new_tokens, "loop": side.key.loop, "device": self.device}
        found = memory.predict(setup.model.shape, side.key.method, **asked)
        if found.kv is None:
            raise BadChoice(f"what the attention of {self.model} keeps is not known; choose a LLaMA, such as demo")
        predicted = {"predicted_weight_bytes": found.weights + found.scales, "predicted_kv_bytes": found.kv}
        predicted |= {"predicted_activation_bytes": found.workspace, "predicted_bytes": found.total}
        return {"engine": side.key.loop} | predicted

    def turn(self, lease: Lease, side: Side, setup: Setup, number: int) -> dict:
        found = self._measured(lease, side, setup)
        return found | {"memory_freed": lease.pool.drop(side.key).verified}

    def _measured(self, lease: Lease, side: Side, setup: Setup) -> dict:
        """Load, write and look; the engine does not outlive the call."""
        reclaim(self.device)
        before = Level.of(self.device)
        engine = lease.get(side.key, side.contestant.method)
        reclaim(self.device)  # what loading needed besides
        loaded = Level.of(self.device)
        with telemetry.Sampler(self.device, hz=WATCHED_HZ) as sampler, closing(self._start(engine, setup)) as written:
            moments, peaks = self._written(written, sampler)
            after = Level.of(self.device)
        peak = max(after.process, *peaks)
        if self.device == "cpu" and engine.name == "hf":
            moments = list(self._watched(engine, setup))
        most = max(moments, key=lambda moment: moment.kv + moment.activations)
        return {
            "base_bytes": before.process,
            "process_bytes": peak - before.process - (files := unused_file_bytes(engine)),
            "file_bytes": files,
            "weight_bytes": loaded.requested - before.requested or engine.weight_bytes + engine.scale_bytes,
            "kv_bytes": most.kv,
            "activation_bytes": most.activations,
            "library_bytes": free_library_workspace(self.device),
            "reserved_bytes": after.reserved - before.reserved,
        }

    def _start(self, engine: Engine, setup: Setup) -> Generation:
        return engine.start(setup.prompt_ids, SamplingSettings(max_new_tokens=self.new_tokens))

    def _written(self, generation: Generation, sampler: telemetry.Sampler) -> tuple[list[Moment], list[int]]:
        """Read the prompt and write; what a GPU's allocator tells of it, and the process's highest in every call."""
        generation.prefill()
        read, peaks = Moment(generation.kv_bytes, generation.workspace_bytes), [self._peak(sampler)]
        for _ in range(self.new_tokens - 1):
            generation.step()
            peaks.append(self._peak(sampler))
        kv = generation.kv_bytes
        return [read, Moment(kv, max(0, generation.peak_bytes - kv))], peaks

    def _peak(self, sampler: telemetry.Sampler) -> int:
        return max((process_of(vars(sample), self.device)[0] for sample in sampler.drain()), default=0)

    def _watched(self, engine: Engine, setup: Setup) -> Iterator[Moment]:
        """The same once more under the eyes of the CPU's allocator, whose notes take memory themselves."""
        with closing(self._start(engine, setup)) as generation:
            level = highest_level(generation.prefill)
            yield Moment(generation.kv_bytes, level - generation.kv_bytes)
            before = generation.kv_bytes
            level = highest_level(generation.step)
            yield Moment(generation.kv_bytes, max(0, level - (generation.kv_bytes - before)))

    def end(self, lease: Lease, setup: Setup, sides: list[Side]) -> None:
        """Freed in every turn."""

    def row(self, side: Side) -> dict:
        """The turn whose process took the median; what the lines leave of it, and how far the prediction is off."""
        turns = sorted(side.turns, key=lambda turn: turn["process_bytes"])
        found, told = turns[len(turns) // 2], side.known
        known = found["weight_bytes"] + found["kv_bytes"] + found["activation_bytes"] + (found["library_bytes"] or 0)
        slack = max(0, found["reserved_bytes"] - known) if found["reserved_bytes"] else None  # a CPU has no allocator
        predicted = told["predicted_weight_bytes"] + told["predicted_kv_bytes"]
        return found | {
            "slack_bytes": slack,
            "unexplained_bytes": found["process_bytes"] - known - (slack or 0),
            "weights_kv_error": predicted / (found["weight_bytes"] + found["kv_bytes"]) - 1,
            "error": told["predicted_bytes"] / found["process_bytes"] - 1,
            "memory_freed": all(side.of("memory_freed")),
        }

    def result(self, setup: Setup, results: list[dict], conditions: dict, facts: dict | None = None) -> dict:
        return super().result(setup, results, conditions, facts) | {"findings": [finding(row) for row in results]}


def finding(row: dict) -> str:
    """What the lines of one method come to, in a sentence."""
    parts = ", ".join(f"{format_bytes(row[key])} {name}" for key, name in LINES.items() if row[key])
    errors = [f"{format_change(row[key])} ({bound:.0%} is the bound)" for key, bound in BOUNDS.items()]
    return (
        f"{row['method']} ({row['engine']}): predicted {format_bytes(row['predicted_bytes'])}, measured "
        f"{format_bytes(row['process_bytes'])}: {parts}. Predicted against measured, weights and KV cache {errors[0]}, "
        f"in all {errors[1]}."
    )


def unused_file_bytes(engine: Engine) -> int:
    """Bytes of a checkpoint's file that are in this process's memory and in no weight: what was converted from them is
    elsewhere. The system takes such pages back when it needs them."""
    if engine.name != "hf" or engine.device != "cpu":
        return 0
    ranges = mapped_files(".safetensors")
    tensors = ((tensor.data_ptr(), tensor.nbytes) for tensor in stored_tensors(engine.model))
    used = sum(size for at, size in tensors if any(at in place for place, _ in ranges))
    return max(0, sum(resident for _, resident in ranges) - used)
