"""From logits to a token: the filters against a brute-force definition, the draws against their probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from llmq.engine.base import token_of
from llmq.engine.sampling import MAX_NEW_TOKENS, Sampler, SamplingSettings, filtered_probabilities, likeliest
from llmq.errors import BadChoice

DRAWS = 4000
CHI_SQUARE_LIMIT = {2: 13.8, 4: 18.5}  # degrees of freedom -> passed by chance in 1 of 1000 seeds; this seed is fixed
OUT_OF_RANGE = {
    "max_new_tokens": [0, -1, MAX_NEW_TOKENS + 1, 1.5],
    "temperature": [-0.1, 2.1],
    "top_k": [-1, 1_000_001, 2.5],
    "top_p": [0, -0.1, 1.01],
    "seed": [-1, 2**63, 0.5],
    "max_seconds": [-1, 86_401],
}
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "5", None, [1], 10**400]


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, then the k likeliest, then the smallest set of the likeliest that reaches top_p; in doubles."""
    weights = [math.exp(x / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: -weights[i])
    ranked = ranked[: top_k or None]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p and top_p < 1:  # at 1 a sum that rounds to 1 too early must not end it
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("size", [1, 17, 100])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.95, 1.0])
def test_filters_equal_brute_force(size, temperature, top_k, top_p):
    logits = 3 * torch.randn(size)
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    found = filtered_probabilities(logits, settings)
    expected = torch.tensor(brute_force(logits.tolist(), temperature, top_k, top_p))
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


def test_top_p_acts_on_what_top_k_left():
    """0.4 of 0.4 + 0.3 is over a half already, so the second goes; before top-k, 0.4 would not have been enough."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    found = filtered_probabilities(logits, SamplingSettings(temperature=1.0, top_k=2, top_p=0.5))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0, 0.0]))


def draws(sampler: Sampler, logits: torch.Tensor, count: int) -> list[int]:
    return [int(sampler.choose(logits)[0]) for _ in range(count)]


@pytest.mark.parametrize(("changes", "freedom"), [({}, 4), ({"top_k": 3}, 2), ({"temperature": 0.7}, 4)])
def test_draws_follow_their_probabilities(changes, freedom):
    logits = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05]).log()
    settings = SamplingSettings(**({"temperature": 1.0, "seed": 5} | changes))
    expected = DRAWS * filtered_probabilities(logits, settings)
    found = torch.tensor(draws(Sampler(settings, "cpu"), logits, DRAWS)).bincount(minlength=5)
    assert not found[expected == 0].any()
    possible = expected > 0
    chi_square = ((found - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert possible.sum() - 1 == freedom
    assert chi_square < CHI_SQUARE_LIMIT[freedom]


def test_two_samplers_with_one_seed_draw_the_same():
    settings, rows = SamplingSettings(temperature=1.0, seed=3), torch.randn(50, 30)
    first, second = Sampler(settings, "cpu"), Sampler(settings, "cpu")
    assert [first.choose(row).tolist() for row in rows] == [second.choose(row).tolist() for row in rows]


def test_a_difference_in_text_comes_from_a_difference_in_logits():
    """One sampler sees the logits a hair off: it draws the same noise, so nearly every token is the same."""
    settings, rows = SamplingSettings(temperature=1.0, seed=3), torch.randn(200, 30)
    shaken = rows + 1e-4 * torch.randn(200, 30)
    first, second = Sampler(settings, "cpu"), Sampler(settings, "cpu")
    pairs = [(first.choose(a)[0].item(), second.choose(b)[0].item()) for a, b in zip(rows, shaken, strict=True)]
    assert sum(a == b for a, b in pairs) >= 198
    assert len({a for a, _ in pairs}) > 10


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-12, 1e-37, 1e-46])
def test_hardly_any_temperature_is_greedy_or_refused(temperature):
    """Logits divided by next to nothing must not overflow into an arbitrary token."""
    logits = torch.linspace(-5, 40, 50)
    try:
        settings = SamplingSettings(temperature=temperature)
    except BadChoice:
        return
    assert draws(Sampler(settings, "cpu"), logits, 5) == [49] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_choose_gives_the_token_and_its_log_probability(dtype):
    logits = torch.randn(40).to(dtype)
    found = Sampler(SamplingSettings(), "cpu").choose(logits)
    best = int(logits.argmax())
    expected = torch.tensor([best, logits.float().log_softmax(-1)[best].item()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [5, 99])
def test_the_likeliest_tokens_have_their_probabilities(dtype, count):
    logits = torch.randperm(40).to(dtype) / 4
    known = token_of(*Sampler(SamplingSettings(temperature=2.0), "cpu").choose(logits).tolist(), 0.0)
    expected = logits.float().softmax(-1).sort(descending=True)
    found = likeliest(logits, known, count)
    assert list(found) == expected.indices[:count].tolist()
    torch.testing.assert_close(torch.tensor(list(found.values())), expected.values[:count], atol=1e-6, rtol=1e-5)


def test_logits_that_are_not_numbers_have_no_log_probability():
    assert math.isnan(Sampler(SamplingSettings(), "cpu").choose(torch.tensor([0.0, math.nan]))[1])


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUT_OF_RANGE for value in OUT_OF_RANGE[name]])
def test_a_setting_out_of_range_names_itself_its_value_and_the_choices(name, value):
    choices = r"choose a (whole )?number (from \S+ to \S+|in \(0, 1])"
    with pytest.raises(BadChoice, match=f"^{name} is {value!r}; {choices}$"):
        SamplingSettings(**{name: value})


@pytest.mark.parametrize("name", OUT_OF_RANGE)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:10])
def test_what_is_no_usable_number_is_refused(name, value):
    with pytest.raises(BadChoice, match=f"^{name} is "):
        SamplingSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1),
        ("max_new_tokens", MAX_NEW_TOKENS),
        ("temperature", 0),
        ("temperature", 2),
        ("top_k", 0),
        ("top_k", 20.0),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("seed", 2**63 - 1),
        ("max_seconds", 0),
    ],
)
def test_the_edges_of_every_range_work(name, value):
    settings = SamplingSettings(**({"temperature": 1.0} | {name: value}))
    assert 0 <= draws(Sampler(settings, "cpu"), torch.randn(9), 1)[0] < 9
