"""Decoding through transformers' own `generate`: our drop-in beside FP16 and bitsandbytes, eager and compiled.

'eager' is a plain `generate`; 'compiled' has a static cache, for which transformers compiles the decode step by itself,
on a GPU into CUDA graphs. It compiles no bitsandbytes model. Tokens are timed as they arrive on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from llmq.bench.rounds import ratio, spread
from llmq.bench.setup import DecodingBench, Setup, Side
from llmq.contestant import Contestant
from llmq.engine.loading import Key
from llmq.errors import BadChoice, UserError, first_line, unknown
from llmq.events import Event, Progress
from llmq.machine.door import Lease
from llmq.machine.pool import watched_release
from llmq.methods import METHODS, Method
from llmq.methods.swap import stored_bytes
from llmq.models.loading import load_model
from llmq.models.opening import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
MODES = ("eager", "compiled")
CPU_COMPILER = {"mode": "default", "backend": "inductor"}  # of a CPU, for which transformers compiles nothing by itself
NO_TOKEN = -1  # as the end of text: every generation is as long as asked


@dataclass
class Home:
    """Where the model of a contestant is, for all its modes."""

    model: PreTrainedModel | None = None

    def load(self, key: Key, method: Method) -> int:
        """Load the model unless it is there; its bytes. `method`: with its threshold, which a key has not."""
        self.model = self.model or _loaded(key, method)
        return stored_bytes(self.model) + method.scale_bytes(self.model)

    def generate(self, mode: str, prompts: list[list[int]], new_tokens: int, arrivals: Arrivals) -> list[int]:
        """Continue all `prompts`, which are of one length; the tokens of the first."""
        import torch
        from transformers import GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0,
            cache_implementation="static" if mode == "compiled" else None,
            compile_config=_compiler(mode, self.model.device.type),
        )  # fmt: skip
        prompt = torch.tensor(prompts, device=self.model.device)
        mask = torch.ones_like(prompt)
        made = self.model.generate(prompt, attention_mask=mask, generation_config=settings, streamer=arrivals)
        return made[0, prompt.shape[1] :].tolist()

    def forget(self) -> None:
        """Free what a batch left; transformers leaves nothing."""

    def release(self) -> None:
        self.model = None


@dataclass
class ModeSide(Side):
    """A contestant in one of its modes. `tokens`: those of its last turn; `error`: why it takes part no longer."""

    mode: str = "eager"
    home: Home = field(default_factory=Home)
    tokens: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def title(self) -> str:
        return f"{self.label}, {self.mode}"


@dataclass(frozen=True, kw_only=True)
class GenerateBench(DecodingBench):
    """In every round every contestant decodes once in each of `modes`."""

    kind = "transformers"
    columns = ("method", "mode", "tokens_per_second", "over_fp16", "over_bnb", "prefill_seconds", "weight_bytes")
    columns += ("peak_bytes",)
    own_loop: ClassVar[str | None] = None  # the engine beside transformers that a subclass measures, too
    modes: str = ",".join(MODES)

    def __post_init__(self):
        super().__post_init__()
        for mode in self.modes.split(","):
            if mode not in MODES:
                raise unknown("mode", mode, MODES)
        if self.engine == self.own_loop:
            return
        for contestant in self.contestants:
            if contestant.method.name == "llm-int8" and not dropped_in(contestant.method):
                told = "here llm-int8 is the drop-in for transformers, of which only the threshold can be set"
                raise BadChoice(f"{contestant.label} is not measured: {told}")
        if self.engine not in ("auto", "hf"):
            raise BadChoice(f"engine {self.engine!r} is not transformers' generate; choose auto or hf")

    def loop_of(self, contestant: Contestant, model: Model) -> str:
        return "hf"

    def run(self, lease: Lease) -> Iterator[Event | Progress | dict]:
        try:
            yield from super().run(lease)
        finally:
            _forget_graphs()

    def sides(self, setup: Setup) -> list[Side]:
        found = []
        for contestant, key in setup.entries:
            home = Home()
            modes = [mode for mode in self.modes.split(",") if mode == "eager" or contestant.method.name != "bnb-int8"]
            found += [ModeSide(contestant, key, mode=mode, home=home) for mode in modes]
        return found

    def groups(self, sides: list[ModeSide], *, apart: bool) -> list[list[ModeSide]]:
        """A contestant is there once for all its modes."""
        return grouped(sides, lambda side: id(side.home)) if apart else [sides]

    def prompts(self, side: ModeSide, setup: Setup) -> list[list[int]]:
        """As many sequences as are decoded together, of one length."""
        return [setup.prompt_ids]

    def begin(self, lease: Lease, side: ModeSide, setup: Setup) -> dict:
        return {
            "engine": side.key.loop,
            "mode": side.mode,
            "weight_bytes": side.home.load(side.key, side.contestant.method),
        }

    def turn(self, lease: Lease, side: ModeSide, setup: Setup, number: int) -> dict:
        """Generate once. The first time compiles, and shows what memory that takes."""
        arrivals = Arrivals(lease.clock)
        generate = self._generate if number else self._first
        try:
            if not side.error:
                generate(side, self.prompts(side, setup), arrivals)
        except (RuntimeError, UserError) as error:  # a compiler's, no memory, no number: the others go on
            side.error = first_line(error)
            side.home.forget()
        return {} if side.error else arrivals.figures(self.new_tokens)

    def _first(self, side: ModeSide, prompts: list[list[int]], arrivals: Arrivals) -> None:
        import torch
        from torch._dynamo.utils import counters

        device, started = self.device, arrivals.clock()
        on_gpu = device.startswith("cuda")
        counters.clear()
        if side.mode == "compiled":
            _take_a_gradient()
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self._generate(side, prompts, arrivals)
        growth = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
        side.known |= {
            "ready_seconds": arrivals.clock() - started,
            "peak_bytes": None if growth is None else side.known["weight_bytes"] + growth,
            "graph_breaks": sum(counters["graph_break"].values()),
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        }

    def _generate(self, side: ModeSide, prompts: list[list[int]], arrivals: Arrivals) -> None:
        side.tokens = side.home.generate(side.mode, prompts, self.new_tokens, arrivals)

    def end(self, lease: Lease, setup: Setup, sides: list[ModeSide]) -> None:
        _forget_graphs()
        homes = {id(side.home): side for side in sides}.values()

        def release() -> None:
            for side in homes:
                side.home.release()

        freed = watched_release(self.device, sum(side.known["weight_bytes"] for side in homes), release)
        for side in sides:
            side.freed = freed

    def row(self, side: ModeSide) -> dict:
        row = {"error": side.error, "tokens_per_second": None, "prefill_seconds": None}
        if side.error:
            nothing = dict.fromkeys(("ready_seconds", "peak_bytes", "graph_breaks", "cudagraph_skips"))
            return row | nothing | side.known
        return row | spread("tokens_per_second", side.of("speed")) | spread("prefill_seconds", side.of("prefill"))

    def beside(self, side: ModeSide, sides: list[ModeSide], setup: Setup) -> dict:
        """Against FP16 of the same mode, against eager bitsandbytes, and how many of the first tokens are those of its
        own eager mode."""
        found = {(other.label, other.mode): other for other in sides}
        twin = found.get((side.label, "eager"))
        row = {"tokens_as_eager": _common(side.tokens, twin.tokens) if twin else None}
        for name, other in (("over_fp16", ("fp16", side.mode)), ("over_bnb", ("bnb-int8", "eager"))):
            row |= ratio(name, speeds_of(side), speeds_of(found.get(other)), rounds=not setup.apart)
        return row


def grouped(sides: list[T], key: Callable[[T], object]) -> list[list[T]]:
    """Those together that have the same key, in the order of the first of each."""
    found: dict[object, list[T]] = {}
    for side in sides:
        found.setdefault(key(side), []).append(side)
    return list(found.values())


def speeds_of(side: ModeSide | None) -> list[float] | None:
    """Tokens a second of every round; None for nobody, and for one that failed."""
    return None if side is None or side.error else side.of("speed")


def _forget_graphs() -> None:
    """Free what was compiled, on the thread that compiled it: CUDA graphs do not outlive theirs in order."""
    import torch

    torch.compiler.reset()


def dropped_in(method: Method) -> bool:
    """Whether the drop-in's layers compute what a method says."""
    return method.name == "llm-int8" and method == replace(METHODS["llm-int8"], threshold=method.threshold)


