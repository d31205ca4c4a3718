"""Decoding through transformers' own `generate`: our drop-in beside FP16 and bitsandbytes, eager and compiled.

'eager' is a plain `generate`; 'compiled' has a static cache, for which transformers compiles the decode step by itself,
on a GPU into CUDA graphs. It compiles no bitsandbytes model. Tokens are timed as they arrive on the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmq.bench.setup import Bench, require_whole, spread
from llmq.contestant import Contestant
from llmq.engine.loading import Key
from llmq.errors import BadChoice, first_line, unknown
from llmq.events import Event, Progress
from llmq.machine.door import Lease
from llmq.methods import METHODS
from llmq.methods.swap import stored_bytes
from llmq.models.loading import load_model
from llmq.models.opening import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODES = ("eager", "compiled")
CPU_COMPILER = {"mode": "default", "backend": "inductor"}  # of a CPU, for which transformers compiles nothing by itself
NO_TOKEN = -1  # as the end of text: every generation is as long as asked


@dataclass(frozen=True, kw_only=True)
class GenerateBench(Bench):
    """`repeats` rounds, in each of which every contestant decodes once in each of `modes`; all are in memory."""

    kind = "transformers"
    columns = ("method", "mode", "tokens_per_second", "over_fp16", "over_bnb", "prefill_seconds", "weight_bytes")
    columns += ("peak_bytes",)
    new_tokens: int = 64
    modes: str = ",".join(MODES)

    def __post_init__(self):
        super().__post_init__()
        require_whole("new_tokens", self.new_tokens, 2)
        for mode in self.modes.split(","):
            if mode not in MODES:
                raise unknown("mode", mode, MODES)
        if self.engine not in ("auto", "hf"):
            raise BadChoice(f"engine {self.engine!r} is not transformers' generate; choose auto or hf")

    @property
    def positions(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def loop_of(self, contestant: Contestant, model: Model) -> str:
        return "hf"

    def run(self, lease: Lease) -> Iterator[Event | Progress | dict]:
        """Everybody in turn, round by round; last comes the result. The first round, which compiles, is not counted."""
        setup = yield from self.prepare(lease)
        sides: list[_Side] = []
        for contestant, key in setup.entries:
            yield lease.progress(f"loading {contestant.label}")
            model = _loaded(key)
            modes = [mode for mode in self.modes.split(",") if mode == "eager" or contestant.method.name != "bnb-int8"]
            weight_bytes = stored_bytes(model) + contestant.method.scale_bytes(model)
            sides += [_Side(contestant.label, mode, model, weight_bytes, lease.clock) for mode in modes]
        try:
            for number in range(self.repeats + 1):
                for side in sides:
                    yield lease.progress(f"round {number} of {self.repeats}: {side.label}, {side.mode}")
                    if not side.error:
                        side.run(setup.prompt_ids, self.new_tokens, first=number == 0)
        finally:
            _forget_graphs()
        conditions = {"new_tokens": self.new_tokens, "schedule": "everybody in turn, round by round"}
        yield self.result(setup, list(_rows(sides)), conditions)


def _forget_graphs() -> None:
    """Free what was compiled, on the thread that compiled it: CUDA graphs do not outlive theirs in order."""
    import torch

    torch.compiler.reset()


def _loaded(key: Key) -> PreTrainedModel:
    """The model of one contestant; llm-int8 through the drop-in."""
    from llmq.kernels.backend import current
    from llmq.methods.layers.linear_8bit import convert_

    dropped_in = key.method.name == "llm-int8"
    with current(key.device):
        model = load_model(key.model.source, METHODS["fp16"] if dropped_in else key.method, key.device)
        if dropped_in:
            convert_(model, key.method.threshold)
    return model


@dataclass
class _Side:
    """Who takes part in which mode, and what every counted round gave. `error`: why it takes part no longer."""

    label: str
    mode: str
    model: PreTrainedModel
    weight_bytes: int
    clock: Callable[[], float] = time.perf_counter
    speeds: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ready_seconds: float = 0.0
    peak_bytes: int | None = None
    graph_breaks: int = 0
    cudagraph_skips: int = 0
    error: str = ""

    def run(self, ids: list[int], new_tokens: int, *, first: bool) -> None:
        """Generate once. The first time is not counted: it compiles, and shows what memory that takes."""
        arrivals = _Arrivals(self.clock)
        try:
            if first:
                self._first(ids, new_tokens, arrivals)
            else:
                self._generate(ids, new_tokens, arrivals)
                self.prefills.append(arrivals.seconds[1] - arrivals.seconds[0])
                self.speeds.append((new_tokens - 1) / (arrivals.seconds[-1] - arrivals.seconds[1]))
        except RuntimeError as error:  # a compiler's, or no memory: the others go on
            self.error = first_line(error)

    def _first(self, ids: list[int], new_tokens: int, arrivals: _Arrivals) -> None:
        import torch
        from torch._dynamo.utils import counters

        on_gpu, started = self.model.device.type == "cuda", self.clock()
        counters.clear()
        before = torch.cuda.memory_allocated(self.model.device) if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        self._generate(ids, new_tokens, arrivals)
        self.ready_seconds = self.clock() - started
        if on_gpu:
            self.peak_bytes = self.weight_bytes + torch.cuda.max_memory_allocated(self.model.device) - before
        self.graph_breaks = sum(counters["graph_break"].values())
        self.cudagraph_skips = counters["inductor"]["cudagraph_skips"]

    def _generate(self, ids: list[int], new_tokens: int, arrivals: _Arrivals) -> None:
        import torch
        from transformers import GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0,
            cache_implementation="static" if self.mode == "compiled" else None, compile_config=self._compiler(),
        )  # fmt: skip
        prompt = torch.tensor([ids], device=self.model.device)
        mask = torch.ones_like(prompt)
        made = self.model.generate(prompt, attention_mask=mask, generation_config=settings, streamer=arrivals)
        self.tokens = made[0, len(ids) :].tolist()

    def _compiler(self):
        """None on a GPU: what transformers does by itself."""
        from transformers import CompileConfig

        if self.mode == "eager" or self.model.device.type != "cpu":
            return None
        config = CompileConfig(**CPU_COMPILER)
        config._compile_all_devices = True
        return config


class _Arrivals:
    """When the prompt and then each token was handed over, as transformers' streamers are."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.seconds = clock, []

    def put(self, value) -> None:
        self.seconds.append(self.clock())

    def end(self) -> None:
        """There is nothing to close."""


