"""Tasks with right answers, asked by EleutherAI's lm-eval (`pip install '.[tasks]'`) of our own engines.

lm-eval brings the tasks, their prompts and their metrics; `Answering` is the model it asks. Every method answers the
same items, so the differences from FP16 are paired by item, with 95 % t-intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from llmq.contestant import Contestant
from llmq.engine.base import Engine, generate
from llmq.engine.choice import choose_engines
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.environment import describe
from llmq.errors import BadChoice, UserError
from llmq.events import Event, Progress
from llmq.face import answer_to, device_for
from llmq.machine.door import Lease
from llmq.models.opening import Model
from llmq.scores import log_probabilities, mean_interval

BASELINE = Contestant.parse("fp16")
WRITTEN_TOKENS = 256  # where a task does not say, as in lm-eval
COLUMNS = ("method", "task", "metric", "value", "items", "difference")


class Answering:
    """One engine behind the questions that lm-eval asks of a model: beside `lm_eval.api.model.TemplateLM` as a base,
    which cuts texts into tokens with `tok_encode` and asks for `_loglikelihood_tokens`."""

    def __init__(self, engine: Engine, model: Model, stopped: Callable[[], bool] | None = None):
        super().__init__()
        self.engine, self.model, self.stopped = engine, model, stopped

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        begin = self.model.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.model.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.model.tokenize(string)

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_) -> list[tuple[float, bool]]:
        return [self.scored(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, each token once, with as much before it as the model reads."""
        return [self._whole(self.tok_encode(request.args[0])) for request in requests]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        return [self.written(*request.args) for request in requests]

    def scored(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The natural log-probability of `continuation` after `context`, and whether greedy decoding writes it. What
        the model cannot read at once is cut off at the left."""
        import torch

        continuation = continuation[-self.engine.context :]
        if not continuation:
            return 0.0, True
        ids = (context + continuation)[-self.engine.context - 1 :]
        rows = log_probabilities(self.engine.logits(ids[:-1], self.stopped)[-len(continuation) :].float())
        targets = torch.tensor(continuation, device=rows.device)
        greedy = bool((rows.argmax(-1) == targets).all())
        return rows.gather(1, targets[:, None]).sum().item(), greedy

    def _whole(self, ids: list[int]) -> float:
        """The first tokens after the prefix; then, a context full at a time, what has not been scored yet."""
        room, total = self.engine.context, 0.0
        ids = [self.prefix_token_id, *ids]
        for start in range(1, len(ids), room):
            stop = min(start + room, len(ids))
            total += self.scored(ids[max(0, stop - room - 1) : start], ids[start:stop])[0]
        return total

    def written(self, context: str, asked: dict[str, Any]) -> str:
        """What the engine writes greedily after `context` until one of the texts `until`, which is left out."""
        until = asked.get("until") or []
        until = [until] if isinstance(until, str) else until
        if asked.get("do_sample"):
            raise BadChoice("a task that samples its answers is not asked here; choose one that is greedy")
        most = min(int(asked.get("max_gen_toks", WRITTEN_TOKENS)), self.engine.context - 1)
        ids = (self.tok_encode(context) or [self.prefix_token_id])[most - self.engine.context :]
        ids_written, text = [], ""
        with closing(generate(self.engine, ids, SamplingSettings(max_new_tokens=most), self.stopped)) as tokens:
            for token in tokens:
                if token.end == "eos":
                    break
                ids_written.append(token.token_id)
                text = self.model.tokenizer.decode(ids_written, skip_special_tokens=True)
                if ends := [text.find(stop) for stop in until if stop and stop in text]:
                    return text[: min(ends)]
        return text


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The question: `tasks` of lm-eval, or of the YAML files in the folder `include`, by name; `limit`: items of each;
    `shots`: solved examples in front of each."""

    tasks: tuple[str, ...]
    contestants: tuple[Contestant, ...]
    model: str = "demo"
    device: str = "cpu"
    include: str | None = None
    limit: int | None = None
    shots: int | None = None
    patient = True

    def run(self, lease: Lease) -> Iterator[Event | Progress | dict]:
        """Let FP16 and every method answer; last comes the result with the stable keys of `tasks --json`."""
        manager = _manager(self.include)
        _require_tasks(self.tasks, manager)
        model = yield from lease.open(self.model)
        samples: dict[Contestant, dict[str, list[dict]]] = {}
        for contestant in dict.fromkeys((BASELINE, *self.contestants)):
            loop = choose_engines("auto", [contestant.method], model.config.to_dict(), self.device)[0]
            engine = yield from lease.load(Key.of(model, contestant.method, self.device, loop), contestant)
            yield lease.progress(f"{contestant.label} answers {', '.join(self.tasks)}")
            samples[contestant] = self._answers(manager, Answering(engine, model, lease.stop.is_set))
        yield {
            "kind": "tasks",
            "model": self.model,
            "device": self.device,
            "conditions": {"limit": self.limit, "shots": self.shots, **describe(self.device, model.source)},
            "results": [row for c in self.contestants for row in _rows(c.label, samples[c], samples[BASELINE])],
        }

    def _answers(self, manager, answering: Answering) -> dict[str, list[dict]]:
        """The items of every task with their metrics."""
        from lm_eval.api.model import TemplateLM
        from lm_eval.evaluator import simple_evaluate

        bound = type("EngineModel", (Answering, TemplateLM), {})
        asked = bound(answering.engine, answering.model, answering.stopped)
        settings = {"limit": self.limit, "num_fewshot": self.shots, "bootstrap_iters": 0, "log_samples": True}
        return simple_evaluate(asked, tasks=list(self.tasks), task_manager=manager, **settings)["samples"]


def evaluate(
    tasks: Sequence[str], methods: Sequence[str] = ("fp16", "llm-int8"), *, model: str = "demo",
    device: str | None = None, include: str | None = None, limit: int | None = None, shots: int | None = None,
) -> dict:  # fmt: skip
    """Ask tasks of lm-eval of each method: the mean of each metric, and its paired difference from FP16.

        evaluate(["arc_easy"], ["llm-int8", "int8-weight-only"], limit=200)

    Raises UserError where lm-eval is not installed, BadChoice for a task it does not know.
    """
    contestants = Contestant.parse_all(",".join(methods))
    asked = {"model": model, "device": device_for(device), "include": include, "limit": limit, "shots": shots}
    return answer_to(Tasks(tasks=tuple(tasks), contestants=contestants, **asked))


def _manager(include: str | None):
    """lm-eval's register of tasks. Raises UserError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("tasks are asked by lm-eval, which is not installed; run: pip install '.[tasks]'")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _require_tasks(names: Sequence[str], manager) -> None:
    for name in names:
        if name not in manager.all_tasks:
            raise BadChoice(f"task is {name!r:.80}; choose one that `lm-eval ls tasks` lists, or give --include FOLDER")


def _rows(label: str, samples: dict[str, list[dict]], baseline: dict[str, list[dict]]) -> Iterator[dict]:
    """A row for every task and metric that is a number of an item: the mean over items, and the paired difference from
    the baseline's."""
    for task, items in samples.items():
        for metric in items[0]["metrics"]:
            if not isinstance(items[0][metric], int | float):
                continue
            own, base = ([float(item[metric]) for item in found] for found in (items, baseline[task]))
            differences = [a - b for a, b in zip(own, base, strict=True)]
            interval = list(mean_interval(differences)) if len(differences) > 1 else None
            yield {
                "method": label,
                "task": task,
                "metric": metric,
                "value": math.fsum(own) / len(own),
                "items": len(own),
                "difference": math.fsum(differences) / len(differences),
                "difference_interval": interval,
            }
