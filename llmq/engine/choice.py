"""The loop that a contestant runs through: the lean one where it can and where that is fair, else transformers.

Speeds compare within one loop. So in a comparison of two where one can only run through transformers (bitsandbytes),
the other runs there too; with three, each takes the best loop it has, and a ratio between them is marked as crossing
loops.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from llmq.devices import are_several
from llmq.errors import BadChoice, unknown
from llmq.methods import Method
from llmq.models.architecture import Unsupported, architecture_of, matrices

ENGINES = ("auto", "hf", "lean")
log = logging.getLogger(__name__)


def choose_engines(wanted: str, methods: Sequence[Method], config: Mapping, device: str) -> list[str]:
    """Return 'hf' or 'lean' for each of `methods`. `config` is the model's configuration as a mapping.

    Raises BadChoice for an unknown engine, and for 'lean' where it cannot run one of the methods or the model.
    """
    if wanted not in ENGINES:
        raise unknown("engine", wanted, ENGINES)
    reasons = [why_not_lean(method, config, device) for method in methods]
    if wanted == "lean" and any(reasons):
        raise BadChoice(f"engine 'lean': {next(filter(None, reasons))}; choose auto or hf")
    possible = [not reason and wanted != "hf" for reason in reasons]
    if any(possible) and device == "cpu":
        from llmq.kernels.cpu.build import why_not_native

        if missing := why_not_native():
            if wanted == "lean":
                raise BadChoice(f"engine 'lean': {missing}; choose auto or hf")
            log.warning("%s, so the CPU runs through transformers, which is several times slower", missing)
            possible = [False] * len(methods)
    fair = all(possible) or len(methods) != 2
    return ["lean" if fair and lean else "hf" for lean in possible]


def why_not_lean(method: Method, config: Mapping, device: str = "cpu") -> str:
    """Tell why the lean loop of `device` cannot run `method` on this model; '' where it can."""
    if method.packed is None:
        return f"{method.spelled} runs through transformers only"
    if are_several(device):
        return "a model over several GPUs runs through transformers"
    if method.by_row and device != "cpu":
        return f"{method.spelled} runs through transformers on a GPU, where the lean loop pools the rows of a call"
    try:
        layers = architecture_of(config).layers
    except Unsupported as reason:
        return f"the lean loop does not compute {reason}"
    parts = [names for i in range(layers) for names in matrices(f"model.layers.{i}.")]
    kept = method.kept(name for names in parts for name in names)
    if any(kept.intersection(names) not in (set(), set(names)) for names in parts):
        return f"{method.spelled} keeps a part of q, k and v or of gate and up, which the lean loop multiplies as one"
    return ""
