"""The lean loop on a CPU: one call into a compiled library a token, over weights packed for a linear stream.

Weights are 16 bit or int8; activations and sums are float32, except where LLM.int8() makes int8 codes of them, whose
products are summed exactly in integers. Keys and values are cached in the 16-bit type of the method.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable

import torch

from llmq import cgroup
from llmq.engine.base import Interrupted, Token, capacity_for, token_of
from llmq.engine.llama import LlamaEngine, LlamaGeneration, rope_table
from llmq.engine.llama_weights import LlamaWeights
from llmq.engine.sampling import Sampler, SamplingSettings, likeliest
from llmq.engine.timing import HostTimer
from llmq.kernels.cpu.library import EACH_ROW, KINDS, LANES, STOPPED, Layer, Model, Session, open_library
from llmq.methods import Method


class ThreadPool:
    """The library's threads, freed with the last engine that computes with them. Raises MemoryError."""

    def __init__(self, library, threads: int, regions: int):
        self.address = library.pool_new(threads, regions)
        if not self.address:
            raise MemoryError("no memory for the threads of the CPU loop")
        weakref.finalize(self, library.pool_free, self.address)
        self.threads = library.pool_threads(self.address)


class _CpuWorkspace:
    """The memory of one generation at a time, and the library's view of it."""

    def __init__(self, engine: CpuLlama, capacity: int, *, watch: bool = False):
        a = engine.architecture
        self.engine, self.capacity = engine, capacity
        kind = torch.bfloat16 if engine.method.dtype == "bfloat16" else torch.float16
        self.cache = torch.empty(2, a.layers, a.kv_heads, capacity, a.head_dim, dtype=kind)
        self.rope = rope_table(a, capacity, "cpu")
        self.logits = torch.empty(_eights(a.vocab_size))
        self.chosen = (ctypes.c_double * 2)()
        self.buffers = self._buffers(0)
        self.outlier_marks = torch.zeros(4 * a.layers + 1, _eights(a.widest_input) if watch else 0, dtype=torch.uint8)
        self.read_bytes = 0  # what the last prompt needed besides

    @property
    def kv_bytes(self) -> int:
        return self.cache.nbytes

    @property
    def workspace_bytes(self) -> int:
        return self.rope.nbytes + self.logits.nbytes + self.buffers.nbytes

    def read(
        self, ids: list[int], logits: torch.Tensor, *, every: bool, stopped: Callable[[], bool] | None = None
    ) -> None:
        """Fill the cache from `ids`; see llama.h. Raises Interrupted, and IndexError for tokens beyond the capacity."""
        library = self.engine.library
        self._require(ids, first=0)
        buffers = self._buffers(len(ids))
        self.read_bytes = buffers.nbytes
        tokens = torch.tensor(ids, dtype=torch.int32)
        session = self._session(buffers)
        asked = STOPPED(lambda: bool(stopped())) if stopped else STOPPED()
        if library.llmq_prefill(session, tokens.data_ptr(), len(ids), every, logits.data_ptr(), self.chosen, asked):
            raise Interrupted

    def step(self, token: int, position: int) -> None:
        """Feed `token` at `position`: `logits` and `chosen` are the next token's. Raises IndexError."""
        self._require([token], first=position)
        self.engine.library.llmq_step(self._session(self.buffers), token, position, self.logits.data_ptr(), self.chosen)

    def _require(self, ids: list[int], *, first: int) -> None:
        """Check the range of positions and tokens: the library itself checks nothing."""
        if not (ids and 0 <= first and first + len(ids) <= self.capacity):
            raise IndexError(f"{len(ids)} tokens from position {first}; there is room for {self.capacity}")
        if not (0 <= min(ids) and max(ids) < self.engine.architecture.vocab_size):
            raise IndexError(f"token {min(ids)} or {max(ids)}; there are {self.engine.architecture.vocab_size}")

    def _buffers(self, rows: int) -> torch.Tensor:
        engine, splits = self.engine, self.engine.threshold is not None
        size = engine.library.llmq_workspace_bytes(engine.shape, engine.threads, self.capacity, rows, splits)
        return torch.empty(size, dtype=torch.uint8)

    def _session(self, buffers: torch.Tensor) -> Session:
        engine = self.engine
        keys, values = self.cache
        return Session(
            ctypes.pointer(engine.shape),
            engine.pool.address,
            keys.data_ptr(),
            values.data_ptr(),
            self.rope.data_ptr(),
            self.capacity,
            EACH_ROW if engine.method.by_row else engine.threshold is not None,
            engine.threshold or 0.0,
            self.outlier_marks.shape[1],
            self.outlier_marks.data_ptr(),  # 0 where there is none
            buffers.data_ptr(),
        )


