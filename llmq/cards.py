"""Graphics cards by name with the memory their drivers report, and amounts of memory as people write them.

A card sold with 16 GB has 16 GiB on its board, 17.2e9 bytes; some of it the driver keeps, or ECC takes (a sixteenth on
cards without memory of its own for it). `mebibytes` is what `nvidia-smi` gives as the total.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llmq.errors import BadChoice

UNITS = {"": 10**9, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Card:
    """`name`: what people type, `model`: what they read, `gigabytes`: what it is sold with."""

    name: str
    model: str
    gigabytes: int
    mebibytes: int

    @property
    def title(self) -> str:
        return f"{self.model} ({self.gigabytes} GB)"

    @property
    def bytes(self) -> int:
        return self.mebibytes * 2**20


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("rtx-3060", "RTX 3060", 12, 12288),
        Card("rtx-4070", "RTX 4070", 12, 12282),
        Card("t4", "T4", 16, 15360),
        Card("rtx-4080", "RTX 4080", 16, 16376),
        Card("rtx-5080", "RTX 5080", 16, 16303),
        Card("rtx-3090", "RTX 3090", 24, 24576),
        Card("rtx-4090", "RTX 4090", 24, 24564),
        Card("l4", "L4", 24, 23034),
        Card("a10g", "A10G", 24, 23028),
        Card("rtx-5090", "RTX 5090", 32, 32607),
        Card("a100-40gb", "A100", 40, 40960),
        Card("l40s", "L40S", 48, 46068),
        Card("a100-80gb", "A100", 80, 81920),
        Card("h100", "H100", 80, 81559),
        Card("h200", "H200", 141, 143771),
    )
}
AMOUNT = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*([a-z]*)", re.IGNORECASE)


HERE = "here"  # for the memory that is free on this machine


def place_named(text: str) -> str:
    """'an RTX 4080 (16 GB)' for a card, '16GiB of memory' for an amount."""
    said = text.strip()
    if card := CARDS.get(said.lower()):
        return f"{'an' if card.model[0] in 'AHLR' else 'a'} {card.title}"  # as the letters are said
    return f"{said}{'' if said[-1:].isalpha() else ' GB'} of memory"


def device_bytes(text: str, named: str = "device memory") -> float:
    """Return the bytes of a card ('rtx-4080'), of an amount with its unit ('16GiB', '16 GB'), or of a plain number,
    which counts GB of 1e9. Raises BadChoice, which calls it `named`."""
    said = text.strip()
    if card := CARDS.get(said.lower()):
        return float(card.bytes)
    found = AMOUNT.fullmatch(said)
    size = float(found[1]) * UNITS.get(found[2].upper(), math.nan) if found else math.nan
    if not 0 < size <= 1e18:
        raise BadChoice(
            f"{named} is {text!r:.80}; choose a number over 0 in GB (1e9), an amount with its unit such as "
            "16GiB, or a card such as rtx-4080"
        )
    return size
