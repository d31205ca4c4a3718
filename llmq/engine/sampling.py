"""From logits to one token: greedy, temperature, top-k, top-p, with a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.errors import BadChoice

if TYPE_CHECKING:
    import torch

    from llmq.engine.base import Token

MAX_NEW_TOKENS = 4096
MAX_TEMPERATURE = 2.0  # as the page and OpenAI's interface have it: a setting means the same wherever a model runs


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are chosen. `temperature` 0 is greedy and ignores the seed; `top_k` 0 and `top_p` 1 are off.

    Filters apply in this order: temperature, top-k, top-p (as transformers does).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_seconds: float = 3600.0

    def __post_init__(self):
        _require("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS, whole=True)
        _require("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _require("top_k", self.top_k, 0, 1_000_000, whole=True)
        _require("top_p", self.top_p, 0.0, 1.0)
        _require("seed", self.seed, 0, 2**63 - 1, whole=True)
        _require("max_seconds", self.max_seconds, 0.0, 86_400.0)
        if self.top_p == 0.0:
            raise BadChoice("top_p is 0; choose a number in (0, 1]")


def _require(name: str, value, low: float, high: float, *, whole: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (whole and value != int(value)):  # NaN fails the range
        kind = "whole number" if whole else "number"
        raise BadChoice(f"{name} is {value!r:.80}; choose a {kind} from {low:g} to {high:g}")


class Sampler:
    """Draws tokens on the logits' device; two samplers with one seed see the same noise.

    So two contestants that agree on a distribution draw the same token: a difference in text comes from a difference
    in logits, not from luck.
    """

    def __init__(self, settings: SamplingSettings, device: str):
        import torch

        self.settings = settings
        self.generator = torch.Generator(device=device).manual_seed(int(settings.seed))

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose from (..., vocab_size) float logits -> float64 (..., 2): token ids, and their log-probabilities before
        any filter.

        One small tensor so that a GPU needs one transfer. NaN logits give a NaN log-probability.
        """
        import torch

        logits = logits.float()
        weights = logits if self.settings.temperature == 0 else self._noisy(logits)
        token = weights.argmax(-1, keepdim=True)
        logprob = logits.log_softmax(-1).gather(-1, token)  # few kernels, and indexing would wait for a GPU
        return torch.cat([token.double(), logprob.double()], -1)

    def _noisy(self, logits: torch.Tensor) -> torch.Tensor:
        """Numbers of which the largest is at a token drawn at random."""
        import torch

        weights = filtered_probabilities(logits, self.settings)
        noise = torch.empty_like(weights).exponential_(generator=self.generator)
        # argmax(p / E), E ~ Exp(1), is a draw from p: the exponential form of the Gumbel-max trick.
        return weights / noise


def likeliest(logits: torch.Tensor, known: Token, count: int) -> dict[int, float]:
    """Return the `count` likeliest tokens of (vocab_size,) logits, id -> probability, likeliest first. The probability
    of one of them is `known`: so there is no second sum over the vocabulary."""
    values, ids = logits.topk(min(count, len(logits)))
    distances = values.float() - logits[known.token_id].float()
    return dict(zip(ids.tolist(), (distances + known.logprob).exp().tolist(), strict=True))


def filtered_probabilities(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Turn (..., vocab_size) float32 logits into float32 probabilities after temperature, top-k, top-p."""
    import torch

    # The largest logit is moved to 0 first, in float64: hardly any temperature then divides to -inf, never to NaN.
    logits = (logits.double() - logits.amax(-1, keepdim=True)) / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        kept = logits.topk(int(settings.top_k)).values[..., -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # Nucleus: the smallest set whose mass reaches top_p; a token goes if the mass before it already does.
        outside = probabilities.cumsum(-1) - probabilities >= settings.top_p
        logits = logits.scatter(-1, order, ordered.masked_fill(outside, -torch.inf))
    return logits.softmax(-1).float()
