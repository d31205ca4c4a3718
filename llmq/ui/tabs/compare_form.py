"""What the Compare form holds, as a Comparison and as a link. No gradio.

Whatever a browser or a script sends is checked here; whatever comes in a link is a wish: an unknown name or an
impossible number is left out, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

from llmq.contestant import Contestant
from llmq.engine.sampling import MAX_NEW_TOKENS, SamplingSettings
from llmq.errors import BadChoice, UserError
from llmq.labs.compare import SCHEDULES, Comparison

NONE = "none"  # in a method field: no contestant
MAX_SECONDS = 900.0  # one visitor's run may hold the device this long
LONGEST_PROMPT = 4000  # characters of a prompt a link can carry; some servers cut longer ones
NUMBERS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int}


def comparison_of(
    device: str, prompt, model, left, right, third, threshold, max_new_tokens, schedule, temperature, top_k, top_p, seed
) -> Comparison:
    """The form's values, in the order of the tab's inputs. Raises UserError naming the value that is wrong."""
    methods = [str(name) for name in (left, right, third) if name and name != NONE]
    return Comparison(
        prompt=prompt,
        model=model,
        contestants=tuple(Contestant.parse(name, threshold) for name in methods),
        sampling=SamplingSettings(
            max_seconds=MAX_SECONDS,
            max_new_tokens=_whole("max_new_tokens", max_new_tokens),
            temperature=temperature,
            top_k=_whole("top_k", top_k),
            top_p=top_p,
            seed=_whole("seed", seed),
        ),
        schedule=schedule,
        device=device,
    )


def labels_in(comparison: Comparison) -> list[str]:
    return [contestant.label for contestant in comparison.contestants]


def _whole(name: str, value) -> int:
    """Gradio's sliders send 64.0 for 64; anything else that is not whole is refused by name."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise BadChoice(f"{name} is {value!r}; choose a whole number up to {MAX_NEW_TOKENS}") from None
    if number != value:
        raise BadChoice(f"{name} is {value!r}; choose a whole number")
    return number


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
