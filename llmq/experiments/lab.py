"""What every experiment shares: engines of edited models, a text to score them on, a prompt to let them continue.

An experiment yields events and `Progress` while it prepares and computes, and an `Outcome` whenever a row is measured;
the last one is whole, unless it says `stopped`. Perplexity is of windows of 512 tokens of the reference text, each one
call, the first token of each not scored, as in the quality figures.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING

from llmq.contestant import Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.interface import Engine, Interrupted
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.machine.door import Lease
from llmq.models.edits import Edit
from llmq.models.opening import Model
from llmq.models.reference_text import windows
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

    def measure(self, lab: Lab) -> Iterator[Event | Progress | dict]:
        """Yields progress and a finished row at a time."""
        raise NotImplementedError

    def run(self, lease: Lease) -> Iterator[Event | Progress | Outcome]:
        """Yield events, progress, and an Outcome after every row; stopped early, what was measured stays."""
        model = yield from lease.open(self.model)
        lab, rows, stopped = Lab(self, model, lease), [], False
        try:
            for item in self.measure(lab):
                if isinstance(item, dict):
                    rows.append(item)
                    yield Outcome(_result(self, lab, rows, stopped=True), done=False)
                else:
                    yield item
        except Interrupted:
            stopped = True
        yield Outcome(_result(self, lab, rows, stopped=stopped), done=True)


@dataclass(frozen=True)
class Outcome:
    """The rows so far in the stable shape of a result: `kind`, `model`, `device`, `conditions`, `results`."""

    result: dict
    done: bool


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
    model: Model
    lease: Lease
    texts: list[list[int]] = field(init=False)

    def __post_init__(self):
        self.texts = windows(self.model, self.experiment.windows)
        self.environment = describe(self.experiment.device, self.model.source)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return int(self.model.config.hidden_size)

    def progress(self, message: str, fraction: float | None = None) -> Progress:
        """To be yielded before every measurement: raises Interrupted when stopped."""
        return self.lease.progress(message, fraction)

    @contextmanager
    def engine(self, contestant: Contestant, edit: Edit | None = None, loop: str = "") -> Iterator[Engine]:
        """The engine of `contestant` in the best loop it has, or in `loop`. An edited one is dropped afterwards, and
        what is given of it keeps nothing alive: a caller's variable would, until the next edited one was there too."""
        device, pool = self.experiment.device, self.lease.pool
        loop = loop or choose_engines("auto", [contestant.method], self.model.config.to_dict(), device)[0]
        key = Key.of(self.model.edited(edit) if edit else self.model, contestant.method, device, loop)
        engine = self.lease.get(key, contestant.method)
        try:
            yield weakref.proxy(engine) if edit is not None else engine
        finally:
            if edit is not None:
                del engine
                pool.drop(key)

    def read(self, engine: Engine) -> list[torch.Tensor]:
        """For each window (tokens, vocabulary) float32 next-token logits, on the host."""
        return [engine.logits(ids, self.lease.stop.is_set).float().cpu() for ids in self.texts]

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
        ids = self.model.encode(self.experiment.prompt)
        generation = engine.start(ids, SamplingSettings(max_new_tokens=WRITTEN_TOKENS))
        written: list[int] = []
        try:
            while len(written) < WRITTEN_TOKENS and len(ids) + len(written) < engine.context:
                token = generation.step() if written else generation.prefill(self.lease.stop.is_set)
                if token.token_id in engine.eos_ids:
                    break
                written.append(token.token_id)
        finally:
            generation.close()
        return self.model.tokenizer.decode(written, skip_special_tokens=True)


Rows = Generator[Event | Progress | dict, None, None]
