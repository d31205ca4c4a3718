"""Several sequences decoded together on one device: a step reads the weights once for all of them.

Each sequence is what it is alone: its prompt is read by itself, attention is cut as for it alone, and in a step
LLM.int8() decomposes every row by itself, so that no neighbour's outliers change it. Only sums of 16-bit weights are
cuBLAS', in another order than in the kernels of one row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import torch

from llmq.engine.base import Token, capacity_for, token_of
from llmq.engine.cuda_graph import StepGraph, draw_of
from llmq.engine.decoder import Decoder, through_layers
from llmq.engine.llama import rope_table
from llmq.engine.llama_weights import LlamaWeights
from llmq.engine.sampling import SamplingSettings
from llmq.kernels.buffers import COUNTERS, Cache, Noting, Partials, part_of
from llmq.kernels.primitives import Int8Weight

if TYPE_CHECKING:
    from llmq.engine.llama_cuda import CudaLlama

ROOM = 32  # positions are allocated in steps of so many


class BatchDecoder:
    """The buffers of `rows` sequences of up to `positions` each, and the step that fills them: see `Decoder`, whose
    fields these are with a first dimension more. `threshold`: float for LLM.int8(), else None. `part`: the fewest
    positions that are one part of attention, see `Partials`."""

    def __init__(
        self,
        weights: LlamaWeights,
        kernels,
        *,
        rows: int,
        positions: int,
        part: int,
        threshold: float | None,
        device: str,
    ):
        self.weights, self.kernels = weights, kernels
        self.capacity, self.threshold, self.device = positions, threshold, device
        # Torch's operations ask the host how many outliers there are.
        self.can_be_captured = threshold is None or kernels.prompts_can_be_captured
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
        self._scratch = Partials.empty(a.heads, a.head_dim, self.capacity, device, part=part, sequences=rows)
        inputs = 4 * a.layers + 1 if threshold is not None else 0  # of the head, too
        self._marks = zeros(inputs, a.widest_input + COUNTERS, kind=torch.int32)

    @property
    def kv_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @property
    def workspace_bytes(self) -> int:
        return sum(part.nbytes for part in (self.rope, self.logits, self._attended, self._scratch, self._marks))

    def take_over(self, row: int, reader: Decoder, tokens: int, part: int) -> None:
        """Continue in `row` what `reader` has read: so many tokens' keys and values, and the next one's logits. `part`:
        as attention is cut for this sequence alone."""
        for own, read in zip(self.caches, reader.caches, strict=True):
            own.keys[row, :, :tokens] = read.keys[:, :tokens]
            own.values[row, :, :tokens] = read.values[:, :tokens]
        self.logits[row] = reader.logits
        self.position[row] = tokens
        self._scratch.sequence_parts[row] = part

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
            return repeat(Noting())
        return (Noting(self.threshold, marks, by_row=True) for marks in self._marks)

    def _score(self, hidden: torch.Tensor) -> None:
        weights, head = self.weights, self.weights.head
        int8 = self.threshold is not None and isinstance(head, Int8Weight)
        noting = Noting(self.threshold, self._marks[-1], by_row=True) if int8 else Noting()
        rows = self.kernels.norm_rows(hidden, weights.norm, weights.architecture.eps, noting)
        self.kernels.scores(rows, head, self.logits)


class BatchGeneration:
    """Several generations under way together: `prefill()` gives the first token of each, each `step()` the next ones;
    `close()` gives the memory back for the next batch of this size. A sequence that has ended goes on: whoever asked
    leaves its tokens out. Where tokens are drawn, each sequence has noise of its own, which depends on its place."""

    def __init__(self, engine: CudaLlama, prompts: Sequence[list[int]], settings: SamplingSettings):
        assert prompts and all(prompts), "every sequence needs at least one prompt token"
        assert max(map(len, prompts)) <= engine.context, "a prompt is longer than the context"
        self._engine, self._prompts, self._settings = engine, prompts, settings
        self._graph: StepGraph | None = None
        self._steps_left = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values of all sequences."""
        return self._graph.kv_bytes if self._graph else 0

    def prefill(self) -> list[Token]:
        """Read the prompts, one after the other and as each is read alone, and choose the first token of each; their
        seconds are those of all."""
        engine, begun = self._engine, time.perf_counter()
        alone = [min(engine.context, len(ids) + self._settings.max_new_tokens) for ids in self._prompts]
        parts = [part_of(capacity_for(tokens, engine.context)) for tokens in alone]
        longest = max(map(len, self._prompts))
        with engine.here:
            self._graph = self._workspace(max(alone), min(parts))
            self._graph.sampler.generator.manual_seed(int(self._settings.seed))
            reader = engine.workspace(longest, self._settings)
            try:
                for row, (ids, part) in enumerate(zip(self._prompts, parts, strict=True)):
                    reader.read(ids)
                    self._graph.decoder.take_over(row, reader.decoder, len(ids), part)
            finally:
                engine.spare.append(reader)
            self._steps_left = max(alone) - longest  # that the KV cache has positions for
            self._graph.choose()
            return self._tokens(begun)

    def _workspace(self, tokens: int, part: int) -> StepGraph:
        """The buffers, and on a GPU the graph, for batches of this size."""
        engine, rows, positions = self._engine, len(self._prompts), -(-tokens // ROOM) * ROOM

        def make() -> StepGraph:
            decoder = BatchDecoder(
                engine.model, engine.kernels, rows=rows, positions=positions, part=part, threshold=engine.threshold,
                device=engine.device,
            )  # fmt: skip
            return StepGraph(decoder, self._settings, slots=0)

        return engine.take(("several", rows, positions, part, draw_of(self._settings), engine.threshold), make)

    def step(self) -> list[Token]:
        """Choose the next token of every sequence; their seconds are the step's, by the clock of who waits for it."""
        assert self._steps_left > 0, "before prefill, or where the context or what was asked for ends"
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
        self._graph, self._steps_left = None, 0
