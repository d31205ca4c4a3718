"""How near one method's predictions are to another's on the same text: one definition for every command and table.

Inputs are logits, (tokens, vocabulary): row i predicts token i + 1. Everything is computed in float64, `ROWS` positions
at a time, so that a small divergence is not the rounding of its own computation. KL is in nats.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from llmq.errors import NOT_A_NUMBER, UserError

if TYPE_CHECKING:
    import torch

ROWS = 64  # positions at a time: a float64 row is as wide as the vocabulary
SMALLEST_REST = 1e-9  # of what a server leaves to the tokens that it does not name: its figures are rounded
LARGEST_LOSS = 700.0  # exp of more overflows a float64


@dataclass(frozen=True)
class TextScore:
    """Means over the scored tokens of one text.

    `loss`: negative log-likelihood of the text in nats a token. `kl`: KL(baseline || own); `reverse_kl`: KL(own ||
    baseline). `top1`: share of positions where both hold the same token likeliest.
    """

    loss: float
    kl: float
    reverse_kl: float
    top1: float


def score_text(
    own: torch.Tensor, baseline: torch.Tensor, ids: Sequence[int], *, allow_overflow: bool = False
) -> TextScore:
    """Score `own` logits of the text `ids` against `baseline` logits; the first token is predicted by nobody.

    Raises UserError where logits are not numbers. With `allow_overflow` such a row of `own` predicts nothing: its loss
    and divergence are infinite and it agrees with nothing.
    """
    return TextScore(*score_tokens(own, baseline, ids, allow_overflow=allow_overflow).mean(1).tolist())


def score_tokens(
    own: torch.Tensor, baseline: torch.Tensor, ids: Sequence[int], *, allow_overflow: bool = False
) -> torch.Tensor:
    """As `score_text`, for each scored token: (4, tokens - 1) float64 on the host, in the order of TextScore."""
    import torch

    found = []
    for p, q, targets in pairs(baseline, own, ids, allow_overflow=allow_overflow):
        same = (p.argmax(-1) == q.argmax(-1)) & (q.amax(-1) > -math.inf)
        loss = -q.gather(1, targets[:, None])[:, 0]
        kls = (torch.zeros_like(loss),) * 2 if q is p else (kl_divergence(p, q), kl_divergence(q, p))
        found.append(torch.stack((loss, *kls, same.double())).cpu())
    return torch.cat(found, 1)


def pairs(
    baseline: torch.Tensor, own: torch.Tensor, ids: Sequence[int], *, first: int = 1, allow_overflow: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(baseline, own) log-probabilities of the tokens from position `first` on and those tokens, `ROWS` positions at a
    time, on the baseline's device."""
    import torch

    for start in range(first - 1, len(ids) - 1, ROWS):
        stop = min(start + ROWS, len(ids) - 1)
        p = log_probabilities(baseline[start:stop])
        same = own is baseline
        q = p if same else log_probabilities(own[start:stop], allow_overflow=allow_overflow).to(p.device)
        yield p, q, torch.tensor(ids[start + 1 : stop + 1], device=p.device)


def log_probabilities(logits: torch.Tensor, *, allow_overflow: bool = False) -> torch.Tensor:
    """(rows, vocabulary) logits as float64 natural-log probabilities. Raises UserError where they are not numbers; with
    `allow_overflow` such a row is -inf throughout."""
    found = logits.double().log_softmax(-1)
    if not bool(found.isnan().any()):
        return found
    if not allow_overflow:
        raise UserError(NOT_A_NUMBER)
    return found.masked_fill(found.isnan().any(-1, keepdim=True), -math.inf)


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(rows,) KL(p || q) in nats from (rows, vocabulary) natural-log probabilities; infinite where q excludes what p
    holds possible. A probability of 0 in p adds nothing. Rounding never makes it negative."""
    weights = p.exp()
    return (weights * (p - q)).masked_fill(weights == 0, 0.0).sum(-1).clamp_min(0.0)


def first_divergence(one: Sequence, other: Sequence) -> int | None:
    """The first place where two sequences differ; None where one is the beginning of the other."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def lumped_divergence(own: torch.Tensor, named: Mapping[int, float]) -> float:
    """KL(own || other) in nats of one place with all tokens but the `named` ones lumped into one: a lower bound of the
    whole, as lumping never adds. `own`: log-probabilities (vocabulary,), float64; `named`: token -> log-probability of
    the other, which need not add up to 1 and may come rounded."""
    tokens = list(named)
    ours = [math.exp(value) for value in own[tokens].tolist()]
    theirs = [math.exp(value) for value in named.values()]
    pairs = [*zip(ours, theirs, strict=True), (max(1 - sum(ours), 0.0), max(1 - sum(theirs), SMALLEST_REST))]
    return max(0.0, sum(p * math.log(p / q) for p, q in pairs if p > 0 and q > 0))


def first_text_divergence(one: Sequence[str], other: Sequence[str]) -> tuple[int | None, int | None]:
    """The first pieces in which two texts differ, however each is cut; (None, None) where one begins the other."""
    texts = "".join(one), "".join(other)
    place = first_divergence(*texts)
    if place is None:
        return None, None
    first, second = (bisect_right(list(accumulate(map(len, pieces))), place) for pieces in (one, other))
    return first, second


def perplexity(loss: float) -> float:
    """Exponential of the mean negative log-likelihood in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The t-interval of the mean of independent `values`, at least two (windows of a text, not its tokens: the tokens
    of one window are not independent)."""
    mean, n = sum(values) / len(values), len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    reach = t_quantile(n - 1, level) * error
    return mean - reach, mean + reach


def equivalence_margin(differences: Sequence[float], alpha: float = 0.05) -> float:
    """The smallest margin within which two one-sided t-tests at `alpha` find the mean difference to be: the end of its
    1 - 2·alpha interval that lies farther from 0 (Schuirmann 1987)."""
    return max(map(abs, mean_interval(differences, 1 - 2 * alpha)))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, linear between two neighbours."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low if low == high else low + (high - low) * (place - math.floor(place))


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The number that |t| stays under with probability `level`, for Student's t with `degrees` of freedom.

    By bisection of the distribution's finite series (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| < t) for Student's t."""
    angle = math.atan(t / math.sqrt(degrees))
    odd, term, total = degrees % 2, 1.0, 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
    return math.sin(angle) * total


@lru_cache(maxsize=4096)
def chance_range(people: int, choices: int, level: float = 0.95) -> tuple[int, int]:
    """How many of `people` name the one right answer of `choices` when all guess: the central range that holds `level`
    of the binomial distribution with p = 1/choices at least, so that at most half of the rest lies on either side.

    Exact, in whole numbers: of the choices**people ways to answer, C(people, k) (choices - 1)**(people - k) have k
    right ones.
    """
    outside = (1 - Fraction(str(level))) / 2 * choices**people  # as many ways may lie on a side
    inside, low, ways = choices**people - outside, None, 0
    for right in range(people + 1):
        ways += math.comb(people, right) * (choices - 1) ** (people - right)
        if low is None and ways > outside:
            low = right
        if ways >= inside:
            return low, right
    raise AssertionError("all ways together are more than those inside")
