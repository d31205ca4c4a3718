"""Decode and prefill speed, loading, memory and bandwidth of several methods on one device, in rounds.

The number of tokens is fixed (end-of-text does not stop a turn), so every method does the same work. The read bandwidth
is measured in every round, because a fraction of a datasheet's figure, or of what was free an hour ago, says nothing
about a shared machine.
"""

from __future__ import annotations

import os
import statistics
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from llmq import memory
from llmq.bench.bandwidth import bandwidth_share, read_bandwidth
from llmq.bench.rounds import spread
from llmq.bench.setup import Bench, DecodingBench, Setup, Side
from llmq.engine.base import Engine, capacity_for
from llmq.engine.sampling import SamplingSettings
from llmq.machine.door import Lease
from llmq.models.opening import Model


@dataclass(frozen=True, kw_only=True)
class DecodeBench(DecodingBench):
    """The prompt is `prompt_tokens` tokens of a fixed text, fed as they are; `new_tokens` follow."""

    kind = "decode"
    compared = {"over_fp16": "tokens_per_second"}
    columns = ("method", "engine", "tokens_per_second", "over_fp16", "prefill_seconds", "bandwidth_fraction")
    columns += ("weight_bytes", "peak_bytes")

    def begin(self, lease: Lease, side: Side, setup: Setup) -> dict:
        started = lease.clock()
        engine, load_seconds = lease.pool.get(side.key, side.contestant.method)
        engine.warm_up(setup.prompt_ids)
        return {
            "engine": engine.name,
            "arithmetic": engine.method.arithmetic(self.device, engine.name),
            "bytes_per_token": self._bytes_per_token(engine, setup.model),
            "weight_bytes": engine.weight_bytes,
            "scale_bytes": engine.scale_bytes,
            "load_seconds": load_seconds,
            "ready_seconds": lease.clock() - started,
            "predicted_bytes": _predicted_bytes(engine, setup),
        }

    def _bytes_per_token(self, engine: Engine, model: Model) -> int | None:
        """Weights, and the keys and values in use halfway through the new tokens."""
        itemsize = 4 if engine.method.dtype == "float32" else 2
        kv = memory.kv_bytes(model.config, tokens=self.prompt_tokens + self.new_tokens // 2, itemsize=itemsize)
        return None if kv is None else engine.read_bytes_per_token + kv

    def turn(self, lease: Lease, side: Side, setup: Setup, number: int) -> dict:
        """Generate once. `wall_tokens_per_second` is by the host's clock over all steps: what lies between them counts
        too."""
        engine, steps = lease.get(side.key, side.contestant.method), self.new_tokens - 1
        with closing(engine.start(setup.prompt_ids, SamplingSettings(max_new_tokens=self.new_tokens))) as generation:
            prefill = generation.prefill()
            started = lease.clock()
            seconds = sum(generation.step().seconds for _ in range(steps))
            return {
                "tokens_per_second": steps / seconds,
                "wall_tokens_per_second": steps / (lease.clock() - started),
                "prefill_seconds": prefill.seconds,
                "kv_bytes": generation.kv_bytes,
                "workspace_bytes": generation.workspace_bytes,
                "peak_bytes": generation.peak_bytes,
            }

    def end_round(self, sides: list[Side]) -> None:
        reading = read_bandwidth(self.device)
        for side in sides:
            side.turns[-1]["read_bandwidth"] = reading

    def end(self, lease: Lease, setup: Setup, sides: list[Side]) -> None:
        """Add up what each held with the prompt in its cache: what its generation took and what freeing it gave back.

        A CPU has no allocator to ask."""
        taken = [self._generation_bytes(lease, side, setup) for side in sides]
        workspace = _free_library_workspace(self.device)
        super().end(lease, setup, sides)
        for side, bytes_taken in zip(sides, taken, strict=True):
            held = None if bytes_taken is None else side.freed.freed_bytes + bytes_taken
            side.known |= {"allocated_bytes": held, "library_workspace_bytes": workspace}

    def _generation_bytes(self, lease: Lease, side: Side, setup: Setup) -> int | None:
        """What torch allocates for a generation with the prompt in its cache; None on a CPU."""
        if not self.device.startswith("cuda"):
            return None
        import torch

        engine, before = lease.get(side.key, side.contestant.method), torch.cuda.memory_allocated(self.device)
        with closing(engine.start(setup.prompt_ids, SamplingSettings(max_new_tokens=1))) as generation:
            generation.prefill()
            return torch.cuda.memory_allocated(self.device) - before

    def row(self, side: Side) -> dict:
        speeds, known = side.of("tokens_per_second"), side.known
        return {
            **spread("tokens_per_second", speeds),
            "wall_tokens_per_second": statistics.median(side.of("wall_tokens_per_second")),
            **spread("prefill_seconds", side.of("prefill_seconds")),
            **bandwidth_share(known["bytes_per_token"], speeds, side.of("read_bandwidth")),
            "kv_bytes": side.of("kv_bytes")[0],
            "workspace_bytes": max(side.of("workspace_bytes")),
            "peak_bytes": known["weight_bytes"] + known["scale_bytes"] + max(side.of("peak_bytes")),
        }

    def facts(self, sides: list[Side]) -> dict:
        readings = dict.fromkeys(chain.from_iterable(side.of("read_bandwidth") for side in sides))
        return spread("read_bandwidth_bytes_per_second", list(readings))


def _predicted_bytes(engine: Engine, setup: Setup) -> int | None:
    """Weights, scales and the cache that the loop allocates for the prompt, from the configuration."""
    tokens = len(setup.prompt_ids)
    tokens = capacity_for(tokens + 1, engine.context) if engine.name == "lean" else tokens
    predicted = memory.predict(setup.model.shape, engine.method, tokens=tokens)
    return None if predicted.kv is None else predicted.weights + predicted.scales + predicted.kv


def _free_library_workspace(device: str) -> int | None:
    """Bytes of scratch that cuBLAS kept inside torch's allocator (about 32 MB a process, whatever the model), freed.
    Nothing may compute afterwards that was captured before."""
    if not device.startswith("cuda"):
        return None
    import torch

    before = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated(device)


class PrefillBench(Bench):
    """Seconds of each method's prefill of the same prompt."""

    kind = "prefill"
    compared = {"over_fp16": "tokens_per_second"}
    columns = ("method", "engine", "seconds", "tokens_per_second", "over_fp16", "workspace_bytes")

    def turn(self, lease: Lease, side: Side, setup: Setup, number: int) -> dict:
        """Prefill once; the bytes are what it needed beyond weights and cache."""
        engine = lease.get(side.key, side.contestant.method)
        with closing(engine.start(setup.prompt_ids, SamplingSettings(max_new_tokens=1))) as generation:
            seconds = generation.prefill().seconds
            speed = len(setup.prompt_ids) / seconds
            return {"seconds": seconds, "tokens_per_second": speed, "workspace": generation.workspace_bytes}

    def row(self, side: Side) -> dict:
        return {
            **spread("seconds", side.of("seconds")),
            "tokens_per_second": statistics.median(side.of("tokens_per_second")),
            "workspace_bytes": max(side.of("workspace")),
        }


class LoadBench(Bench):
    """Load each method and free it again, once a round, in a process that has loaded nothing before the first.

    `ready_seconds` is loading and everything a first token needs besides: kernels compiled or read from their cache,
    the graph captured. The first round is not counted but told apart (`first_…`): it compiles what the cache of
    kernels, which `kernel_cache` calls 'cold' when Triton's had nothing in it at the start, does not have.
    """

    kind = "load"
    columns = ("method", "engine", "load_seconds", "ready_seconds", "first_ready_seconds", "weight_bytes")
    columns += ("peak_load_bytes",)

    def conditions(self) -> dict:
        return {"kernel_cache": _kernel_cache()}

    def _apart(self, keys: list) -> str:
        return ""  # one at a time, in every round

    def begin(self, lease: Lease, side: Side, setup: Setup) -> dict:
        return {}

    def turn(self, lease: Lease, side: Side, setup: Setup, number: int) -> dict:
        found = self._loaded(lease, side, setup)
        if not number:
            side.known |= {"first_load_seconds": found["load_seconds"], "first_ready_seconds": found["ready_seconds"]}
        return found | {"memory_freed": lease.pool.drop(side.key).verified}

    def _loaded(self, lease: Lease, side: Side, setup: Setup) -> dict:
        """Load once; the engine does not outlive the call."""
        level = _restart_peak(self.device)
        started = lease.clock()
        engine, load_seconds = lease.pool.get(side.key, side.contestant.method)
        peak = _peak(self.device)
        engine.warm_up(setup.prompt_ids)
        ready_seconds = lease.clock() - started
        side.known |= {"engine": engine.name, "weight_bytes": engine.weight_bytes, "scale_bytes": engine.scale_bytes}
        peak = None if peak is None else peak - level
        return {"load_seconds": load_seconds, "ready_seconds": ready_seconds, "peak_load_bytes": peak}

    def end(self, lease: Lease, setup: Setup, sides: list[Side]) -> None:
        """Freed in every turn."""

    def row(self, side: Side) -> dict:
        return {
            **spread("load_seconds", side.of("load_seconds")),
            **spread("ready_seconds", side.of("ready_seconds")),
            "peak_load_bytes": max(side.of("peak_load_bytes"), key=lambda peak: peak or 0),
            "memory_freed": all(side.of("memory_freed")),
        }


def _kernel_cache() -> str:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache"))
    return "warm" if folder.is_dir() and any(folder.iterdir()) else "cold"


def _restart_peak(device: str) -> int:
    """Bytes the device's allocator holds now; its high-water mark starts here."""
    if not device.startswith("cuda"):
        return 0
    import torch

    torch.cuda.init()  # the first to ask for statistics must not be the first to use the device
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: str) -> int | None:
    """The allocator's high-water mark; None on a CPU, which has none to ask."""
    if not device.startswith("cuda"):
        return None
    import torch

    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
