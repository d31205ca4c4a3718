"""What two methods make of the same text: next-token distributions token by token, and where their own texts part.

Under teacher forcing both read one text in one call, so a difference at one token is not carried into the next. In that
call LLM.int8() pools its outlier columns over the whole text, as it does for a prompt; while it writes, each token has
its own. KL is KL(baseline || other), in nats, as in the quality figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.errors import BadChoice
from llmq.scores import kl_divergence, pairs, perplexity

if TYPE_CHECKING:
    import torch

LIKELIEST = 5  # tokens of each list


@dataclass(frozen=True)
class Guess:
    """A token that a method holds possible, and its probability."""

    token_id: int
    probability: float


@dataclass(frozen=True)
class TokenAgreement:
    """Both methods' forecasts of the token at `position`, from everything before it.

    `kl` in nats, infinite where the other excludes what the baseline holds possible; `rank`: where the baseline's
    likeliest token stands under the other method (1 is first; of equally likely ones the lower id, as greedy decoding
    chooses); `logprobs`: of the text's own token under the baseline and the other; `baseline`, `other`: the likeliest
    five.
    """

    position: int
    token_id: int
    kl: float
    rank: int
    logprobs: tuple[float, float]
    baseline: tuple[Guess, ...]
    other: tuple[Guess, ...]

    @property
    def agrees(self) -> bool:
        """Whether both hold the same token likeliest."""
        return self.rank == 1


@dataclass(frozen=True)
class Drift:
    """Both methods writing freely, greedily. `position`: the first generated token in which the texts differ, None
    where one is the other's beginning or both are equal; `margins`: there, by how many nats each prefers its own token
    to the other's, both having read the same tokens."""

    baseline_ids: tuple[int, ...]
    other_ids: tuple[int, ...]
    position: int | None
    margins: tuple[float, float] | None


@dataclass(frozen=True)
class Agreement:
    """`token_ids`: the text that both read; `tokens`: one entry for each but the first. From `continuation` on the text
    is the baseline's own (None where it is not)."""

    token_ids: tuple[int, ...]
    tokens: tuple[TokenAgreement, ...]
    continuation: int | None = None
    drift: Drift | None = None

    @property
    def mean_kl(self) -> float:
        return sum(token.kl for token in self.tokens) / len(self.tokens)

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both hold the same token likeliest."""
        return sum(token.agrees for token in self.tokens) / len(self.tokens)

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of the text's tokens under the baseline and the other."""
        means = (sum(token.logprobs[side] for token in self.tokens) / len(self.tokens) for side in (0, 1))
        return tuple(perplexity(-mean) for mean in means)

    @property
    def diverging(self) -> list[TokenAgreement]:
        """The tokens whose likeliest candidate differs, largest KL first."""
        return sorted((token for token in self.tokens if not token.agrees), key=lambda token: -token.kl)

    def at(self, position: int) -> TokenAgreement:
        """Return the entry of one position. Raises BadChoice where there is none."""
        wanted = None if isinstance(position, bool) else position
        found = next((token for token in self.tokens if token.position == wanted), None)
        if found is None:
            choices = f"from {self.tokens[0].position} to {self.tokens[-1].position}"
            raise BadChoice(f"token is {position!r}; choose a position of the text {choices}")
        return found


def compare_logits(baseline: torch.Tensor, other: torch.Tensor, ids: list[int], first: int = 1) -> list[TokenAgreement]:
    """Compute the agreement on `ids` from position `first` on. `baseline`, `other`: (tokens, vocab_size) logits.

    Raises UserError where the logits are not numbers: nothing agrees with that.
    """
    if len(ids) < 2:
        raise BadChoice(f"the text has {len(ids)} token; at least 2 are needed, the first predicts the second")
    found = []
    for a, b, targets in pairs(baseline, other, ids, first=first):
        found += _rows(a, b, targets, first + len(found))
    return found


def _rows(a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor, first: int) -> list[TokenAgreement]:
    import torch

    best = a.argmax(-1, keepdim=True)
    own = b.gather(1, best)
    before = torch.arange(b.shape[1], device=b.device) < best
    rank = ((b > own) | ((b == own) & before)).sum(-1) + 1
    logprobs = torch.cat([side.gather(1, targets[:, None]) for side in (a, b)], 1).tolist()
    lists = [_guesses(side) for side in (a, b)]
    rows = zip(targets.tolist(), kl_divergence(a, b).tolist(), rank.tolist(), logprobs, *lists, strict=True)
    return [
        TokenAgreement(first + i, token, kl, rank, tuple(logs), mine, yours)
        for i, (token, kl, rank, logs, mine, yours) in enumerate(rows)
    ]


def _guesses(logprobs: torch.Tensor) -> list[tuple[Guess, ...]]:
    ids = logprobs.topk(min(LIKELIEST, logprobs.shape[1]), -1).indices.sort(-1).values
    values, order = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True)  # of equals the lower id first
    ids = ids.gather(1, order)
    return [
        tuple(Guess(token, probability) for token, probability in zip(row, chances, strict=True))
        for row, chances in zip(ids.tolist(), values.exp().tolist(), strict=True)
    ]


def margins_at(baseline: torch.Tensor, other: torch.Tensor, tokens: tuple[int, int]) -> tuple[float, float]:
    """Tell by how many nats each side prefers its own of `tokens` (baseline's, other's), from (vocab_size,) logits."""
    mine, yours = tokens
    return float(baseline[mine] - baseline[yours]), float(other[yours] - other[mine])
