"""One layer's causal attention by several kernels, on the same numbers: what each gives, how long it takes, how much
memory it needs beside its inputs.

The exact result is computed in float64 for some of the tokens. A unit of rounding is half of the type's epsilon times
the sum Σ p|v| that makes the number: what one rounding of every term can change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llmq.engine.timing import timer_for
from llmq.errors import first_line, is_allocation_failure
from llmq.levels import highest_level

CHECKED = 256  # tokens whose result is compared
TURN_SECONDS = 0.01  # a turn lasts as long at least: one call of a fast kernel is shorter than its launch
MOST_CALLS = 200  # in a turn


@dataclass(frozen=True)
class Heads:
    """How many heads ask, how many of keys and values they share, and the width of each."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Inputs:
    """Queries (1, heads, tokens, width), keys and values (1, kv_heads, tokens, width), N(0, 1)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def random(cls, heads: Heads, tokens: int, dtype: torch.dtype, device: str) -> Inputs:
        make = torch.Generator(device).manual_seed(0)
        shapes = ((1, count, tokens, heads.head_dim) for count in (heads.heads, heads.kv_heads, heads.kv_heads))
        return cls(*(torch.randn(shape, generator=make, device=device).to(dtype) for shape in shapes))

    @property
    def tokens(self) -> int:
        return self.q.shape[2]

    @property
    def groups(self) -> int:
        """Heads that share keys and values."""
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def mask(self) -> torch.Tensor:
        """(1, 1, tokens, tokens): 0 where a token may look, and the lowest number there is above the diagonal."""
        lowest = torch.finfo(self.q.dtype).min
        return self.q.new_full((1, 1, self.tokens, self.tokens), lowest).triu_(1)

    @cached_property
    def checked(self) -> torch.Tensor:
        """The places of the tokens whose result is compared, the first and the last among them."""
        return torch.linspace(0, self.tokens - 1, min(CHECKED, self.tokens), device=self.q.device).long()


@dataclass(frozen=True)
class Kernel:
    """One way to compute it. `attend`: (1, heads, tokens, width) of inputs, within `chosen()`; `quadratic`: the scores
    of all pairs of tokens are in memory at once."""

    name: str
    attend: Callable[[Inputs], torch.Tensor]
    chosen: Callable[[], AbstractContextManager] = nullcontext
    quadratic: bool = False


def eager(inputs: Inputs) -> torch.Tensor:
    """As transformers' LLaMA computes it with `attn_implementation="eager"`."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    module = SimpleNamespace(num_key_value_groups=inputs.groups, training=False)
    scaling = inputs.q.shape[-1] ** -0.5
    out, _ = eager_attention_forward(module, inputs.q, inputs.k, inputs.v, inputs.mask, scaling)
    return out.transpose(1, 2)


def fused(inputs: Inputs, *, repeated: bool) -> torch.Tensor:
    """PyTorch's call; `repeated`: with keys and values copied for every head, for kernels that cannot share them."""
    k, v = (x.repeat_interleave(inputs.groups, 1) if repeated else x for x in (inputs.k, inputs.v))
    shares = inputs.groups > 1 and not repeated
    return scaled_dot_product_attention(inputs.q, k, v, is_causal=True, enable_gqa=shares)


def torch_kernel(name: str, backend: SDPBackend, *, repeated: bool = False) -> Kernel:
    attend, chosen = partial(fused, repeated=repeated), partial(sdpa_kernel, backend)
    return Kernel(name, attend, chosen, quadratic=backend is SDPBackend.MATH)


EAGER = Kernel("eager", eager, quadratic=True)
BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
CUDA_ONLY = ("memory-efficient", "cuDNN")


def kernels(inputs: Inputs) -> Iterator[tuple[Kernel, str]]:
    """Every kernel, and why it cannot compute such inputs here; '' where it can."""
    yield EAGER, ""
    for name, backend in BACKENDS.items():
        sharing, repeating = (torch_kernel(name, backend, repeated=repeated) for repeated in (False, True))
        if name in CUDA_ONLY and not inputs.q.is_cuda:
            yield sharing, "PyTorch has it for CUDA devices alone"
        elif inputs.groups > 1 and refusal(sharing, inputs):
            yield repeating, refusal(repeating, inputs)
        else:
            yield sharing, refusal(sharing, inputs)


def refusal(kernel: Kernel, inputs: Inputs) -> str:
    """Why a kernel refuses, in PyTorch's words; '' where it computes."""
    with warnings.catch_warnings(record=True) as told, kernel.chosen():
        warnings.simplefilter("always")
        try:
            kernel.attend(inputs)
            return ""
        except RuntimeError as error:
            if is_allocation_failure(error):
                raise
            said = [first_line(warning.message).partition(" (Triggered")[0] for warning in told]
            own = [line for line in said if not line.endswith("because:") and "runtime disabled" not in line]
            return "; ".join(dict.fromkeys(own)) or first_line(error)


def exact(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads, checked, width) float64: the result, and Σ p|v|, of which one rounding of every term is a share."""
    places = torch.arange(inputs.tokens, device=inputs.q.device)
    hidden = places > inputs.checked[:, None]
    found = []
    for head in range(inputs.q.shape[1]):
        q = inputs.q[0, head, inputs.checked].double()
        k, v = (x[0, head // inputs.groups].double() for x in (inputs.k, inputs.v))
        p = (q @ k.T * q.shape[-1] ** -0.5).masked_fill_(hidden, -torch.inf).softmax(-1)
        found.append(torch.stack([p @ v, p @ v.abs()]))
    return tuple(torch.stack(found, 1))


def units_apart(own: torch.Tensor, other: torch.Tensor, terms: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference of two results, in units of rounding; `terms`: the Σ p|v| of each number."""
    unit = torch.finfo(dtype).eps / 2
    return float(((own.double() - other.double()).abs() / (unit * terms)).max())


def distances(able: Sequence[Kernel], inputs: Inputs) -> list[dict[str, float | None]]:
    """How far each kernel's result is from the exact one and from eager's, in units of rounding."""
    (truth, terms), dtype = exact(inputs), inputs.q.dtype
    results = {kernel.name: result_of(kernel, inputs) for kernel in able}
    base = results.get(EAGER.name)
    return [
        {"units_to_exact": units_apart(own, truth, terms, dtype),
         "units_to_eager": None if base is None else units_apart(own, base, terms, dtype)}
        for own in results.values()
    ]  # fmt: skip


def result_of(kernel: Kernel, inputs: Inputs) -> torch.Tensor:
    """(heads, checked, width) of a kernel."""
    with kernel.chosen():
        return kernel.attend(inputs)[0, :, inputs.checked]


def peak_bytes(kernel: Kernel, inputs: Inputs, device: str) -> int:
    """The most that the allocator holds during one call beyond the inputs: what is on the way, and the result."""
    with kernel.chosen():
        if not device.startswith("cuda"):
            return highest_level(partial(kernel.attend, inputs))
        with (timer := timer_for(device)):
            kernel.attend(inputs)
        return timer.growth_bytes


def calls_in_a_turn(kernel: Kernel, inputs: Inputs, device: str) -> int:
    """How many calls a turn takes to last long enough to be measured."""
    return max(1, min(MOST_CALLS, round(TURN_SECONDS / seconds_of(kernel, inputs, device, 1))))


def seconds_of(kernel: Kernel, inputs: Inputs, device: str, calls: int) -> float:
    """Seconds of one call, of `calls` in a row."""
    with kernel.chosen(), (timer := timer_for(device)):
        for _ in range(calls):
            kernel.attend(inputs)
    return timer.seconds / calls
