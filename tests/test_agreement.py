"""Agreement of two methods on one text, against the textbook formulas computed number by number in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmq.errors import BadChoice, UserError
from llmq.inspect.agreement import LIKELIEST, Agreement, compare_logits, margins_at
from llmq.scores import ROWS, first_divergence


def log_probabilities(row) -> list[float]:
    """ln softmax of one row, one number at a time."""
    peak = max(row)
    total = math.log(math.fsum(math.exp(x - peak) for x in row))
    return [float(x - peak - total) for x in row]


def divergence(p: list[float], q: list[float]) -> float:
    """KL(p || q) of two lists of log-probabilities."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -math.inf)


def order(row: list[float]) -> list[int]:
    """Likeliest first; of equally likely ones the lower id."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


def drawn(rows: int, vocabulary: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    one, other = torch.randn(rows, vocabulary) * 3, torch.randn(rows, vocabulary) * 3
    other = one + 0.4 * other
    if kind == "ties":  # small whole numbers: many tokens share the first place
        return one.div(2).round(), other.div(2).round()
    if kind == "excluded":  # what the baseline excludes, and nothing else, the other excludes too or not
        out = torch.rand(rows, vocabulary) < 0.3
        out.scatter_(1, one.argmax(-1, keepdim=True), False)
        return one.masked_fill(out, -math.inf), other.masked_fill(out & (torch.rand(rows, vocabulary) < 0.5), -math.inf)
    return one.to(getattr(torch, kind)), other.to(getattr(torch, kind))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "ties", "excluded"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(2, 1), (2, 3), (9, 5), (ROWS + 1, 7), (ROWS + 2, 40), (130, 23)])
def test_every_figure_is_the_formula(rows, vocabulary, kind):
    baseline, other = drawn(rows, vocabulary, kind)
    ids = torch.randint(vocabulary, (rows,)).tolist()
    found = Agreement(tuple(ids), tuple(compare_logits(baseline, other, ids)))
    assert [(token.position, token.token_id) for token in found.tokens] == list(enumerate(ids))[1:]
    sides = [[log_probabilities(row) for row in table.double().tolist()] for table in (baseline, other)]
    for token, p, q in zip(found.tokens, sides[0], sides[1], strict=False):
        likeliest = order(p)[0]
        assert token.kl == pytest.approx(divergence(p, q), rel=1e-9, abs=1e-12) and token.kl >= 0
        assert token.rank == order(q).index(likeliest) + 1
        assert token.agrees == (order(q)[0] == likeliest)
        assert token.logprobs == pytest.approx((p[token.token_id], q[token.token_id]), rel=1e-12)
        for guesses, row in ((token.baseline, p), (token.other, q)):
            chances = [math.exp(x) for x in row]
            assert [g.probability for g in guesses] == pytest.approx(sorted(chances, reverse=True)[:LIKELIEST])
            assert len({g.token_id for g in guesses}) == min(LIKELIEST, vocabulary)
            assert all(g.probability == pytest.approx(chances[g.token_id]) for g in guesses)
    expected = [divergence(p, q) for p, q in zip(sides[0][:-1], sides[1][:-1], strict=True)]
    assert found.mean_kl == pytest.approx(np.mean(expected), rel=1e-9, abs=1e-12)
    same = [order(p)[0] == order(q)[0] for p, q in zip(sides[0][:-1], sides[1][:-1], strict=True)]
    assert found.top1_agreement == pytest.approx(np.mean(same))
    for perplexity, side in zip(found.perplexities, sides, strict=True):
        mean = np.mean([row[token] for row, token in zip(side[:-1], ids[1:], strict=True)])
        assert perplexity == pytest.approx(np.exp(-mean) if mean > -700 else math.inf, rel=1e-9)


def test_a_text_compared_with_itself_agrees_everywhere():
    logits = drawn(ROWS + 5, 11, "ties")[0]
    ids = [0] * (ROWS + 5)
    found = Agreement(tuple(ids), tuple(compare_logits(logits, logits.clone(), ids)))
    assert (found.mean_kl, found.top1_agreement, found.diverging) == (0.0, 1.0, [])
    assert all(token.baseline == token.other for token in found.tokens)


def test_the_first_of_a_list_is_what_greedy_decoding_writes():
    """Also where 16-bit logits tie, which they do: there `argmax` takes the lower id."""
    baseline, other = drawn(200, 30, "ties")
    for token, a, b in zip(compare_logits(baseline, other, [0] * 200), baseline, other, strict=False):
        ties = [int((row == row.max()).sum()) for row in (a, b)]
        if max(ties) <= LIKELIEST:
            assert (token.baseline[0].token_id, token.other[0].token_id) == (int(a.argmax()), int(b.argmax()))
        assert token.agrees == (int(a.argmax()) == int(b.argmax()))
    assert sum(int((row == row.max()).sum()) > 1 for row in other) > 20, "too few ties to prove anything"


@pytest.mark.parametrize("first", [1, 2, ROWS, ROWS + 1, 99])
def test_a_later_beginning_gives_the_same_entries(first):
    baseline, other = drawn(100, 9, "float32")
    ids = torch.randint(9, (100,)).tolist()
    assert compare_logits(baseline, other, ids, first) == compare_logits(baseline, other, ids)[first - 1 :]


def test_what_the_other_excludes_costs_infinitely_much():
    baseline, other = torch.zeros(3, 4), torch.zeros(3, 4)
    other[0, 2] = -math.inf
    found = Agreement((0, 2, 1), tuple(compare_logits(baseline, other, [0, 2, 1])))
    assert [token.kl for token in found.tokens] == [math.inf, 0.0]
    assert found.perplexities == (pytest.approx(4.0), math.inf)


def test_a_very_unlikely_text_has_no_number_for_its_perplexity():
    logits = torch.tensor([[0.0, -900.0], [0.0, 0.0]])
    assert Agreement((0, 1), tuple(compare_logits(logits, logits, [0, 1]))).perplexities == (math.inf, math.inf)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_output_that_is_not_a_number_agrees_with_nothing(side, value):
    tables = drawn(4, 6, "float32")
    tables[side][1, 3] = value
    with pytest.raises(UserError, match="not a number"):
        compare_logits(*tables, [0, 1, 2, 3])


@pytest.mark.parametrize("ids", [[], [5]])
def test_a_text_that_predicts_nothing_is_refused(ids):
    with pytest.raises(BadChoice, match=f"{len(ids)} token"):
        compare_logits(torch.zeros(len(ids), 9), torch.zeros(len(ids), 9), ids)


def test_a_token_is_asked_for_by_its_position():
    found = Agreement((4, 5, 6), tuple(compare_logits(*drawn(3, 9, "float32"), [4, 5, 6])))
    assert [found.at(position).token_id for position in (1, 2)] == [5, 6]
    for wrong in (0, 3, -1, True, "1", None):
        with pytest.raises(BadChoice, match="from 1 to 2"):
            found.at(wrong)


def test_diverging_tokens_come_with_the_largest_divergence_first():
    baseline, other = drawn(150, 12, "float32")
    found = Agreement((0,) * 150, tuple(compare_logits(baseline, other, [0] * 150)))
    expected = {t.position for t in found.tokens if t.baseline[0].token_id != t.other[0].token_id}
    assert {token.position for token in found.diverging} == expected and len(expected) > 5
    assert [t.kl for t in found.diverging] == sorted((t.kl for t in found.diverging), reverse=True)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([], [], None),
        ([1], [], None),
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 2, 3], None),
        ([1, 2], [1, 3], 1),
        ([1], [2], 0),
    ],
)
def test_texts_part_where_they_first_differ(one, other, expected):
    assert first_divergence(one, other) == first_divergence(other, one) == expected


def test_margins_are_each_sides_own():
    one, other = torch.tensor([3.0, 1.0, 0.5]), torch.tensor([2.0, 2.25, -1.0])
    assert margins_at(one, other, (0, 1)) == (2.0, 0.25)
    assert margins_at(other, one, (1, 0)) == (0.25, 2.0)
