"""How torch takes memory of a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older, which torch 2.11 reads, too
GROWING = "expandable_segments:True"


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Ask torch for segments that grow and shrink, unless the environment says something of its allocator.

    A model that is quantized while it is loaded leaves holes in segments of a fixed size: with bitsandbytes up to a
    fifth of what the process held was in them. Read by torch when the first tensor comes to a GPU; other systems than
    Linux have no such segments.
    """
    if sys.platform == "linux" and not any(name in environment for name in NAMES):
        environment[NAMES[1]] = GROWING
