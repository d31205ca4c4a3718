"""The part of the lean loop that all devices share: weights in our own layout, one generation at a time, warm-up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

from llmq.engine.base import Generation
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
    """The half of `base.Engine` that `CudaLlama` and `CpuLlama` share."""

    name = "lean"

    def __init__(
        self, weights: LlamaWeights, architecture: Architecture, method: Method, device: str, eos_ids: frozenset[int]
    ):
        self.model, self.architecture, self.method, self.device = weights, architecture, method, device
        self.eos_ids, self.context = eos_ids, architecture.context
        self.weight_bytes, self.scale_bytes = weights.weight_bytes, weights.scale_bytes
        self._warm: set[tuple] = set()  # (tokens of a prompt, threshold)
        self.spare: list[Workspace] = []

    @property
    def threshold(self) -> float | None:
        return self.method.threshold

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
            return make()
        self.spare.remove(found)
        return found

    @property
    def reserved_bytes(self) -> int:
        """Caches and buffers that stay allocated for the next generations."""
        return sum(workspace.kv_bytes + workspace.workspace_bytes for workspace in self.spare)

    @property
    def read_bytes_per_token(self) -> int:
        return self.model.read_bytes_per_token

    def start(self, prompt_ids: list[int], settings: SamplingSettings) -> Generation:
        """Begin a generation: nothing runs until its `prefill()`."""
        raise NotImplementedError

    def warm_up(self, prompt_ids: list[int]) -> None:
        """Run what a generation of this prompt will run, uncounted: kernels compile and load, clocks settle."""
        if (len(prompt_ids), self.threshold) in self._warm:
            return
        generation = self.start(prompt_ids, SamplingSettings(max_new_tokens=WARM_UP_STEPS + 1))
        generation.prefill()
        for _ in range(min(WARM_UP_STEPS, self.context - len(prompt_ids))):  # the context may end sooner
            generation.step()
        generation.close()
        self._warm.add((len(prompt_ids), self.threshold))


def share_of_columns(architecture: Architecture, counts: list[int]) -> float:
    """Return the mean share of columns a linear layer keeps in 16 bit, from how many there are in the inputs of q/k/v,
    output, gate/up and down of each layer in turn: three, one, two and one linear layers read them."""
    a = architecture
    widths, readers = (a.hidden_size, a.heads * a.head_dim, a.hidden_size, a.intermediate_size), (3, 1, 2, 1)
    shares = (count / widths[i % 4] * readers[i % 4] for i, count in enumerate(counts))
    return sum(shares) / (sum(readers) * a.layers)
