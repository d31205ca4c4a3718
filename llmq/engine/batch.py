"""Several sequences decoded together on one device: a step reads the weights once for all of them.

Each sequence is what it is alone: its prompt is read by itself, and in a step LLM.int8() decomposes every row by
itself, so that no neighbour's outliers change it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from llmq.engine.base import Token, capacity_for, token_of
from llmq.engine.cuda_graph import StepGraph, draw_of
from llmq.engine.decoder import Decoder, through_layers
from llmq.engine.llama import rope_table
from llmq.engine.llama_weights import LlamaWeights
from llmq.engine.sampling import SamplingSettings
from llmq.kernels.buffers import COUNTERS, Cache, Noting, Partials
from llmq.kernels.primitives import Int8Weight

if TYPE_CHECKING:
    from llmq.engine.llama_cuda import CudaLlama

ROOM = 32  # positions are allocated in steps of so many


class BatchDecoder:
    """The buffers of `rows` sequences of up to `positions` each, and the step that fills them: see `Decoder`, whose
    fields these are with a first dimension more. `threshold`: float for LLM.int8(), else None."""

    def __init__(
        self, weights: LlamaWeights, kernels, *, rows: int, positions: int, threshold: float | None, device: str
    ):
        self.weights, self.kernels, self.rows = weights, kernels, rows
        self.capacity, self.threshold, self.device = -(-positions // ROOM) * ROOM, threshold, device
        a, dtype = weights.architecture, weights.dtype

        def zeros(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=kind, device=device)

        shape = (rows, a.kv_heads, self.capacity, a.head_dim)
        self.caches = [Cache(zeros(*shape), zeros(*shape)) for _ in range(a.layers)]
        self.rope = rope_table(a, self.capacity, device)
        self.token, self.position = zeros(rows, kind=torch.int64), zeros(rows, kind=torch.int64)
        self.chosen = zeros(rows, 2, kind=torch.float64)
        self.logits = zeros(rows, a.vocab_size, kind=torch.float32)
        self._attended = zeros(rows, a.heads * a.head_dim)
        # Cut as for one sequence, so that sums are in the same order.
        alone = capacity_for(positions, a.context)
        self._scratch = Partials.empty(rows * a.heads, a.head_dim, alone, device, positions=self.capacity)
        widest = max(a.hidden_size, a.intermediate_size, a.heads * a.head_dim)
        inputs = 4 * a.layers + 1 if threshold is not None else 0  # of the head, too
        self._marks = zeros(inputs, widest + COUNTERS, kind=torch.int32)

    @property
    def kv_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @property
    def workspace_bytes(self) -> int:
        return sum(part.nbytes for part in (self.rope, self.logits, self._attended, self._scratch, self._marks))

    def take_over(self, row: int, reader: Decoder, tokens: int) -> None:
        """Continue in `row` what `reader` has read: so many tokens' keys and values, and the next one's logits."""
        for own, read in zip(self.caches, reader.caches, strict=True):
            own.keys[row, :, :tokens] = read.keys[:, :tokens]
            own.values[row, :, :tokens] = read.values[:, :tokens]
        self.logits[row] = reader.logits
        self.position[row] = tokens

    def step(self) -> None:
        """Feed each row's `token` at its `position`; afterwards `logits` are the next tokens' and positions are one
        more."""
        self._marks.zero_()  # torch's, so that no kernel of this step reads what an old one wrote: see `triton.launch`
        caches = iter(self.caches)

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            self.kernels.attend(qkv, next(caches), self.rope, self.position, self._attended, self._scratch)
            return self._attended

        self._score(through_layers(self.weights, self.kernels, self.token, self._noting(), attend))
        self.position.add_(1)

    def _noting(self) -> Iterator[Noting]:
        """For the inputs of every matrix, in the order in which they come."""
        if self.threshold is None:
            while True:
                yield Noting()
        for marks in self._marks:
            yield Noting(self.threshold, marks, by_row=True)

    def _score(self, hidden: torch.Tensor) -> None:
        weights, head = self.weights, self.weights.head
        int8 = self.threshold is not None and isinstance(head, Int8Weight)
        noting = Noting(self.threshold, self._marks[-1], by_row=True) if int8 else Noting()
        rows = self.kernels.norm_rows(hidden, weights.norm, weights.architecture.eps, noting)
        self.kernels.scores(rows, head, self.logits)


class BatchGeneration:
    """Several generations under way together: `prefill()` gives the first token of each, each `step()` the next ones;
    `close()` gives the memory back for the next batch of this size. A sequence that has ended goes on: whoever asked
    leaves its tokens out."""

    def __init__(self, engine: CudaLlama, prompts: Sequence[list[int]], settings: SamplingSettings):
        assert prompts and all(prompts), "every sequence needs at least one prompt token"
        self._engine, self._prompts, self._settings = engine, prompts, settings
        longest = min(engine.context, max(map(len, prompts)) + settings.max_new_tokens)
        kind = ("several", len(prompts), longest, draw_of(settings), engine.threshold)

        def make() -> StepGraph:
            decoder = BatchDecoder(
                engine.model, engine.kernels, rows=len(prompts), positions=longest, threshold=engine.threshold,
                device=engine.device,
            )  # fmt: skip
            return StepGraph(decoder, settings, under_way=0)

        with engine.here:
            self._graph = engine.take(kind, make)
        self._graph.sampler.generator.manual_seed(int(settings.seed))
        self._steps_left = longest - max(map(len, prompts))  # that the KV cache has positions for

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values of all sequences."""
        return self._graph.kv_bytes

    def prefill(self) -> list[Token]:
        """Read the prompts, one after the other and as each is read alone, and choose the first token of each; their
        seconds are those of all."""
        begun = time.perf_counter()
        with self._engine.here:
            reader = self._engine.workspace(max(map(len, self._prompts)), self._settings)
            for row, ids in enumerate(self._prompts):
                reader.read(ids)
                self._graph.decoder.take_over(row, reader.decoder, len(ids))
            self._engine.spare.append(reader)
            self._graph.choose()
            return self._tokens(begun)

    def step(self) -> list[Token]:
        """Choose the next token of every sequence; their seconds are the step's, by the clock of who waits for it."""
        assert self._steps_left > 0, "the context, or what was asked for, ends here"
        self._steps_left -= 1
        begun = time.perf_counter()
        with self._engine.here:
            self._graph.step()
            return self._tokens(begun)

    def _tokens(self, begun: float) -> list[Token]:
        found = self._graph.decoder.chosen.tolist()  # waits for the device
        seconds = time.perf_counter() - begun
        return [token_of(*row, seconds) for row in found]

    def close(self) -> None:
        """Give the memory back; the object is of no more use."""
        if self._graph is not None:
            self._engine.spare.append(self._graph)
        self._graph = None
