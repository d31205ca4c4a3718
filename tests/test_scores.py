"""Scores against plain float64 loops over every token and every word of the vocabulary."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from itertools import product

import pytest
import torch

from llmq.errors import UserError
from llmq.scores import (
    ROWS,
    chance_range,
    equivalence_margin,
    kl_divergence,
    log_probabilities,
    mean_interval,
    perplexity,
    quantile,
    score_text,
    score_tokens,
    t_quantile,
)

TOKENS, VOCABULARY = ROWS + 9, 23  # more rows than are computed at a time


@pytest.fixture
def texts():
    own, baseline = (torch.randn(TOKENS, VOCABULARY) * 3 for _ in range(2))
    return own, baseline, torch.randint(VOCABULARY, (TOKENS,)).tolist()


def plain(row: list[float]) -> list[float]:
    """Probabilities of one row of logits."""
    powers = [math.exp(value) for value in row]
    return [power / math.fsum(powers) for power in powers]


def by_hand(own, baseline, ids) -> tuple[float, float, float, float]:
    found = []
    for i in range(len(ids) - 1):
        p, q = plain(baseline[i].tolist()), plain(own[i].tolist())
        forward = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        backward = math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        found.append((-math.log(q[ids[i + 1]]), forward, backward, float(p.index(max(p)) == q.index(max(q)))))
    return tuple(statistics.fmean(column) for column in zip(*found, strict=True))


def test_every_score_is_its_formula_and_both_directions_of_kl_differ(texts):
    own, baseline, ids = texts
    found = score_text(own, baseline, ids)
    assert (found.loss, found.kl, found.reverse_kl, found.top1) == pytest.approx(by_hand(own, baseline, ids), rel=1e-9)
    turned = score_text(baseline, own, ids)
    assert (turned.kl, turned.reverse_kl) == pytest.approx((found.reverse_kl, found.kl), rel=1e-12)
    assert abs(found.kl - found.reverse_kl) > 0.01 * found.kl
    same = score_text(own, own, ids)
    assert (same.kl, same.reverse_kl, same.top1) == (0, 0, 1)


def test_scores_of_tokens_are_the_texts_before_the_mean(texts):
    own, baseline, ids = texts
    tokens, whole = score_tokens(own, baseline, ids), score_text(own, baseline, ids)
    assert tokens.shape == (4, TOKENS - 1) and tokens.dtype == torch.float64
    assert tokens.mean(1).tolist() == [whole.loss, whole.kl, whole.reverse_kl, whole.top1]
    part = score_tokens(own[:3], baseline[:3], ids[:3])
    assert torch.equal(part, tokens[:, :2])


def test_the_last_row_predicts_nothing_that_is_scored(texts):
    own, baseline, ids = texts
    changed = own.clone()
    changed[-1] = 100.0
    assert score_text(changed, baseline, ids) == score_text(own, baseline, ids)


def test_kl_of_what_is_excluded():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(p, q).tolist() == [pytest.approx(expected), math.inf]
    tiny = torch.tensor([[0.0, -800.0]], dtype=torch.float64)  # exp underflows to 0, and the other excludes it
    assert kl_divergence(tiny, torch.tensor([[0.0, -math.inf]], dtype=torch.float64)).tolist() == [0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_an_error_on_either_side(texts, value):
    own, baseline, ids = texts
    bad = own.clone()
    bad[ROWS + 2, 5] = value
    for pair in ((bad, baseline), (baseline, bad), (bad, bad)):
        with pytest.raises(UserError, match="not a number") as caught:
            score_text(*pair, ids)
        assert len(str(caught.value).splitlines()) == 1


def test_an_overflow_that_is_allowed_predicts_nothing(texts):
    own, baseline, ids = texts
    bad = own.clone()
    bad[3, 5] = math.nan
    found, whole = score_text(bad, baseline, ids, allow_overflow=True), score_text(own, baseline, ids)
    assert (found.loss, found.kl) == (math.inf, math.inf)
    agreed = float(own[3].argmax() == baseline[3].argmax())
    assert found.top1 == pytest.approx(whole.top1 - agreed / (TOKENS - 1))
    with pytest.raises(UserError):
        score_text(own, bad, ids, allow_overflow=True)


def test_log_probabilities_are_computed_in_float64():
    found = log_probabilities(torch.tensor([[10.0, 10.0 + 2**-18]]))
    assert found.dtype == torch.float64
    assert (found[0, 1] - found[0, 0]).item() == pytest.approx(2**-18, rel=1e-9)


def test_perplexity_is_the_exponential_and_has_no_overflow():
    assert perplexity(math.log(17.5)) == pytest.approx(17.5) and perplexity(1e6) == perplexity(math.inf) == math.inf


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (15, 2.1314), (30, 2.0423)]
)
def test_quantiles_are_those_of_the_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-4)


def test_an_interval_is_the_mean_and_quantile_standard_errors_to_either_side():
    values = [1.0, 2.0, 4.0, 9.0]
    error = statistics.stdev(values) / 2
    assert mean_interval(values) == pytest.approx((4 - 3.18245 * error, 4 + 3.18245 * error), rel=1e-4)
    assert mean_interval([5.0, 5.0]) == (5, 5)


def beyond(t: float, degrees: int, steps: int = 200_000) -> float:
    """P(T > t) for Student's t: its density, summed over trapezia of the angle whose tangent is t/√degrees."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    start = math.atan(t / math.sqrt(degrees))
    width = (math.pi / 2 - start) / steps
    heights = [math.cos(start + i * width) ** (degrees - 1) for i in range(steps + 1)]
    return scale * width * (math.fsum(heights) - (heights[0] + heights[-1]) / 2)


