"""Settings of a run as a link says them. No gradio; the page writes its links itself (`link.js`).

Whatever comes in a link is a wish: an unknown name or an impossible number is left out, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from llmq.cards import CARDS, HERE, device_bytes
from llmq.contestant import Contestant, entrant
from llmq.engine.sampling import SamplingSettings
from llmq.errors import UserError
from llmq.labs.compare import SCHEDULES
from llmq.labs.outliers import LOWEST_THRESHOLD
from llmq.methods import DEFAULT_THRESHOLD, Method, parse_method
from llmq.methods.base import THRESHOLD
from llmq.servers.served import Served

NUMBERS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int}


def query_of(settings: Mapping) -> dict[str, str]:
    """What a link to the settings of a run says."""
    named = {"prompt": settings.get("prompt", ""), "model": settings.get("model", "")}
    named |= {"methods": ",".join(settings["contestants"]), "schedule": settings.get("schedule", "")}
    sampling = settings.get("sampling") or {}
    return {name: str(value) for name, value in {**named, **sampling}.items()}


def wishes_of(query: Mapping[str, str]) -> dict:
    """What a link asks for, as far as it is possible: prompt, model, methods (list of labels), threshold, schedule,
    numbers. A threshold that all methods with one share is the form's."""
    wishes: dict = {name: query[name] for name in ("prompt", "model") if query.get(name)}
    if query.get("schedule") in SCHEDULES:
        wishes["schedule"] = query["schedule"]
    if methods := query.get("methods"):
        wishes |= _methods(methods.split(",")[:3], own="threshold" in query)
    with suppress(KeyError, UserError):
        wishes["threshold"] = THRESHOLD.parse("threshold", query["threshold"])
    for name, kind in NUMBERS.items():
        try:
            wishes[name] = getattr(SamplingSettings(**{name: kind(query[name])}), name)
        except (KeyError, ValueError, OverflowError, UserError):
            continue
    return wishes


def fit_wishes_of(query: Mapping[str, str]) -> dict:
    """What a link asks of 'Does it fit?': model, card ('other' with memory, where it is an amount), context, batch."""
    if query.get("view") != "fit":
        return {}
    wishes: dict = {"model": query["model"]} if query.get("model") else {}
    card = query.get("card", "").strip()
    with suppress(UserError):
        wishes |= {"card": card.lower()} if card.lower() in (*CARDS, HERE) else _amount(card)
    for name in ("context", "batch"):
        with suppress(KeyError, ValueError):
            if 1 <= (number := int(query[name])) <= 10**9:
                wishes[name] = number
    return wishes


def _amount(text: str) -> dict:
    device_bytes(text)
    return {"card": "other", "memory": text}


def outlier_wishes(query: Mapping[str, str]) -> dict:
    """What a link asks of the Outliers tab, as far as it is possible: method, threshold."""
    wishes: dict = {}
    method = _method(query.get("method", ""))
    if method:
        wishes["method"] = method.spelled
    with suppress(KeyError, UserError):
        threshold = THRESHOLD.parse("threshold", query["threshold"])
        if LOWEST_THRESHOLD <= threshold <= 20:
            wishes["threshold"] = threshold
    return wishes


def _methods(names: list[str], *, own: bool) -> dict:
    """The labels of methods and servers; with the threshold that they share, unless each has its `own`."""
    found = [one for one in map(_entrant, names) if one]
    shared = {one.threshold for one in found} - {None}
    if own or len(shared) != 1:
        return {"methods": list(dict.fromkeys(one.label for one in found))}
    usual = [one if one.threshold is None else one.at(DEFAULT_THRESHOLD) for one in found]
    return {"methods": list(dict.fromkeys(one.label for one in usual)), "threshold": shared.pop()}


def _entrant(name: str) -> Contestant | Served | None:
    with suppress(UserError):
        return entrant(name)
    return None


def _method(text: str) -> Method | None:
    try:
        return parse_method(text)
    except UserError:
        return None
