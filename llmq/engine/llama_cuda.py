"""The lean loop on a GPU: a LLaMA without a framework's overhead, the same for FP16 and int8, so that speeds compare.

On a GPU a decode step is one CUDA graph, sampling included, and nothing in it waits for the host. The host runs one
step ahead: while a token is read back the next step is already running, so an end-of-text is noticed one step late and
that step's result is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from llmq.engine.base import Interrupted, Token, capacity_for, token_of
from llmq.engine.cuda_graph import InFlight, StepGraph, draw_of
from llmq.engine.llama import LlamaEngine, share_of_columns
from llmq.engine.llama_weights import LlamaWeights
from llmq.engine.prefill import outlier_marks_for, read_prompt
from llmq.engine.rope import rope_table
from llmq.engine.sampling import SamplingSettings
from llmq.engine.timing import timer_for
from llmq.kernels.backend import current
from llmq.kernels.buffers import Cache, Noting
from llmq.kernels.primitives import Int8Weight
from llmq.methods import Method
from llmq.models.architecture import Architecture


class CudaLlama(LlamaEngine):
    """One LLaMA under one method on one device, for one generation at a time. `kernels`: reference or triton."""

    def __init__(
        self,
        weights: LlamaWeights,
        architecture: Architecture,
        method: Method,
        device: str,
        *,
        kernels,
        eos_ids: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(weights, architecture, method, device, eos_ids)
        self.kernels, self.timer, self.here = kernels, timer_for(device, clock), current(device)

    def start(self, prompt_ids: list[int], settings: SamplingSettings) -> CudaGeneration:
        """Begin a generation: nothing runs until its `prefill()`."""
        return CudaGeneration(self, prompt_ids, settings)

    def step_graph(self, tokens: int, settings: SamplingSettings) -> StepGraph:
        """Return the buffers, and on a GPU the graph, for generations of up to `tokens` positions."""
        capacity = capacity_for(tokens, self.context)
        kind = (capacity, draw_of(settings), self.threshold)
        return self.take(kind, lambda: StepGraph(self, capacity, settings))

    def logits(self, ids: list[int], stopped: Callable[[], bool] | None = None) -> torch.Tensor:
        """Return (tokens, vocab_size) next-token logits after each of `ids`, in one call. `stopped` as in `prefill`."""
        with self.here:
            return self._logits(ids, stopped)

    def outlier_share(self, ids: list[int]) -> float:
        """Return the same as `HFEngine.outlier_share`, over the layers without the head."""
        outlier_marks = outlier_marks_for(self.architecture, self.device)
        with self.here:
            self._logits(ids, None, outlier_marks)
        return share_of_columns(self.architecture, outlier_marks.sum(1, dtype=torch.int64).tolist())

    def _logits(
        self, ids: list[int], stopped: Callable[[], bool] | None, outlier_marks: torch.Tensor | None = None
    ) -> torch.Tensor:
        a, dtype = self.architecture, self.model.dtype
        shape = (2, a.kv_heads, len(ids), a.head_dim)
        caches = [Cache(*torch.empty(shape, dtype=dtype, device=self.device)) for _ in range(a.layers)]
        tokens = torch.tensor(ids, device=self.device)
        rope = rope_table(a, len(ids), self.device)
        hidden = read_prompt(
            self.model, a, self.kernels, tokens, caches, rope,
            threshold=self.threshold, stopped=stopped, outlier_marks=outlier_marks,
        )  # fmt: skip
        threshold = self.threshold if isinstance(self.model.head, Int8Weight) else None
        noting = Noting(threshold, torch.zeros(a.hidden_size, dtype=torch.int8, device=self.device))
        rows = self.kernels.norm_rows(hidden, self.model.norm, a.eps, noting)
        return self.kernels.linear_rows(rows, self.model.head)


class CudaGeneration:
    """One generation under way; see `base.Generation`."""

    def __init__(self, engine: CudaLlama, prompt_ids: list[int], settings: SamplingSettings):
        assert prompt_ids, "a generation needs at least one prompt token"
        self._engine, self._prompt_ids, self._settings = engine, prompt_ids, settings
        self._tokens = min(engine.context, len(prompt_ids) + settings.max_new_tokens)
        self._graph: StepGraph | None = None
        self._in_flight: deque[InFlight] = deque()
        self._begun = 0  # decode steps
        self.workspace_bytes = self.peak_bytes = self.allocator_peak_bytes = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, exact tensor sizes."""
        return self._graph.decoder.kv_bytes if self._graph else 0

    def prefill(self, stopped: Callable[[], bool] | None = None) -> Token:
        """Read the whole prompt in one call and sample token 0; its seconds are the time to first token."""
        with self._engine.here:
            return self._prefill(stopped)

    def _prefill(self, stopped: Callable[[], bool] | None) -> Token:
        engine = self._engine
        self._graph = engine.step_graph(self._tokens, self._settings)
        decoder, sampler = self._graph.decoder, self._graph.sampler
        sampler.generator.manual_seed(int(self._settings.seed))
        timer, captured = engine.timer, self._graph.prompt_of(len(self._prompt_ids))
        if captured and stopped and stopped():
            raise Interrupted
        with timer:
            if captured:
                captured.read(self._prompt_ids)
            else:
                self._read(stopped)
            self._graph.choose()
            token_id, logprob = decoder.chosen.tolist()
        self._record_memory(captured.workspace_bytes if captured else timer.growth_bytes, timer.peak_bytes)
        return token_of(token_id, logprob, timer.seconds)

    def _read(self, stopped: Callable[[], bool] | None) -> None:
        engine, decoder = self._engine, self._graph.decoder
        ids = torch.tensor(self._prompt_ids, device=engine.device)
        hidden = read_prompt(
            engine.model,
            engine.architecture,
            engine.kernels,
            ids,
            decoder.caches,
            decoder.rope,
            threshold=engine.threshold,
            stopped=stopped,
        )
        decoder.score(hidden[-1])
        decoder.position.fill_(len(ids))

    def step(self) -> Token:
        """Sample the next token."""
        assert self._graph is not None, "prefill before the first step"
        if not self._engine.device.startswith("cuda"):
            return self._timed_step()
        with self._engine.here:
            return self._next()

    def _next(self) -> Token:
        """Keep the device busy, and wait for the oldest step under way."""
        while len(self._in_flight) < len(self._graph.slots) and self._begun < self._limit:
            self._begin()
        oldest = self._in_flight.popleft()
        oldest.ended.synchronize()
        self.allocator_peak_bytes = torch.cuda.max_memory_allocated(self._engine.device)
        return token_of(*oldest.chosen.tolist(), oldest.begun.elapsed_time(oldest.ended) / 1e3)

    def _timed_step(self) -> Token:
        timer = self._engine.timer
        with timer:
            self._graph.step()
            token_id, logprob = self._graph.decoder.chosen.tolist()
        return token_of(token_id, logprob, timer.seconds)

    def _begin(self) -> None:
        """Put one more step under way."""
        new = self._graph.slots[self._begun % len(self._graph.slots)]
        new.begun.record()
        self._graph.step()
        new.chosen.copy_(self._graph.decoder.chosen, non_blocking=True)
        new.ended.record()
        self._in_flight.append(new)
        self._begun += 1

    @property
    def _limit(self) -> int:
        """Decode steps that the KV cache has positions for."""
        return self._graph.decoder.capacity - len(self._prompt_ids)

    def _record_memory(self, growth: int, allocator_peak: int) -> None:
        self.workspace_bytes = max(growth, self._graph.decoder.workspace_bytes)
        self.peak_bytes = self.kv_bytes + self.workspace_bytes
        self.allocator_peak_bytes = max(self.allocator_peak_bytes, allocator_peak)

    def close(self) -> None:
        """Give the workspace back for the next generation; the object is of no more use."""
        self._in_flight.clear()
        if self._graph:
            self._engine.spare.append(self._graph)
        self._graph = None
