"""A text that a server wrote or read, token by token, and how a method here holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.formatting import quoted
from llmq.models.opening import Model
from llmq.models.text import one_token
from llmq.scores import lumped_divergence
from llmq.servers.protocol import Told

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Held:
    """What the methods are held against: `ids` after `prompt_ids`, what the server `told` of each, which may be fewer,
    the `text` of both, and the tokens that it would have chosen, as far as these are known, where that is not what it
    wrote."""

    prompt_ids: list[int]
    ids: list[int]
    told: tuple[Told, ...]
    text: str
    choices: list[int | None] | None = None


def require_same_pieces(told: Sequence[Told], ids: Sequence[int], model: Model) -> None:
    """Raises UserError where the server cuts a text into other tokens; one that is part of a character is not seen."""
    for token_id, place in zip(ids, told, strict=True):
        text, own = place.data.decode("utf-8", "replace"), model.tokenizer.decode([token_id])
        if own.strip() and text.strip() and "\ufffd" not in own + text and own.strip() != text.strip():
            raise UserError(
                f"the server cuts the text into other tokens than the model here ({quoted(text)} for {quoted(own)}); "
                "choose the model that it runs"
            )


def require_in_place(choices: Sequence[int | None], ids: Sequence[int]) -> None:
    """Raises UserError where the likeliest tokens are rather those of the next place."""
    own, late = (sum(a == b for a, b in zip(choices, tokens, strict=False)) for tokens in (ids, ids[1:]))
    if late > max(2, 2 * own):
        raise UserError(
            "the server tells the log-probabilities of a text one place late, as llama-cpp-python does; let it answer"
        )


def compared(logits: torch.Tensor, held: Held, model: Model) -> dict:
    """How one method holds the text: `logits` (tokens, vocabulary), row i of token i."""
    own, ids, told = logits.double().log_softmax(1), held.ids, held.told
    choices, theirs = own.argmax(1).tolist(), held.choices or ids
    known = [place for place, token in enumerate(theirs) if token is not None]
    differing = [place for place in known if choices[place] != theirs[place]]
    agreement = 1 - len(differing) / len(known) if known else None
    row = {"tokens": len(ids), "choices": len(known), "top1_agreement": agreement, "first_difference": None}
    row |= {"kl_lower_bound": None, "logprob_difference": None}
    if differing:
        place = differing[0]
        chosen = model.tokenizer.decode([choices[place]])
        row["first_difference"] = {"place": place, "server": model.tokenizer.decode([theirs[place]]), "method": chosen}
    if len(told) == len(ids):
        written = own[range(len(ids)), ids].tolist()
        row["logprob_difference"] = mean(abs(ours - one.logprob) for ours, one in zip(written, told, strict=True))
    if told and all(one.likeliest for one in told):
        row["kl_lower_bound"] = mean(lumped_divergence(own[at], _by_id(one, model)) for at, one in enumerate(told))
    return row


def _by_id(told: Told, model: Model) -> dict[int, float]:
    """The log-probabilities at a place by the tokens here; what is none here belongs to the rest."""
    found = {_token(named, model): value for named, value in told.likeliest}
    return {token: value for token, value in found.items() if token is not None}


def first_of(told: Told, model: Model) -> int | None:
    """The token here that the server finds likeliest at a place; None where one of those it names is none here: parts
    of characters, named by their text, look alike and hide each other."""
    found = _by_id(told, model)
    return max(found, key=found.get) if len(found) == len(told.likeliest) else None


def _token(named: bytes | int, model: Model) -> int | None:
    return named if isinstance(named, int) else one_token(model.tokenizer, named.decode("utf-8", "replace"))


def named_in(tokens: Sequence[Told]) -> int | None:
    """At how many tokens of a place the server told its log-probabilities."""
    return min((len(token.likeliest) for token in tokens), default=0) or None