class CpuGeneration(LlamaGeneration):
    """One generation under way; see `base.Generation`."""

    def __init__(self, engine: CpuLlama, prompt_ids: list[int], settings: SamplingSettings):
        super().__init__(engine, prompt_ids, settings)
        self._sampler = Sampler(settings, "cpu")
        self._position, self._token = len(prompt_ids), -1

    def prefill(self, stopped: Callable[[], bool] | None = None) -> Token:
        """Read the whole prompt in one call and sample token 0; its seconds are the time to first token."""
        workspace = self._workspace = self._engine.workspace(self._tokens)
        workspace.engine = self._engine  # whose threshold it computes with
        token = self._timed(lambda: workspace.read(self._prompt_ids, workspace.logits, every=False, stopped=stopped))
        self.workspace_bytes = workspace.workspace_bytes + workspace.read_bytes
        return token

    def step(self) -> Token:
        """Sample the next token."""
        assert self._workspace is not None, "prefill before the first step"
        token = self._timed(lambda: self._workspace.step(self._token, self._position))
        self._position += 1
        return token

    def best(self, last: Token, count: int) -> dict[int, float]:
        """Return the likeliest tokens at the last token's place; see `base.Generation`."""
        return likeliest(self._logits, last, count)

    @property
    def _logits(self) -> torch.Tensor:
        return self._workspace.logits[: self._engine.architecture.vocab_size]

    def _timed(self, compute: Callable[[], None]) -> Token:
        """Compute the next token's logits and choose it."""
        with self._engine.timer:
            compute()
            chosen = self._workspace.chosen
            if self._settings.temperature:
                chosen = self._sampler.choose(self._logits).tolist()
        token = token_of(*chosen, self._engine.timer.seconds)
        self._token = token.token_id
        return token


class CpuLlama(LlamaEngine):
    """One LLaMA under one method on the CPU, for one generation at a time. `weights` are packed (`library.Packing`)."""

    generation = CpuGeneration

    def __init__(
        self,
        weights: LlamaWeights,
        method: Method,
        *,
        eos_ids: frozenset[int] = frozenset(),
        threads: int | None = None,
    ):
        super().__init__(weights, method, "cpu", eos_ids)
        self.timer, self.library = HostTimer(), open_library()
        self.shape = _model(weights, method.dtype)
        self.pool = ThreadPool(self.library, threads or usable_threads(), self.library.llmq_regions(self.shape))
        self.threads = self.pool.threads

    def workspace(self, tokens: int) -> _CpuWorkspace:
        """Return cache and buffers for generations of up to `tokens` positions."""
        capacity = capacity_for(tokens, self.context)
        return self.take((capacity, self.threshold is not None), lambda: _CpuWorkspace(self, capacity))

    def logits(self, ids: list[int], stopped: Callable[[], bool] | None = None) -> torch.Tensor:
        """Return (tokens, vocab_size) next-token logits after each of `ids`, in one call. `stopped` as in `prefill`."""
        workspace = _CpuWorkspace(self, len(ids))
        logits = torch.empty(len(ids), _eights(self.architecture.vocab_size))
        workspace.read(ids, logits, every=True, stopped=stopped)
        return logits[:, : self.architecture.vocab_size]

    def decode_logits(self, ids: list[int], stopped: Callable[[], bool] | None = None) -> torch.Tensor:
        """As `logits`, through the decode step with its KV cache: a call a token, each fed the text's own."""
        workspace, logits = _CpuWorkspace(self, len(ids)), torch.empty(len(ids), self.architecture.vocab_size)
        for position, token in enumerate(ids):
            if stopped and stopped():
                raise Interrupted
            workspace.step(token, position)
            logits[position] = workspace.logits[: self.architecture.vocab_size]
        return logits

    def outlier_columns(self, ids: list[int]) -> list[set[int]]:
        """Return the columns that the library multiplies in 16 bit while it reads `ids`: of the inputs of qkv, output,
        gate_up and down of each layer in turn."""
        workspace = _CpuWorkspace(self, len(ids), watch=True)
        workspace.read(ids, torch.empty(_eights(self.architecture.vocab_size)), every=False)
        return [set(row.nonzero().view(-1).tolist()) for row in workspace.outlier_marks[: 4 * self.architecture.layers]]

    def outlier_counts(self, ids: list[int]) -> list[int]:
        """Return how many columns of each input are outliers; see `LlamaEngine`."""
        return [len(columns) for columns in self.outlier_columns(ids)]


def _model(weights: LlamaWeights, dtype: str) -> Model:
    """The library's view of packed weights, which must outlive it."""
    a = weights.architecture
    layers = (Layer * a.layers)(
        *(
            Layer(
                layer.attention_norm.data_ptr(),
                layer.mlp_norm.data_ptr(),
                layer.qkv.matrix(layer.qkv_bias),
                layer.output.matrix(layer.output_bias),
                layer.gate_up.matrix(),
                layer.down.matrix(),
            )
            for layer in weights.layers
        )
    )
    sizes = (a.layers, a.hidden_size, a.intermediate_size, a.heads, a.kv_heads, a.head_dim, a.vocab_size)
    kind = KINDS[torch.bfloat16 if dtype == "bfloat16" else torch.float16]
    head, embedding = weights.head.matrix(), weights.embedding.matrix()
    return Model(*sizes, kind, a.eps, layers, embedding, head, weights.norm.data_ptr())


def usable_threads() -> int:
    """Return torch's number of threads, but no more than a container's share of the processors: threads beyond it would
    be put to sleep in the middle of a token."""
    return max(1, math.ceil(min(torch.get_num_threads(), cgroup.processors())))


def _eights(size: int) -> int:
    return -(-size // LANES) * LANES
