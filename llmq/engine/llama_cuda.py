"""The lean loop on a GPU: a LLaMA without a framework's overhead, the same for FP16 and int8, so that speeds compare.

On a GPU a decode step is one CUDA graph, sampling included, and nothing in it waits for the host. The host runs one
step ahead: while a token is read back the next step is already running, so an end-of-text is noticed one step late and
that step's result is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from llmq.engine.base import Interrupted, Token, capacity_for, token_of
from llmq.engine.batch import BatchGeneration
from llmq.engine.cuda_graph import InFlight, StepGraph, draw_of
from llmq.engine.decoder import Decoder, outlier_marks_for, read_prompt
from llmq.engine.llama import LlamaEngine, LlamaGeneration, rope_table
from llmq.engine.llama_weights import LlamaWeights
from llmq.engine.sampling import SamplingSettings, likeliest
from llmq.engine.timing import allocated_bytes, timer_for
from llmq.kernels.backend import current
from llmq.kernels.buffers import Cache, Noting
from llmq.kernels.primitives import Int8Weight
from llmq.methods import Method


class CudaGeneration(LlamaGeneration):
    """One generation under way on a GPU, or with the reference operations on a CPU; see `base.Generation`."""

    def __init__(self, engine: CudaLlama, prompt_ids: list[int], settings: SamplingSettings):
        super().__init__(engine, prompt_ids, settings)
        self._in_flight: deque[InFlight] = deque()
        self._begun = 0  # decode steps
        self._logits: torch.Tensor | None = None  # (vocabulary,), of the last token

    def prefill(self, stopped: Callable[[], bool] | None = None) -> Token:
        """Read the whole prompt in one call and sample token 0; its seconds are the time to first token, by the clock
        of whoever waits for it: the work before the device's first kernel is in it."""
        engine, begun = self._engine, time.perf_counter()
        with engine.here:
            graph = self._workspace = engine.workspace(self._tokens, self._settings)
            graph.sampler.generator.manual_seed(int(self._settings.seed))
            captured = graph.prompt_of(len(self._prompt_ids))
            if captured and stopped and stopped():
                raise Interrupted
            with engine.timer:
                graph.read(self._prompt_ids, stopped=stopped)
                graph.choose()
                found = graph.decoder.chosen.tolist()
            seconds = time.perf_counter() - begun
        self._logits = graph.decoder.logits
        growth = captured.workspace_bytes if captured else engine.timer.growth_bytes
        self.workspace_bytes = max(growth, graph.workspace_bytes)
        self.allocator_peak_bytes = max(self.allocator_peak_bytes, engine.timer.peak_bytes)
        return token_of(*found, seconds)

    def step(self) -> Token:
        """Sample the next token."""
        assert self._workspace is not None, "prefill before the first step"
        if not self._workspace.slots:
            return self._timed_step()
        with self._engine.here:
            return self._next()

    def _next(self) -> Token:
        """Keep the device busy, and wait for the oldest step under way. No step is begun ahead that nobody will ask
        for: the next prompt would wait for it."""
        slots, wanted = len(self._workspace.slots), self._settings.max_new_tokens - 1  # the prompt gave the first token
        limit = self._workspace.decoder.capacity - len(self._prompt_ids)  # steps that the KV cache has positions for
        while self._begun < limit and len(self._in_flight) < (slots if self._begun < wanted else 1):
            self._begin()
        oldest = self._in_flight.popleft()
        oldest.ended.synchronize()
        self._logits = oldest.logits
        self._engine.beside.wait_event(oldest.kept)
        _, self.allocator_peak_bytes = allocated_bytes(self._engine.device)
        return token_of(*oldest.chosen.tolist(), oldest.begun.elapsed_time(oldest.ended) / 1e3)

    def best(self, last: Token, count: int) -> dict[int, float]:
        """Return the likeliest tokens at the last token's place, on a stream that does not wait for the step under way;
        see `base.Generation`."""
        with self._engine.here, torch.cuda.stream(self._engine.beside):
            return likeliest(self._logits, last, count)

    def _timed_step(self) -> Token:
        with self._engine.timer:
            self._workspace.step()
            found = self._workspace.decoder.chosen.tolist()
        return token_of(*found, self._engine.timer.seconds)

    def _begin(self) -> None:
        """Put one more step under way."""
        new = self._workspace.slots[self._begun % len(self._workspace.slots)]
        new.begun.record()
        self._workspace.step()
        new.chosen.copy_(self._workspace.decoder.chosen, non_blocking=True)
        new.ended.record()
        new.logits.copy_(self._workspace.decoder.logits)
        new.kept.record()
        self._in_flight.append(new)
        self._begun += 1

    def close(self) -> None:
        """Give the workspace back for the next generation; the object is of no more use."""
        self._in_flight.clear()
        super().close()


