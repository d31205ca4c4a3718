"""The texts that every install has: what models read where nobody gives them a text, and what methods calibrate on.

They lie in llmq/texts, whose README names source, licence and SHA-256 of each. Calibration has a text of its own, so
nothing is measured on what a method was fitted to.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

WINDOW = 512  # tokens that a model reads in one call
TEXTS = {  # by name: what it is, for people
    "english": "English prose (Austen's Persuasion)",
    "french": "French prose (Le cahier de l'administrateur Debian)",
    "code": "Python code (CPython's standard library)",
}
CALIBRATION = "calibration"  # not to be measured on
FOLDER = Path(__file__).parents[1] / "texts"


@cache
def reference_text(name: str = "english") -> str:
    """The whole text of a name: one of TEXTS, or CALIBRATION."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def fingerprint(name: str) -> str:
    """A name for exactly these bytes."""
    return hashlib.sha256(reference_text(name).encode()).hexdigest()[:8]


def windows(model, count: int, name: str = "english") -> list[list[int]]:
    """Return the first `count` windows of the text as ids of `model`, each WINDOW tokens or the whole context."""
    length = min(WINDOW, model.context)
    ids = model.tokenize(reference_text(name)[: 20 * WINDOW * count])
    return [ids[i : i + length] for i in range(0, length * count, length)]
