"""What the Compare form holds, as a Comparison: whatever a browser or a script sends is checked here. No gradio."""

from __future__ import annotations

from collections.abc import Mapping

from llmq.contestant import entrant
from llmq.engine.sampling import MAX_NEW_TOKENS, SamplingSettings
from llmq.errors import BadChoice
from llmq.labs.compare import Comparison

LONGEST_ANSWER = 1024  # tokens that the page offers
NONE = "none"  # in a method field: no contestant


def comparison_of(
    device: str, prompt, model, left, right, third, threshold, max_new_tokens, schedule, temperature, top_k, top_p,
    seed, keys: Mapping[str, str] | None = None,
) -> Comparison:  # fmt: skip
    """The form's values, in the order of the tab's inputs; `keys` of servers, by host. Raises UserError naming the
    value that is wrong."""
    methods = [str(name) for name in (left, right, third) if name and name != NONE]
    return Comparison(
        prompt=prompt,
        model=model,
        contestants=tuple(entrant(name, threshold) for name in methods),
        sampling=SamplingSettings(
            max_new_tokens=_whole("max_new_tokens", max_new_tokens),
            temperature=temperature,
            top_k=_whole("top_k", top_k),
            top_p=top_p,
            seed=_whole("seed", seed),
        ),
        schedule=schedule,
        device=device,
        keys=keys or {},
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
