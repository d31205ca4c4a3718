"""The steps of the lesson in their order: what each asks, and where the page shows the same thing live.

The words are in `words.json`, by the names that stand here; the drawings and the right answers come from `exhibits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

QUIZ = tuple(f"quiz-{number}" for number in range(1, 7))
RACERS = ("int8-weight-only", "llm-int8", "fp8")
RECORDED_PROMPT = "Plan a 3-day itinerary in Paris."


@dataclass(frozen=True, kw_only=True)
class Live:
    """The same thing on the page itself: what its address says (`query`), the parts of the form that this fills
    (`fills`, by selector), the button to press, and what to look at once the answer is there (`lit`). `later`: what a
    later step reveals, which stays away."""

    query: Mapping[str, str]
    fills: Mapping[str, str] = field(default_factory=dict)
    press: str = ""
    lit: str
    later: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """`questions`: each with its choices; the first is the one on the card. `lit`: the part of the exhibit that the
    answer is about."""

    name: str
    questions: Mapping[str, tuple[str, ...]]
    lit: str
    live: Live


def _step(name: str, choices: tuple[str, ...], lit: str, live: Live) -> Step:
    return Step(name=name, questions={name: choices}, lit=lit, live=live)


def _compared(prompt: str, methods: str, tokens: int, lit: str) -> Live:
    return Live(
        query={"prompt": prompt, "methods": methods, "max_new_tokens": str(tokens)},
        fills={"#prompt textarea": prompt},
        press="#generate", lit=lit,
    )  # fmt: skip


def _watched(part: str, press: str, lit: str, later: str = "", **more: str) -> Live:
    return Live(
        query={"view": "outliers", "part": part, "prompt": RECORDED_PROMPT, "method": "llm-int8", **more},
        fills={"#outlier-prompt textarea": RECORDED_PROMPT}, press=press, lit=lit, later=later,
    )  # fmt: skip


def _mapped(lit: str) -> Live:
    """The numbers that a layer reads behind a norm, as in the recording."""
    return _watched("activations", "#watch", lit, later="#silence-card", kind="q/k/v")


def _fitted(model: str, card: str, lit: str) -> Live:
    return Live(
        query={"view": "fit", "model": model, "card": card, "context": "8192"},
        fills={"#fit-context input": "8192"}, lit=lit,
    )  # fmt: skip


def _of_lab(part: str, lit: str, press: str = "", **asked: str) -> Live:
    return Live(query={"view": "lab", "part": part, **asked}, press=press, lit=lit)


STEPS: tuple[Step, ...] = (
    Step(
        name="quiz", questions={name: ("left", "right") for name in QUIZ}, lit="pair",
        live=_compared(RECORDED_PROMPT, "fp16,llm-int8", 40, "#result .llmq-panes"),
    ),
    _step(
        "transformer", ("before", "all", "last"), "mask",
        _watched("agreement", "#read", "#reading"),
    ),
    _step("fp16", ("7", "14", "28"), "bars", _fitted("llama-2-7b-chat", "t4", "#fit")),
    _step("round", ("25", "64", "127"), "codes", _of_lab("bits", "#bits")),
    _step("absmax", ("7", "4", "1"), "codes", _of_lab("rounding", "#rounding-outlier")),
    _step("vectorwise", ("all", "rows", "none"), "matrix", _of_lab("rounding", "#rounding-method")),
    _step("decomposition", ("1", "10", "50"), "matrix", _mapped("#outlier-status")),
    _step("outliers", ("many", "few"), "map", _mapped("#outlier-map")),
    _step("silence", ("same", "doubles", "thousands"), "texts", _watched("what-if", "#silencing-run", "#silencing")),
    _step(
        "parting", ("sure", "likely", "open"), "parted",
        _compared(RECORDED_PROMPT, "fp16,llm-int8", 96, "#result .llmq-verdict"),
    ),
    _step(
        "time", ("faster", "same", "slower"), "speeds",
        _compared(RECORDED_PROMPT, "fp16,bnb-int8,llm-int8", 16, "#result .llmq-strip"),
    ),
    _step(
        "race", RACERS, "bars",
        _of_lab("race", "#race-table", "#race-run", contestants=",".join(RACERS), tokens="1024"),
    ),
    _step("fit", ("both", "int8", "none"), "table", _fitted("llama-3.1-8b-instruct", "t4", "#fit")),
)  # fmt: skip


def questions() -> dict[str, tuple[str, ...]]:
    """The choices of every question of the lesson, by its name."""
    return {name: choices for step in STEPS for name, choices in step.questions.items()}
