"""A reading as the page's component and a file show it. No gradio."""

from __future__ import annotations

import math

from llmq.inspect.agreement import Guess, TokenAgreement
from llmq.inspect.reading import Read
from llmq.inspect.wording import summary_of


def reading_value(read: Read) -> dict:
    """The value of `reading_view`: labels, one row a token, and a summary. A KL that is infinite is None."""
    agreement = read.agreement
    return {
        "labels": [read.reading.baseline.label, read.reading.contestant.label],
        "first": agreement.tokens[0].position,
        "opening": read.texts[0],
        "continuation": agreement.continuation,
        "tokens": [_row(read, token) for token in agreement.tokens],
        "summary": summary_of(read),
    }


def _row(read: Read, token: TokenAgreement) -> list:
    lists = ([_guess(read, guess) for guess in side] for side in (token.baseline, token.other))
    kl = float(f"{token.kl:.4g}") if math.isfinite(token.kl) else None  # a browser's JSON has no infinity
    return [read.texts[token.position], kl, token.rank, *lists]


def _guess(read: Read, guess: Guess) -> list:
    return [read.text_of(guess.token_id), float(f"{guess.probability:.3g}")]
