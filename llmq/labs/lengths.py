"""The lengths of text that the labs of attention and of the KV cache go through: each half of the next."""

from __future__ import annotations

from llmq.fields import Number

LENGTHS = 6


def longest_text(shown: int) -> Number:
    """The field for the longest of them, in tokens; a page's control ends at `shown`."""
    told = "tokens of the longest of six lengths, each half of the next"
    return Number(64, 65536, whole=True, help=told, label="Longest text (tokens)", shown=shown, step=64)


def lengths_up_to(longest: int) -> list[int]:
    """All of them, shortest first."""
    return [longest >> halved for halved in reversed(range(LENGTHS))]
