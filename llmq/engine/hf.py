"""A transformers causal LM behind our own prefill and decode step, timed from the inside.

One forward call a step with the library's own KV cache, so every architecture and every quantization that transformers
can load runs here. Nothing here knows text: token ids in, token ids out.

Timing: on a GPU a pair of CUDA events around the step, on a CPU the monotonic clock; both include sampling and the
transfer of the chosen token, which the next step needs. Memory on a GPU: the allocator's peak is reset before each
call, so what a call needed beyond what was allocated before it is this engine's and no other's.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmq.devices import first
from llmq.engine.base import Interrupted, Token, token_of, warm_up_length
from llmq.engine.sampling import Sampler, SamplingSettings, likeliest
from llmq.engine.timing import timer_for
from llmq.errors import UserError
from llmq.methods import Method
from llmq.methods.swap import stored_bytes
from llmq.models.config import context_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WARM_UP_STEPS = 2


class HFEngine:
    """One loaded model on one device, for one generation at a time.

    `device` is 'cpu', 'cuda:N', or several GPUs over which the model is spread. `clock` returns seconds and is used on
    a CPU only.
    """

    name = "hf"
    reserved_bytes = 0  # a generation's cache goes with it

    def __init__(
        self, model: PreTrainedModel, method: Method, device: str, *, clock: Callable[[], float] = time.perf_counter
    ):
        self.model, self.method, self.device = model, method, device
        self.weight_bytes, self.context = stored_bytes(model), context_of(model.config)
        self._timer = timer_for(device, clock)
        self._warm: set[int] = set()  # lengths of prompts
        self._applied = [method.stored()]  # the method whose live fields the layers have, for every view

    @property
    def scale_bytes(self) -> int:
        return self.method.scale_bytes(self.model)

    @property
    def read_bytes_per_token(self) -> int:
        """Bytes of weights and scales that one decode step reads; of an untied input embedding it reads one row."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        tied = head is not None and head.weight is embedding.weight
        return self.weight_bytes + self.scale_bytes - (0 if tied else embedding.weight.nbytes)

    @property
    def prompt_checks(self) -> int | None:
        from llmq.hooks import linear_modules

        return len(linear_modules(self.model)) if self.device == "cpu" else None

    @property
    def eos_ids(self) -> frozenset[int]:
        eos = self.model.generation_config.eos_token_id
        return frozenset([eos] if isinstance(eos, int) else eos or ())

    def under(self, method: Method) -> HFEngine:
        """Return a view of the same weights with other live fields; its layers are set before every call."""
        view = copy.copy(self)
        view.method = method
        view.settle()
        return view

    def settle(self) -> None:
        """Set the layers' live fields to this view's."""
        if self._applied[0] != self.method:
            self.method.apply_(self.model)
            self._applied[0] = self.method

    def start(self, prompt_ids: list[int], settings: SamplingSettings) -> Generation:
        """Begin a generation: nothing runs until its `prefill()`."""
        return Generation(self, prompt_ids, settings)

    def logits(self, ids: list[int], stopped: Callable[[], bool] | None = None) -> torch.Tensor:
        """Return (tokens, vocab_size) next-token logits after each of `ids`, in one call. `stopped` as in `prefill`."""
        import torch

        self.settle()
        with torch.inference_mode(), _interruptible(self.model, stopped):
            return self.model(torch.tensor([ids], device=first(self.device)), use_cache=False).logits[0]

    def decode_logits(self, ids: list[int], stopped: Callable[[], bool] | None = None) -> torch.Tensor:
        """As `logits`, through the decode step with its KV cache: a call a token, each fed the text's own."""
        import torch

        generation, rows = self.start(ids[:1], SamplingSettings()), []
        for token in ids:
            if stopped and stopped():
                raise Interrupted
            generation.feed(token)
            rows.append(generation.logits)
        generation.close()
        return torch.stack(rows)

    def beam_search(
        self, ids: list[int], width: int, tokens: int, stopped: Callable[[], bool] | None = None
    ) -> list[int]:
        """Return the continuation of at most `tokens` tokens that has the highest log-probability a token among the
        `width` likeliest that transformers' beam search keeps, with its end of text. `stopped` as in `prefill`."""
        import torch

        self.settle()
        prompt = torch.tensor([ids], device=first(self.device))
        with torch.inference_mode(), _interruptible(self.model, stopped):
            found = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), num_beams=width, max_new_tokens=tokens,
                do_sample=False, length_penalty=1.0, repetition_penalty=1.0, no_repeat_ngram_size=0,
                pad_token_id=min(self.eos_ids, default=0),
            )[0, len(ids) :].tolist()  # fmt: skip
        end = next((place for place, token in enumerate(found, 1) if token in self.eos_ids), len(found))
        return found[:end]

    def outlier_share(self, ids: list[int]) -> float:
        """Return the mean share of input columns that a linear layer says it multiplied in 16 bit while the model read
        `ids` in one call; over the layers that can say, 0 if none can."""
        self.logits(ids)
        found = ((module, self.method.outlier_columns(module)) for module in self.model.modules())
        shares = [len(columns) / module.in_features for module, columns in found if columns is not None]
        return sum(shares) / len(shares) if shares else 0.0

    def warm_up(self, prompt_ids: list[int]) -> None:
        """Run what a generation of this prompt will run, uncounted: kernels load, clocks and caches settle."""
        length = warm_up_length(len(prompt_ids), self.device)
        if length in self._warm:
            return
        generation = self.start(prompt_ids[:length], SamplingSettings(max_new_tokens=WARM_UP_STEPS + 1))
        generation.prefill()
        for _ in range(WARM_UP_STEPS):
            generation.step()
        self._warm.add(length)


