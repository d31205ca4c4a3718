"""The server for programs: a named, typed endpoint for each question, with the answer of the command line's `--json`.

Every question goes through the page's own door, so line, limits and stop are one for browsers and programs. A question
to the machine streams: small objects with a `status` a few times a second, then the answer; closing the stream ends it.
A lab with a command has its endpoint by having one. What cannot be done is an error of one line.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import closing, contextmanager
from typing import Any, Literal

import gradio as gr

from llmq import face
from llmq.cards import device_bytes
from llmq.contestant import Contestant, entrants
from llmq.engine.sampling import SamplingSettings
from llmq.environment import device_named
from llmq.errors import BadChoice, Ended, UserError
from llmq.events import Event, Progress, Run
from llmq.fields import Choice, Field, Number, Switch, Text
from llmq.labs import Answer, Lab, lab_classes
from llmq.labs.advice import METHODS, Place, advise, stored_results
from llmq.labs.compare import Comparison
from llmq.machine.door import Question
from llmq.memory import forecast
from llmq.methods.base import THRESHOLD
from llmq.summary import RunAnswer, Summary
from llmq.ui.parts.progress import event_line
from llmq.ui.shell.endpoints import add_endpoint, name_wrong_values
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import RUNS

UPDATE_SECONDS = 0.3  # between two messages of progress
TOLD = {  # of parameters that many endpoints have
    "model": "a preset, a hub id, or a folder on the server",
    "device": "the server's, which is what null means",
    "threshold": "outlier threshold of a method whose name says none; 0 is off",
    "methods": "with commas between them; bnb-int8@0 sets a threshold",
}


class Api:
    """The endpoints over the state that all visitors share; `build` adds them to an open page."""

    def __init__(self, state: AppState):
        self.state = state

    def build(self, page: gr.Blocks) -> None:
        add_endpoint(page, self.compare, TOLD, **RUNS)
        for lab in lab_classes().values():
            if lab.command:
                add_endpoint(page, self.lab(lab), TOLD, **RUNS)
        for function in (self.memory, self.advise, self.models, self.methods):
            add_endpoint(page, function, TOLD)
        name_wrong_values(page)

    def compare(
        self, owner: str, prompt: str, model: str = "demo", device: str | None = None, threshold: float = 6.0,
        methods: str = "fp16,bnb-int8", max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0,
        top_p: float = 1.0, seed: int = 0, schedule: str = "interleave", engine: str = "auto",
        random_weights: bool = False, sent: str = "messages",
    ) -> Iterator[dict]:  # fmt: skip
        """Run one prompt through one to three methods: texts, speeds, bytes, and where the first two texts part.

        Args:
            prompt: what the models answer
            max_new_tokens: of each answer, from 1 to 4096
            temperature: 0 is greedy; 2 at most
            top_k: 0 is off
            top_p: 1 is off
            seed: all methods draw with the same noise
            schedule: interleave (their steps in turn), in-turn (one method after the other) or parallel (servers
                meanwhile; of several GPUs each method has its own)
            engine: auto, hf (transformers) or lean (our own loop)
            random_weights: a preset's shape with random weights
            sent: to servers among the methods, the prompt as messages or as the text that the model here would read
        """
        tokens = self.state.access.check_tokens(max_new_tokens)
        comparison = Comparison(
            prompt=prompt, model=model, contestants=entrants(methods, THRESHOLD.check("threshold", threshold)),
            device=self._device(device, self.state.devices),
            sampling=SamplingSettings(max_new_tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                                      seed=seed),
            schedule=schedule, engine=engine, random_weights=random_weights, sent=sent,
        )  # fmt: skip
        answer = RunAnswer(Run(comparison.settings(), {}), Summary())
        events = face.followed(comparison, self.state.run(comparison, owner), answer)
        with _unless_found(answer.summary.outcomes):
            for status in _statuses(events):
                texts = {label: outcome.text for label, outcome in answer.summary.outcomes.items()}
                yield {"status": status, "texts": texts}
        yield _whole(answer)

    def lab(self, lab: type[Lab]) -> Callable[..., Iterator[dict]]:
        """The endpoint of a lab: its parameters are its annotated fields, named as its options are."""
        options = face.options_of(lab)

        def ask(owner: str, model: str, device: str | None, threshold: float, **settings) -> Iterator[dict]:
            question = face.question(lab, settings, model=model, device=self._device(device), threshold=threshold)
            yield from self._answer(question, owner)

        def parameter(name: str, default: Any, hint: Any) -> inspect.Parameter:
            return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)

        own = [parameter(name, _default(field), _hint(field)) for name, field in options.items()]
        own += [
            parameter(*one) for one in (("model", "demo", str), ("device", None, str | None), ("threshold", 6.0, float))
        ]
        lines = "".join(f"    {name}: {field.kind.help or field.named}\n" for name, field in options.items())
        ask.__name__ = lab.command[-1].replace("-", "_")
        ask.__doc__ = f"{(lab.about or lab.title).replace('**', '')}\n\nArgs:\n{lines}"
        ask.__signature__ = inspect.Signature([parameter("owner", inspect.Parameter.empty, str), *own])
        return ask

    def memory(
        self, owner: str, model: str = "demo", methods: str = "fp16,bnb-int8", threshold: float = 6.0,
        context: int = 2048, new_tokens: int = 0, batch: int = 1, device_memory: str | float | None = None,
    ) -> dict:  # fmt: skip
        """Predict the bytes that each method needs, before anything is loaded, and whether they fit.

        Args:
            context: tokens, prompt and answer
            new_tokens: those of them that are written and not read in one call
            batch: how many prompts at once
            device_memory: what they are to fit into: GB (1e9 bytes), an amount such as 16GiB, a card such as rtx-4080
        """
        room = None if device_memory is None else device_bytes(str(device_memory))
        opened = self.state.access.describe_model(model)
        asked = {"tokens": context, "answer": new_tokens, "batch": batch, "device_bytes": room}
        return forecast(opened, _contestants(methods, threshold), **asked)

    def advise(
        self, owner: str, model: str = "demo", device: str | None = None, methods: str = METHODS,
        threshold: float = 6.0, context: int = 2048, batch: int = 1, device_memory: str | float | None = None,
    ) -> dict:  # fmt: skip
        """Say whether to quantize: what fits, how fast and how good each method was measured to be, and the reason.

        Args:
            context: tokens, prompt and answer
            batch: how many prompts at once
            device_memory: as for memory; null is what is free on the server's device
        """
        here = self._device(device)
        place = Place.here(here) if device_memory is None else Place.named(str(device_memory))
        asked = {"tokens": context, "batch": batch}
        opened = self.state.access.describe_model(model)
        return _whole(advise(opened, _contestants(methods, threshold), place, stored_results(), **asked))

    def models(self, owner: str) -> dict:
        """List the models that have names, and the methods."""
        return face.names()

    def methods(self, owner: str) -> dict:
        """List the methods: the name to give, a label, and what each does."""
        return {"methods": face.names()["methods"]}

    def _answer(self, question: Question, owner: str) -> Iterator[dict]:
        """The progress of a question, then what it comes to at last."""
        answers: list[Answer] = []

        def events() -> Iterator[Event | Progress]:
            with closing(self.state.run(question, owner)) as items:
                for item in items:
                    if isinstance(item, Event | Progress):
                        yield item
                    else:
                        answers[:] = [item]

        with _unless_found(answers):
            for status in _statuses(events()):
                yield {"status": status}
        if not answers:
            raise UserError("stopped before anything was found")
        yield _whole(*answers)

    def _device(self, name: str | None, own: str = "") -> str:
        """The server's, or all its `own`. Raises BadChoice where another one is asked for."""
        own = own or self.state.device
        if name is not None and device_named(name, several=True) != own:
            raise BadChoice(f"device is {name!r:.80}; this server computes on {own}")
        return own


