"""The labs: one question each, found by looking into this folder. A new one touches nothing else."""

from __future__ import annotations

import json
import pkgutil
from functools import cache
from importlib import import_module
from pathlib import Path

from llmq.errors import UserError, unknown
from llmq.files import parse_json, read_text, write_text
from llmq.formatting import plain_json
from llmq.labs.base import Answer, Lab

__all__ = ["Answer", "Lab", "lab_classes", "load_answer", "save_answer"]


@cache
def lab_classes() -> dict[str, type[Lab]]:
    """Every lab by its kind, in the order of files."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    found, ahead = {}, [Lab]
    while ahead:
        cls = ahead.pop(0)
        ahead += cls.__subclasses__()
        if cls.kind:
            found[cls.kind] = cls
    return dict(sorted(found.items(), key=lambda entry: entry[1].__module__))


def save_answer(answer: Answer, path: Path) -> None:
    """Write an answer so that it can be loaded again. Raises UserError where it cannot be written."""
    stored = plain_json({"kind": answer.kind, **answer.stored()})
    write_text(path, json.dumps(stored, indent=1, allow_nan=False) + "\n")


def load_answer(path: Path) -> Answer:
    """The answer in a file. Raises UserError naming the file where it holds none."""
    from llmq.labs.advice import Advice

    kinds = lab_classes() | {Advice.kind: Advice}
    try:
        stored = parse_json(read_text(path))
        kind = stored.get("kind") if isinstance(stored, dict) else None
    except ValueError as error:
        raise UserError(f"{path} is not a saved answer: not JSON ({error})") from error
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{path} is not a saved answer: {unknown('kind', kind, kinds)}")
    try:
        answer = kinds[kind].restore(stored)
        list(answer.blocks())  # what cannot be shown is no answer
        return answer
    except UserError:
        raise
    except Exception as error:  # the boundary: the file may come from anybody
        raise UserError(f"{path} is no whole answer of the kind {kind!r}: {error!r:.120}") from error