def _rows(sides: list[_Side]) -> Iterator[dict]:
    found = {(side.label, side.mode): side for side in sides}
    for side in sides:
        twin = found.get((side.label, "eager"))
        measured = bool(side.speeds) and not side.error
        yield {
            "method": side.label,
            "mode": side.mode,
            "error": side.error,
            **(spread("tokens_per_second", side.speeds) if measured else {"tokens_per_second": None}),
            "over_fp16": _ratio(side, found.get(("fp16", side.mode))),
            "over_bnb": _ratio(side, found.get(("bnb-int8", "eager"))),
            "prefill_seconds": statistics.median(side.prefills) if measured else None,
            "ready_seconds": side.ready_seconds,
            "weight_bytes": side.weight_bytes,
            "peak_bytes": side.peak_bytes,
            "tokens_as_eager": _common(side.tokens, twin.tokens) if twin else None,
            "graph_breaks": side.graph_breaks,
            "cudagraph_skips": side.cudagraph_skips,
        }


def _ratio(side: _Side, other: _Side | None) -> float | None:
    """The median of the rounds' ratios: both sides of a round saw the same machine."""
    if other is None or side.error or other.error:
        return None
    return statistics.median(a / b for a, b in zip(side.speeds, other.speeds, strict=True))


def _common(tokens: list[int], others: list[int]) -> int:
    """How many of the first tokens are the same."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), len(tokens))
