"""CUDA graphs of the lean loop: a decode step with its choice, and short prompts; elsewhere plain calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmq.engine.decoder import Decoder
from llmq.engine.sampling import Sampler, SamplingSettings

if TYPE_CHECKING:
    from llmq.engine.batch import BatchDecoder

STEPS_UNDER_WAY = 2  # the one awaited and the next
SHORTEST_PROMPT_GRAPH, LONGEST_PROMPT_GRAPH = 64, 2048  # rows; a longer prompt keeps the GPU busier than its launches
log = logging.getLogger(__name__)


def draw_of(settings: SamplingSettings) -> tuple:
    """Return the settings that a captured step depends on; greedy decoding depends on the temperature alone."""
    return (settings.temperature, settings.top_k, settings.top_p) if settings.temperature else (0.0,)


def graph_rows(tokens: int) -> int:
    """Return how many rows the graph has that reads a prompt of so many tokens: a quarter more at most where it
    is long, for every row is worked on, and 16 sizes in all."""
    step = max(SHORTEST_PROMPT_GRAPH, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


@dataclass(frozen=True)
class InFlight:
    """A step under way on a GPU: where on the host its token arrives, what its logits were (the next step, under way
    too, overwrites the decoder's), and the events of its start, its end, and of its logits being kept."""

    chosen: torch.Tensor
    logits: torch.Tensor
    begun: torch.cuda.Event
    ended: torch.cuda.Event
    kept: torch.cuda.Event

    @classmethod
    def make(cls, logits: torch.Tensor) -> InFlight:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        chosen = torch.empty(2, dtype=torch.float64, pin_memory=True)
        return cls(chosen, torch.empty_like(logits), begun, ended, torch.cuda.Event())


class StepGraph:
    """A decoder and the way to run its step: captured on a GPU, called elsewhere. `slots`: how many steps can
    be under way on a GPU with a place for what each gives."""

    def __init__(self, decoder: Decoder | BatchDecoder, settings: SamplingSettings, *, slots: int = STEPS_UNDER_WAY):
        self.decoder, self.sampler = decoder, Sampler(settings, decoder.device)
        on_gpu = decoder.device.startswith("cuda")
        self.slots = [InFlight.make(decoder.logits) for _ in range(slots if on_gpu else 0)]
        self.graph = try_capture(self._capture) if on_gpu and decoder.can_be_captured else None
        self.prompts: dict[int, PromptGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None  # prompts' graphs never run side by side

    @property
    def kv_bytes(self) -> int:
        return self.decoder.kv_bytes

    @property
    def workspace_bytes(self) -> int:
        return self.decoder.workspace_bytes + sum(slot.logits.nbytes for slot in self.slots)

    def prompt_of(self, tokens: int) -> PromptGraph | None:
        """Return the graph that reads prompts of about so many tokens, captured now if needed; None if impossible."""
        rows = graph_rows(tokens)
        possible = self.graph and self.decoder.kernels.prompts_can_be_captured
        if not possible or rows > min(LONGEST_PROMPT_GRAPH, self.decoder.capacity):
            return None
        if rows not in self.prompts:
            self.prompts[rows] = try_capture(lambda: PromptGraph(self.decoder, rows, self._pool))
        return self.prompts[rows]

    def read(self, ids: list[int], *, stopped: Callable[[], bool] | None = None) -> None:
        """Read a prompt, by the graph for its length where there can be one; afterwards the decoder has the logits of
        the next token. `stopped` as in `decoder.read_prompt`."""
        if captured := self.prompt_of(len(ids)):
            captured.read(ids)
        else:
            self.decoder.read(torch.tensor(ids, device=self.decoder.device), stopped=stopped)

    def step(self) -> None:
        """Run one token: the forward pass and the choice of the next token."""
        if self.graph:
            self.graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        self.decoder.step()
        self.choose()

    def choose(self) -> None:
        """Choose the next token: from the decoder's `logits` to its `token` and `chosen`."""
        decoder = self.decoder
        if self.sampler.settings.temperature == 0:
            decoder.kernels.likeliest(decoder.logits, decoder.token, decoder.chosen)
        else:
            decoder.chosen.copy_(self.sampler.choose(decoder.logits))
            decoder.token.copy_(decoder.chosen[..., 0])

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record a step; the run before is on a position that the prompt overwrites."""

        def first() -> None:
            self._step()
            self.decoder.position.zero_()

        generator = self.sampler.generator if self.sampler.settings.temperature else None
        return recorded(first, self._step, self.decoder.device, generator=generator)


def recorded(
    first: Callable[[], None],
    run: Callable[[], None],
    device: str,
    *,
    generator: torch.Generator | None = None,
    pool: tuple | None = None,
) -> torch.cuda.CUDAGraph:
    """Run `first`, in which kernels compile, on a stream of its own, then record `run` there. `pool`: where what lives
    during `run` alone is allocated, shared with graphs that never run at the same time."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        first()
    side.synchronize()
    if generator:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=side, pool=pool, capture_error_mode="thread_local"):  # others may compute
        run()
    return graph


def try_capture(capture: Callable):
    """Return what `capture` makes; where capturing fails, None and a line in the log."""
    try:
        return capture()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("no CUDA graph, so each kernel is launched by itself, which is slower: %s", error)
        return None


class PromptGraph:
    """The reading of a prompt of up to `rows` tokens as a graph: hundreds of kernels, each shorter than its launch."""

    def __init__(self, decoder: Decoder, rows: int, pool: tuple):
        device = decoder.device
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.used = torch.full((1,), rows, dtype=torch.int32, device=device)
        level = torch.cuda.memory_allocated(device)

        def measured() -> None:
            torch.cuda.reset_peak_memory_stats(device)
            read()
            self.workspace_bytes = torch.cuda.max_memory_allocated(device) - level

        def read() -> None:
            decoder.read(self.ids, used=self.used)

        self.graph = recorded(measured, read, device, pool=pool)

    def read(self, ids: list[int]) -> None:
        """Fill the decoder's caches and logits."""
        self.ids[: len(ids)].copy_(torch.tensor(ids))
        self.used.fill_(len(ids))
        self.graph.replay()
