"""Scores against plain float64 loops over every token and every word of the vocabulary."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from llmq.errors import UserError
from llmq.scores import ROWS, kl_divergence, log_probabilities, mean_interval, perplexity, score_text, t_quantile

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