class CudaLlama(LlamaEngine):
    """One LLaMA under one method on one device, for one generation at a time. `kernels`: reference or triton."""

    generation = CudaGeneration

    def __init__(
        self, weights: LlamaWeights, method: Method, device: str, *, kernels, eos_ids: frozenset[int] = frozenset()
    ):
        super().__init__(weights, method, device, eos_ids)
        self.kernels, self.timer, self.here = kernels, timer_for(device), current(device)
        self.beside = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def workspace(self, tokens: int, settings: SamplingSettings) -> StepGraph:
        """Return the buffers, and on a GPU the graph, for generations of up to `tokens` positions."""
        capacity, threshold = capacity_for(tokens, self.context), self.threshold

        def make() -> StepGraph:
            decoder = Decoder(self.model, self.kernels, capacity=capacity, threshold=threshold, device=self.device)
            return StepGraph(decoder, settings)

        return self.take((capacity, draw_of(settings), threshold), make)

    def start_several(self, prompts: Sequence[list[int]], settings: SamplingSettings) -> BatchGeneration:
        """Begin generations that are decoded together, one for each of `prompts`; nothing is read until `prefill()`."""
        return BatchGeneration(self, prompts, settings)

    def decode_logits(self, ids: list[int], stopped: Callable[[], bool] | None = None) -> torch.Tensor:
        """As `logits`, through the decode step with its KV cache: a call a token, each fed the text's own."""
        logits = torch.empty(len(ids), self.architecture.vocab_size, device=self.device)
        with self.here:
            graph = self.workspace(len(ids), SamplingSettings())
            graph.decoder.position.zero_()
            for position, token in enumerate(ids):
                if stopped and stopped():
                    raise Interrupted
                graph.decoder.token.fill_(token)
                graph.step()
                logits[position] = graph.decoder.logits
        self.spare.append(graph)
        return logits

    def outlier_counts(self, ids: list[int]) -> list[int]:
        """Return how many columns of each input are outliers; see `LlamaEngine`."""
        outlier_marks = outlier_marks_for(self.architecture, self.device)
        self.logits(ids, outlier_marks=outlier_marks)
        return outlier_marks.sum(1, dtype=torch.int64).tolist()

    def logits(
        self,
        ids: list[int],
        stopped: Callable[[], bool] | None = None,
        outlier_marks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return (tokens, vocab_size) next-token logits after each of `ids`, in one call. `stopped` as in `prefill`;
        `outlier_marks` as in `read_prompt`."""
        a, weights, kernels = self.architecture, self.model, self.kernels
        with self.here:
            shape = (2, a.kv_heads, len(ids), a.head_dim)
            caches = [Cache(*torch.empty(shape, dtype=weights.dtype, device=self.device)) for _ in range(a.layers)]
            tokens, rope = torch.tensor(ids, device=self.device), rope_table(a, len(ids), self.device)
            hidden = read_prompt(
                weights, kernels, tokens, caches, rope,
                threshold=self.threshold, stopped=stopped, outlier_marks=outlier_marks,
            )  # fmt: skip
            threshold = self.threshold if isinstance(weights.head, Int8Weight) else None
            marks = torch.zeros(a.hidden_size, dtype=torch.int8, device=self.device)
            rows = kernels.norm_rows(hidden, weights.norm, a.eps, Noting(threshold, marks))
            return kernels.linear_rows(rows, weights.head)