def _contestants(methods: str, threshold: float) -> tuple[Contestant, ...]:
    return Contestant.parse_all(methods, THRESHOLD.check("threshold", threshold))


@contextmanager
def _unless_found(answers: Sized) -> Iterator[None]:
    """Let a question that was ended early answer with what it found; where that is nothing it says why."""
    try:
        yield
    except Ended:
        if not answers:
            raise


def _whole(answer: Answer) -> dict:
    return face.Finding(answer).to_json()


def _statuses(events: Iterator[Event | Progress]) -> Iterator[str]:
    """What is going on, whenever the last word is old enough; closing this closes `events`."""
    last, status = -math.inf, "Starting"
    with closing(events):
        for event in events:
            status = (event.message if isinstance(event, Progress) else event_line(event)) or status
            if (now := time.monotonic()) - last >= UPDATE_SECONDS:
                yield status
                last = now


def _hint(field: Field) -> Any:
    """The type of a parameter; methods and several numbers are text, as people type them."""
    match field.kind:
        case Number(whole=whole, optional=optional):
            number = int if whole else float
            return number | None if optional else number
        case Choice(choices=choices):
            return Literal[choices]
        case Switch():
            return bool
    return str


def _default(field: Field) -> Any:
    """What the parameter holds where nothing is given; a text that must be given has none."""
    kind = field.kind
    if isinstance(kind, Text) and kind.positional and not (kind.unless or kind.optional):
        return inspect.Parameter.empty
    return field.default if isinstance(kind, Number | Choice | Switch | Text) else kind.spell(field.default)
