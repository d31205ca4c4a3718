"""Group-wise int8: a scale for every few numbers of a row, so that an outlier spoils only its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llmq.methods.naive import Naive
from llmq.methods.rtn import GROUP


@dataclass(frozen=True)
class Groupwise(Naive):
    """W8A8 with a scale for every `group` inputs of a row of the weight and of the activations."""

    group: Annotated[int, GROUP] = 128
    name, label = "groupwise", "int8, a scale a group"
    about = (
        "Int8 weights and activations with a scale for every few numbers of a row: between a scale a row and one a "
        "number. Emulated."
    )
    source = "Yao et al. 2022, ZeroQuant, arXiv 2206.01861, section 4.1"
