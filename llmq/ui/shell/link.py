"""Settings of a run as a query string and back, so that a link carries them. No gradio.

Whatever comes in a link is a wish: an unknown name or an impossible number is left out, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

from llmq.contestant import Contestant
from llmq.engine.sampling import SamplingSettings
from llmq.errors import UserError
from llmq.labs.compare import SCHEDULES

LONGEST_PROMPT = 4000  # characters of a prompt a link can carry; some servers cut longer ones
NUMBERS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int}


def query_of(settings: Mapping) -> str:
    """The query string of `Comparison.settings()`; a prompt too long for a link is left out."""
    query = {"model": settings["model"], "methods": ",".join(settings["contestants"]), "schedule": settings["schedule"]}
    if len(settings["prompt"]) <= LONGEST_PROMPT:
        query["prompt"] = settings["prompt"]
    return urlencode(query | {name: settings["sampling"][name] for name in NUMBERS})


def wishes_of(query: Mapping[str, str]) -> dict:
    """What a link asks for, as far as it is possible: prompt, model, methods (list of labels), schedule, numbers."""
    wishes = {name: query[name] for name in ("prompt", "model") if query.get(name)}
    if query.get("schedule") in SCHEDULES:
        wishes["schedule"] = query["schedule"]
    if methods := query.get("methods"):
        wishes["methods"] = list(dict.fromkeys(label for label in map(_label, methods.split(",")[:3]) if label))
    for name, kind in NUMBERS.items():
        try:
            wishes[name] = getattr(SamplingSettings(**{name: kind(query[name])}), name)
        except (KeyError, ValueError, OverflowError, UserError):
            continue
    return wishes


def _label(text: str) -> str | None:
    try:
        return Contestant.parse(text).label
    except UserError:
        return None
