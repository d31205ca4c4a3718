"""What every experiment shares: engines of edited models, a text to score them on, a prompt to let them continue.

An experiment is a generator. It yields events and `Working` while it prepares and computes, and an `Outcome` whenever a
row is measured; the last one is whole, unless it says `stopped`. Perplexity is of windows of 512 tokens of the
reference text, each one call, the first token of each not scored, as in the quality figures.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING

from llmq.bench.quality import WINDOW, reference_text
from llmq.contestants import Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.interface import Engine, Interrupted
from llmq.engine.residents import Key, Residents
from llmq.engine.sampling import SamplingSettings
from llmq.engine.text import encode_prompt
from llmq.environment import describe
from llmq.errors import BadChoice, OutOfMemory
from llmq.events import Event
from llmq.models.edits import Edit
from llmq.models.loading import ids_within, load_config, load_tokenizer, resolve
from llmq.preparation import Working, await_turn, make_ready
from llmq.scores import perplexity, score_text

if TYPE_CHECKING:
    import torch

MAX_WINDOWS = 16
WRITTEN_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all of them have. `windows`: of the text, 512 tokens each; `prompt`: what the models continue, '' for none.

    A subclass names its `kind` and yields its rows from `measure`.
    """

    kind = ""
    model: str = "demo"
    device: str = "cpu"
    windows: int = 1
    prompt: str = ""

    def __post_init__(self):
        if isinstance(self.windows, bool) or not isinstance(self.windows, int) or not 1 <= self.windows <= MAX_WINDOWS:
            raise BadChoice(f"windows is {self.windows!r}; choose a whole number from 1 to {MAX_WINDOWS}")

    def conditions(self) -> dict:
        """What of the settings belongs beside the figures."""
        return {}

    def measure(self, lab: Lab) -> Iterator[Event | Working | dict]:
        """Yields progress and a finished row at a time."""
        raise NotImplementedError


@dataclass(frozen=True)
class Outcome:
    """The rows so far in the stable shape of a result: `kind`, `model`, `device`, `conditions`, `results`."""

    result: dict
    done: bool


def run_experiment(
    experiment: Experiment,
    residents: Residents,
    *,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event | Working | Outcome]:
    """Run it; stopped early, what was measured stays and the result says so."""
    stop = stop or threading.Event()
    with residents.turnstile.turn() as turn:
        if (yield from await_turn(turn, stop, clock)):
            yield from residents.thread.run(_run(experiment, residents, stop))


def _run(experiment: Experiment, residents: Residents, stop: threading.Event) -> Iterator[Event | Working | Outcome]:
    import torch

    source = resolve(experiment.model)
    if not (yield from make_ready(source, stop)):
        return
    lab = Lab(experiment, residents, stop)
    rows: list[dict] = []
    stopped = False
    try:
        for item in experiment.measure(lab):
            if isinstance(item, dict):
                rows.append(item)
                yield Outcome(_result(experiment, lab, rows, stopped=True), done=False)
            else:
                yield item
    except Interrupted:
        stopped = True
    except (torch.OutOfMemoryError, MemoryError) as error:
        error.__traceback__ = None
        raise OutOfMemory(f"out of memory after {len(rows)} measurements; choose a smaller model") from None
    yield Outcome(_result(experiment, lab, rows, stopped=stopped), done=True)


def _result(experiment: Experiment, lab: Lab, rows: list[dict], *, stopped: bool) -> dict:
    windows = {"window": len(lab.texts[0]), "windows": len(lab.texts)}
    return {
        "kind": experiment.kind,
        "model": experiment.model,
        "device": experiment.device,
        "text": "CPython pydoc_data.topics",
        "tokens": sum(len(ids) - 1 for ids in lab.texts),
        "stopped": stopped,
        "conditions": windows | experiment.conditions() | lab.environment,
        "results": list(rows),
    }


@dataclass
class Lab:
    """The model, the text and the engines of one experiment."""

    experiment: Experiment
    residents: Residents
    stop: threading.Event
    texts: list[list[int]] = field(init=False)

    def __post_init__(self):
        experiment = self.experiment
        self.source = resolve(experiment.model)
        self.config, self.tokenizer = load_config(self.source), load_tokenizer(self.source)
        wanted = WINDOW * experiment.windows
        text = reference_text()[: 20 * wanted]
        ids = ids_within(self.config, self.tokenizer(text, add_special_tokens=False)["input_ids"])
        window = min(WINDOW, int(getattr(self.config, "max_position_embeddings", WINDOW)))
        self.texts = [ids[i : i + window] for i in range(0, window * experiment.windows, window)]
        self.environment = describe(experiment.device, self.source)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return int(self.config.hidden_size)

    def progress(self, message: str, fraction: float | None = None) -> Working:
        """To be yielded before every measurement: raises Interrupted when stopped."""
        if self.stop.is_set():
            raise Interrupted
        return Working(message, fraction)

    @contextmanager
    def engine(self, contestant: Contestant, edit: Edit | None = None, loop: str = "") -> Iterator[Engine]:
        """The engine of `contestant` in the best loop it has, or in `loop`. An edited one is dropped afterwards, and
        what is given of it keeps nothing alive: a caller's variable would, until the next edited one was there too."""
        loop = loop or choose_engines("auto", [contestant.method], self.config.to_dict(), self.experiment.device)[0]
        source = replace(self.source, edit=edit)
        key = Key(source, contestant.label, contestant.method, self.experiment.device, loop)
        engine, _ = self.residents.get(key)
        if contestant.threshold is not None:
            engine.set_threshold(contestant.threshold)
        try:
            yield weakref.proxy(engine) if edit is not None else engine
        finally:
            if edit is not None:
                del engine
                self.residents.drop(key)

    def read(self, engine: Engine) -> list[torch.Tensor]:
        """For each window (tokens, vocabulary) float32 next-token logits, on the host."""
        return [engine.logits(ids, self.stop.is_set).float().cpu() for ids in self.texts]

    def score(self, own: list[torch.Tensor], baseline: list[torch.Tensor]) -> dict:
        """Score the logits `own` of every window against `baseline`; means over all tokens. Where an edited model's
        output is not a number, its perplexity and KL are infinite and it agrees with nothing."""
        scores = [
            score_text(*logits, ids, allow_overflow=True)
            for *logits, ids in zip(own, baseline, self.texts, strict=True)
        ]
        loss, kl, _, top1 = (sum(column) / len(scores) for column in zip(*map(astuple, scores), strict=True))
        return {"perplexity": perplexity(loss), "kl_to_fp16": kl, "top1_agreement": top1}

    def write(self, engine: Engine) -> str:
        """What `engine` writes greedily after the prompt; '' where there is no prompt."""
        if not self.experiment.prompt.strip():
            return ""
        ids = ids_within(self.config, encode_prompt(self.tokenizer, self.experiment.prompt, context=engine.context))
        generation = engine.start(ids, SamplingSettings(max_new_tokens=WRITTEN_TOKENS))
        written: list[int] = []
        try:
            while len(written) < WRITTEN_TOKENS and len(ids) + len(written) < engine.context:
                token = generation.step() if written else generation.prefill(self.stop.is_set)
                if token.token_id in engine.eos_ids:
                    break
                written.append(token.token_id)
        finally:
            generation.close()
        return self.tokenizer.decode(written, skip_special_tokens=True)


Rows = Generator[Event | Working | dict, None, None]