@pytest.mark.parametrize("values", [[0.01, 0.03, 0.02, 0.05], [-0.3, 0.1, 0.05], [0.2] * 5 + [0.1] * 4])
def test_at_the_margin_the_weaker_of_two_one_sided_tests_is_at_five_per_cent(values):
    margin, degrees = equivalence_margin(values), len(values) - 1
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))

    def p(m: float) -> float:
        return max(beyond((m + mean) / error, degrees), beyond((m - mean) / error, degrees))

    assert p(margin) == pytest.approx(0.05, rel=1e-5)
    assert p(0.9 * margin) > 0.05 > p(1.1 * margin)
    assert abs(mean) < margin < max(map(abs, mean_interval(values))), "one-sided at 5 % is inside the 95 % interval"
    assert equivalence_margin([-value for value in values]) == pytest.approx(margin)


def test_what_does_not_differ_is_equal_within_nothing():
    assert equivalence_margin([0.0, 0.0, 0.0]) == 0 and mean_interval([0.0, 0.0]) == (0, 0)


def test_quantiles_lie_between_neighbours():
    values = [4.0, 1.0, 2.0, 8.0, 16.0]
    assert [quantile(values, share) for share in (0, 0.25, 0.5, 0.75, 1)] == [1, 2, 4, 8, 16]
    assert quantile(values, 0.9) == pytest.approx(8 + 0.6 * 8) and quantile([3.0], 0.99) == 3
    assert quantile([1.0, 2.0, math.inf], 0.5) == 2 and quantile([1.0, math.inf, math.inf], 0.99) == math.inf
    drawn = torch.randn(997, dtype=torch.float64)
    for share in (0.5, 0.9, 0.99):
        assert quantile(drawn.tolist(), share) == pytest.approx(torch.quantile(drawn, share).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("people", "choices", "expected"),
    [
        (0, 2, (0, 0)), (1, 2, (0, 1)), (1, 1, (1, 1)), (5, 2, (0, 5)),
        # of 2^6 = 64 ways, more than 1.6 on each side: 1 has none right
        (6, 2, (1, 5)),
        # of 2^8 = 256 ways, 6.4 a side: 1 has none right, 9 at most one
        (8, 2, (1, 7)),
    ],
)  # fmt: skip
def test_the_range_of_guessing_by_hand(people, choices, expected):
    assert chance_range(people, choices) == expected


@pytest.mark.parametrize(("people", "choices"), [(3, 3), (6, 2), (6, 3), (9, 2), (5, 4), (7, 3)])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_the_range_of_guessing_is_that_of_all_ways_to_guess(people, choices, level):
    ways = [answers.count(0) for answers in product(range(choices), repeat=people)]
    outside = (1 - Fraction(str(level))) / 2 * len(ways)
    low, high = chance_range(people, choices, level)
    assert sum(right < low for right in ways) <= outside < sum(right <= low for right in ways)
    assert sum(right > high for right in ways) <= outside < sum(right >= high for right in ways)


def test_the_range_of_guessing_holds_its_level_also_for_many():
    for people, choices in ((30, 2), (30, 3), (100, 4), (500, 2)):
        low, high = chance_range(people, choices)
        p = Fraction(1, choices)
        inside = sum(math.comb(people, k) * p**k * (1 - p) ** (people - k) for k in range(low, high + 1))
        assert Fraction("0.95") <= inside < Fraction("0.99")
    assert chance_range(30, 2) == (10, 20)