class Generation:
    """One generation under way: `prefill()` gives token 0, each `step()` the next. Drop it to free its KV cache."""

    def __init__(self, engine: HFEngine, prompt_ids: list[int], settings: SamplingSettings):
        from transformers import DynamicCache

        assert prompt_ids, "a generation needs at least one prompt token"
        self._engine = engine
        self._prompt_ids = prompt_ids
        self._cache_name = cache_name(engine.model)
        self._cache = DynamicCache(config=engine.model.config)
        self._sampler = Sampler(settings, first(engine.device))
        self._last: int | None = None
        self.logits: torch.Tensor | None = None  # (vocabulary,), of the last call
        self.workspace_bytes = 0  # most that one call needed beyond weights and KV cache; 0 on a CPU
        self.peak_bytes = 0  # most that KV cache and workspace took together
        self.allocator_peak_bytes = 0  # highest level of the device's allocator during our calls, everyone's tensors

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache now: keys and values, or whatever else a layer keeps of a text, with the memory that they
        are a view of. What a sliding window shows of a long prompt is one."""
        import torch

        layers = self._cache.layers if self._cache is not None else ()
        kept = (part for layer in layers for part in vars(layer).values())
        parts = (part for value in kept for part in (value.values() if isinstance(value, dict) else [value]))
        tensors = (part.untyped_storage() for part in parts if isinstance(part, torch.Tensor) and part.ndim)
        return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())

    def prefill(self, stopped: Callable[[], bool] | None = None) -> Token:
        """Read the whole prompt in one call and sample token 0; its seconds are the time to first token.

        `stopped` is asked before every linear layer, so a long prompt can be given up at once (raises Interrupted).
        One call, not chunks: LLM.int8() pools outlier columns over the rows of a call, so chunks would change results.
        """
        with _interruptible(self._engine.model, stopped):
            return self._forward(self._prompt_ids)

    def step(self) -> Token:
        """Feed the last token, sample the next."""
        assert self._last is not None, "prefill before the first step"
        return self.feed(self._last)

    def feed(self, token_id: int) -> Token:
        """Feed this token, whatever was sampled before, and sample the next."""
        return self._forward([token_id])

    def best(self, last: Token, count: int) -> dict[int, float]:
        """Return the likeliest tokens at the last token's place; see `base.Generation`."""
        return likeliest(self.logits, last, count)

    def _forward(self, ids: list[int]) -> Token:
        import torch

        timer, model = self._engine._timer, self._engine.model
        self._engine.settle()
        kv_before = self.kv_bytes
        with torch.inference_mode(), timer:
            tokens = torch.tensor([ids], device=first(self._engine.device))
            kept = {self._cache_name: self._cache}
            logits = model(tokens, **kept, use_cache=True, logits_to_keep=1).logits[0, -1]
            token_id, logprob = self._sampler.choose(logits).tolist()
        self.logits = logits
        self._record_memory(kv_before, timer.growth_bytes)
        token = token_of(token_id, logprob, timer.seconds)
        self._last = token.token_id
        return token

    def _record_memory(self, kv_before: int, growth: int) -> None:
        kv_growth = self.kv_bytes - kv_before
        self.workspace_bytes = max(self.workspace_bytes, growth - kv_growth)
        self.peak_bytes = max(self.peak_bytes, kv_before + max(growth, kv_growth))
        self.allocator_peak_bytes = max(self.allocator_peak_bytes, self._engine._timer.peak_bytes)

    def close(self) -> None:
        """Free the KV cache; the object is of no more use."""
        self._cache = self.logits = None


def cache_name(model: PreTrainedModel) -> str:
    """Find the name under which `model.forward` takes a KV cache and gives it back: under another it would stay empty,
    without a word. Raises UserError for a model that takes none."""
    known = inspect.signature(type(model).forward).parameters
    if name := next((name for name in ("cache", "past_key_values") if name in known), None):
        return name
    raise UserError(f"{type(model).__name__} takes no KV cache, which writing text here needs")


@contextmanager
def _interruptible(model: torch.nn.Module, stopped: Callable[[], bool] | None) -> Iterator[None]:
    """Make every linear layer of `model` ask `stopped()` before it runs, and raise Interrupted if it says yes."""
    from llmq.hooks import Watched, linear_modules

    def check(*_) -> None:
        if stopped():
            raise Interrupted

    with Watched(linear_modules(model) if stopped else {}, on_input=check):
        yield