def _loaded(key: Key, method: Method) -> PreTrainedModel:
    """The model of one contestant; llm-int8 through the drop-in."""
    from llmq.kernels.backend import current
    from llmq.methods.layers.linear_8bit import convert_

    ours = dropped_in(method)
    with current(key.device):
        model = load_model(key.model.source, METHODS["fp16"] if ours else method, key.device)
        if ours:
            convert_(model, method.threshold)
    return model


def _take_a_gradient() -> None:
    """With torch 2.11 the first gradient of a process ends it where another thread has compiled something before."""
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        one = torch.ones((), requires_grad=True)
        torch.autograd.grad(one * one, one)


def _compiler(mode: str, device: str):
    """None on a GPU: what transformers does by itself."""
    from transformers import CompileConfig

    if mode == "eager" or device != "cpu":
        return None
    config = CompileConfig(**CPU_COMPILER)
    config._compile_all_devices = True
    return config


class Arrivals:
    """When the prompt and then each token was handed over, as transformers' streamers are."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.seconds = clock, []

    def put(self, value) -> None:
        self.seconds.append(self.clock())

    def figures(self, new_tokens: int) -> dict:
        """Seconds of the prefill, and the tokens a second after it."""
        asked, first, *_, last = self.seconds
        return {"prefill": first - asked, "speed": (new_tokens - 1) / (last - first)}

    def end(self) -> None:
        """There is nothing to close."""


def _common(tokens: list[int], others: list[int]) -> int:
    """How many of the first tokens are the same."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), len(tokens))
