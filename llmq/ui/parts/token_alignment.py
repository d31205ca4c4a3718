"""Where two texts part, token by token, and what still agrees after that. Plain Python on token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from llmq.scores import first_divergence

WORDS = re.compile(r"\s*\S+|\s+")
ALIGN_AT_MOST = 2048  # tokens; repetitive texts of this length take 0.6 s to align, of 4096 tokens 4 s
PREFIX, SAME, DIFFERENT = "prefix", "same", "diff"
Token = tuple[int | str | None, str]


def diff_tokens(tokens_a: Sequence[Token], tokens_b: Sequence[Token]) -> dict:
    """Compare two lists of (token id, text) by token id.

    Returns `first` (index from 0 of the first position where they differ, None when they are equal), `aligned` (False
    when a list was too long to align what follows that position) and `pieces`: for each text a list of [text, kind]
    with kind 'prefix' (equal up to the first difference), 'same' (equal again later) or 'diff'.
    """
    ids_a, ids_b = [token[0] for token in tokens_a], [token[0] for token in tokens_b]
    parted = first_divergence(ids_a, ids_b)
    start = min(len(ids_a), len(ids_b)) if parted is None else parted
    aligned = max(len(ids_a), len(ids_b)) <= ALIGN_AT_MOST
    kinds_a = [PREFIX] * start + [DIFFERENT] * (len(ids_a) - start)
    kinds_b = [PREFIX] * start + [DIFFERENT] * (len(ids_b) - start)
    if aligned:
        matcher = SequenceMatcher(None, ids_a[start:], ids_b[start:], autojunk=False)
        for at_a, at_b, size in matcher.get_matching_blocks():
            kinds_a[start + at_a : start + at_a + size] = [SAME] * size
            kinds_b[start + at_b : start + at_b + size] = [SAME] * size
    return {
        "first": None if start == len(ids_a) == len(ids_b) else start,
        "aligned": aligned,
        "pieces": [_pieces(tokens_a, kinds_a), _pieces(tokens_b, kinds_b)],
    }


def words_of(tokens: Sequence[Token]) -> list[Token]:
    """The text of `tokens` cut at its words: so two texts are held against each other that were cut in different
    ways."""
    return [(word, word) for word in WORDS.findall("".join(text for _, text in tokens))]


def _pieces(tokens: Sequence[Token], kinds: Sequence[str]) -> list[list[str]]:
    """[text, kind] of each run of tokens of one kind. A token that ends inside a character has no text of its own: what
    becomes printable stands at the last of them, and differs where any of them does."""
    found: list[list[str]] = []
    differs = False
    for (_, text), kind in zip(tokens, kinds, strict=True):
        differs = differs or kind == DIFFERENT
        if not text:
            continue
        kind, differs = DIFFERENT if differs else kind, False
        if found and found[-1][1] == kind:
            found[-1][0] += text
        else:
            found.append([text, kind])
    return found
