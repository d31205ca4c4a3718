"""The formats of quantized checkpoints: GPTQ's, compressed-tensors', bitsandbytes'. A new one is a class in `FORMATS`.

bitsandbytes' int8 is in `int8_checkpoint`: three methods start from its codes, and a model is written without loading
it.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmq.errors import BadChoice, unknown
from llmq.methods import Method
from llmq.models.formats.base import Format
from llmq.models.formats.bitsandbytes4 import Bitsandbytes4
from llmq.models.formats.compressed import FloatQuantized, IntQuantized, PackQuantized
from llmq.models.formats.gptq import GptqFormat

FORMATS = (PackQuantized(), IntQuantized(), FloatQuantized(), GptqFormat(), Bitsandbytes4())
NAMES = tuple(dict.fromkeys(found.name for found in FORMATS))


def format_of(settings: Mapping) -> Format | None:
    """The format that `quantization_config` in a config.json describes; None for one that nothing here knows."""
    return next((found for found in FORMATS if found.describes(settings)), None)


def format_for(method: Method, name: str = "") -> Format:
    """The format to write `method` in: the one called `name`, else the one called as the method is, else the first that
    holds it. Raises BadChoice where there is none."""
    if name and name not in NAMES:
        raise unknown("format", name, NAMES)
    if not getattr(method, "folded", True):
        raise BadChoice(
            f"{method.spelled} divides the input of each layer by factors of its own, and no format has a place for "
            "them: choose it with folded=on"
        )
    possible = [found for found in FORMATS if found.holds(method)]
    if not possible:
        raise BadChoice(f"no checkpoint format holds {method.spelled}: choose another method")
    named = [found for found in possible if found.name == (name or method.name)]
    if name and not named:
        raise BadChoice(f"{name} does not hold {method.spelled}; choose from {', '.join(f.name for f in possible)}")
    return (named or possible)[0]
