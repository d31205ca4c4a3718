"""The part of the lean loop that all devices share: weights in our own layout, one generation at a time, warm-up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch

from llmq.engine.base import warm_up_length
from llmq.engine.llama_weights import LlamaWeights
from llmq.engine.sampling import SamplingSettings
from llmq.methods import Method
from llmq.models.architecture import Architecture

WARM_UP_STEPS = 3


class Workspace(Protocol):
    """The memory of one generation: caches, buffers, and on a GPU the graph that knows them by their addresses."""

    kind: tuple
    kv_bytes: int
    workspace_bytes: int


class LlamaEngine:
    """The half of `base.Engine` that `CudaLlama` and `CpuLlama` share. `generation`: what `start` makes."""

    name = "lean"
    generation: ClassVar[type[LlamaGeneration]]

    def __init__(self, weights: LlamaWeights, method: Method, device: str, eos_ids: frozenset[int]):
        self.model, self.architecture, self.method, self.device = weights, weights.architecture, method, device
        self.eos_ids, self.context = eos_ids, weights.architecture.context
        self.weight_bytes, self.scale_bytes = weights.weight_bytes, weights.scale_bytes
        self.read_bytes_per_token = weights.read_bytes_per_token
        self._warm: set[tuple] = set()  # (tokens of a prompt, threshold)
        self.spare: list[Workspace] = []

    @property
    def threshold(self) -> float | None:
        return self.method.threshold

    @property
    def prompt_checks(self) -> int | None:
        return self.architecture.layers if self.device == "cpu" else None

    def under(self, method: Method) -> LlamaEngine:
        """Return a view of the same weights with another threshold; views share their spare workspaces."""
        view = copy.copy(self)
        view.method = method
        return view

    def take(self, kind: tuple, make: Callable[[], Workspace]) -> Workspace:
        """Return a spare workspace of this kind, or free the others and make one; its user gives it back to `spare`."""
        found = next((workspace for workspace in self.spare if workspace.kind == kind), None)
        if found is None:
            self.spare.clear()
            found = make()
            found.kind = kind
        else:
            self.spare.remove(found)
        return found

    @property
    def reserved_bytes(self) -> int:
        """Caches and buffers that stay allocated for the next generations."""
        return sum(workspace.kv_bytes + workspace.workspace_bytes for workspace in self.spare)

    def start(self, prompt_ids: list[int], settings: SamplingSettings) -> LlamaGeneration:
        """Begin a generation: nothing runs until its `prefill()`."""
        return self.generation(self, prompt_ids, settings)

    def warm_up(self, prompt_ids: list[int]) -> None:
        """Run what a generation of this prompt will run, uncounted: kernels compile and load, clocks settle."""
        length = warm_up_length(len(prompt_ids), self.device)
        if (length, self.threshold) in self._warm:
            return
        generation = self.start(prompt_ids[:length], SamplingSettings(max_new_tokens=WARM_UP_STEPS + 1))
        generation.prefill()
        for _ in range(min(WARM_UP_STEPS, self.context - length)):  # the context may end sooner
            generation.step()
        generation.close()
        self._warm.add((length, self.threshold))

    def outlier_counts(self, ids: list[int]) -> list[int]:
        """Return how many columns are multiplied in 16 bit while `ids` are read, in the inputs of q/k/v, output,
        gate/up and down of each layer in turn."""
        raise NotImplementedError

    def outlier_share(self, ids: list[int]) -> float:
        """Return the same as `HFEngine.outlier_share`, over the layers without the head: of the four inputs of a layer
        three, one, two and one linear layers read each."""
        parts = [pair for layer in self.model.layers for pair in zip((3, 1, 2, 1), layer.matrices, strict=True)]
        counted = zip(parts, self.outlier_counts(ids), strict=True)
        int8 = [(n, part, count) for (n, part), count in counted if getattr(part, "absmax", None) is not None]
        return sum(n * count / part.shape[1] for n, part, count in int8) / max(1, sum(n for n, _, _ in int8))


class LlamaGeneration:
    """One generation under way, see `base.Generation`: its workspace is taken by `prefill` and given back at the end.
    A subclass reads and steps."""

    workspace_bytes = allocator_peak_bytes = 0

    def __init__(self, engine: LlamaEngine, prompt_ids: list[int], settings: SamplingSettings):
        assert prompt_ids, "a generation needs at least one prompt token"
        self._engine, self._prompt_ids, self._settings = engine, prompt_ids, settings
        self._tokens = min(engine.context, len(prompt_ids) + settings.max_new_tokens)
        self._workspace: Workspace | None = None

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, exact tensor sizes."""
        return self._workspace.kv_bytes if self._workspace else 0

    @property
    def peak_bytes(self) -> int:
        return self.kv_bytes + self.workspace_bytes

    def close(self) -> None:
        """Give the workspace back for the next generation; the object is of no more use."""
        if self._workspace:
            self._engine.spare.append(self._workspace)
        self._workspace = None


def rope_table(architecture: Architecture, positions: int, device: str) -> torch.Tensor:
    """Return float32 (positions, head_dim): cosines, then sines, of each position's angles (Su et al. 2021)."""
    frequencies = torch.tensor(architecture.rope.frequencies(architecture.head_dim), dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1).float().to(device)
