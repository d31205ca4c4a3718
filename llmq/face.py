"""llmq from Python: the questions of the command line as functions, with answers that show themselves.

Models stay loaded between calls, one call computes at a time, and `free()` gives the memory back. `model`: a preset, a
hub id or a local folder; `device`: 'cpu', 'cuda', 'cuda:N', or None for a GPU where there is one. `verbose`: whether
progress is told on standard error; None (the default): where that is a terminal, so not in a notebook. What cannot be
done raises an exception of `llmq.errors`, one line for people: BadChoice (a ValueError), ModelUnavailable, OutOfMemory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from llmq.contestant import Contestant, entrants
from llmq.engine.sampling import SamplingSettings
from llmq.environment import describe, device_named
from llmq.errors import unknown
from llmq.events import FORMAT, Event, Run
from llmq.fields import Field, Switch, Text, fields_of
from llmq.figures.blocks import Block, Drawing, Table
from llmq.files import read_text, write_text
from llmq.formatting import plain_json
from llmq.labs import Answer, Lab, lab_classes, load_answer, save_answer
from llmq.labs.compare import Comparison
from llmq.machine.door import Machine, Question
from llmq.methods import DEFAULT_THRESHOLD, METHODS, Method
from llmq.methods.base import THRESHOLD
from llmq.models import opening
from llmq.models.loading import quiet_libraries
from llmq.models.presets import PRESETS
from llmq.quantizing import Quantization
from llmq.reporting import reported, shown_block
from llmq.servers.reach import Reach, keys_of_environment
from llmq.summary import RunAnswer, Summary
from llmq.terminal import show_progress

Methods = str | Sequence[str | Method]
ROWS, CHARACTERS = 12, 400  # of a table and of a text, where an answer shows itself as plain text


@dataclass(frozen=True, repr=False)
class Finding:
    """What a question found: a plain table where it is printed, HTML in a notebook. `answer` holds every detail."""

    answer: Answer

    def __repr__(self) -> str:
        return "\n".join(filter(None, (self.answer.title, *(shown_block(_cut(block)) for block in self._blocks()))))

    def _repr_html_(self) -> str:
        from llmq.figures.pages import cell

        return cell(self.answer.title, self._blocks())

    def _blocks(self) -> Iterator[Block]:
        yield from (blocks := list(self.answer.blocks()))
        drawings = sum(isinstance(block, Drawing) for block in blocks)
        yield f"{drawings} figures: figures() draws them, html(path) writes them." if drawings else ""

    def figures(self) -> list:
        """Draw every figure as plotly's, on white: a notebook shows one, and `.show()` does anywhere."""
        from llmq.figures.pages import painted

        return [painted(block.make()) for block in self.answer.blocks() if isinstance(block, Drawing)]

    def to_json(self) -> dict:
        """Return what `--json` prints: plain values under stable keys."""
        return plain_json(self.answer.to_json())

    def save(self, path: str | Path) -> None:
        """Write a file for `llmq.load` and `llmq replay`. Raises UserError where it cannot be written."""
        if isinstance(self.answer, RunAnswer):
            self.answer.run.save(path)
        else:
            save_answer(self.answer, Path(path))

    def html(self, path: str | Path) -> None:
        """Write a page of texts, tables and figures that needs nothing else. Raises UserError as `save` does."""
        from llmq.figures.pages import page

        write_text(Path(path), page(self.answer.title, self.answer.blocks()))


def compare(
    prompt: str, methods: Methods = ("fp16", "llm-int8"), *, model: str = "demo", device: str | None = None,
    max_new_tokens: int = 64, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
    schedule: str = "interleave", engine: str = "auto", random_weights: bool = False, sent: str = "messages",
    keys: Mapping[str, str] | None = None, verbose: bool | None = None,
) -> Finding:  # fmt: skip
    """Run one prompt through one to three methods: texts, speeds, bytes, and where the first two texts part.

    `methods`: as at the command line, such as 'llm-int8@4', or of `llmq.METHODS`. `temperature` 0 is greedy.
    `schedule`: 'interleave', 'in-turn' or 'parallel'; `engine`: 'auto', 'hf' or 'lean'. A method that fails says why in
    its `error` and the others go on. Among the methods may be servers of the OpenAI protocol, such as
    'vllm@http://localhost:8000/v1#model': `sent` to them is the prompt as 'messages' or as the 'text' that the model
    here would read, and `keys` (host:port -> key) adds to those of LLMQ_SERVER_KEYS. `device` may name several GPUs,
    'cuda:0,cuda:1': each model is spread over them, or with 'parallel' each method has one of its own. Raises
    BadChoice for a value that cannot be used, ModelUnavailable for a model.

        llmq.compare("Name three colours.", ["fp16", "llm-int8"], max_new_tokens=16)
    """
    comparison = Comparison(
        prompt=prompt, model=model, contestants=entrants(_typed(methods)), device=device_for(device, several=True),
        sampling=SamplingSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                                  seed=seed),
        schedule=schedule, engine=engine, random_weights=random_weights, sent=sent, keys=keys or {},
    )  # fmt: skip
    answer = RunAnswer(Run(comparison.settings(), {}), Summary())
    for _ in _telling(verbose)(followed(comparison, _with_keys().run(comparison), answer)):
        pass
    return Finding(answer)


def followed(comparison: Comparison, events: Iterable[Event], answer: RunAnswer) -> Iterator[Event]:
    """Pass the events of a comparison through while `answer` grows by each; it is whole when they have ended."""
    for event in answer.run.record(events, time.monotonic):
        answer.summary.add(event)
        yield event
    source = opening.open_model(comparison.model, random_weights=comparison.random_weights).source
    answer.run.environment = describe(comparison.device, source)


def outliers(prompt: str = "", **settings: Any) -> Finding:
    """Watch the input of every linear layer while `prompt` and a few more tokens run through one method.

    `method` ('bnb-int8'), `new_tokens` (8), `model`, `device`, `verbose`. `sweep`: names of models with commas between
    them, for the paper's figures of each instead.

        llmq.outliers("Name three colours.", method="llm-int8", new_tokens=4).figures()[0]
    """
    return ask("outliers", prompt=prompt, **settings)


def agreement(prompt: str, **settings: Any) -> Finding:
    """Let two methods read the same text: KL in nats, first choices, perplexity, and where their free texts part.

    `method` ('bnb-int8'), `baseline` ('fp16'), `model`, `device`, `verbose`. `read`: the baseline's 'continuation' of
    the prompt in `new_tokens` (32) tokens, the 'prompt' itself, or `prompt` without the chat template as a 'text'.

        llmq.agreement("Name three colours.", method="llm-int8", new_tokens=8)
    """
    return ask("agreement", prompt=prompt, **settings)


def quality(methods: Methods = ("fp16", "llm-int8"), **settings: Any) -> Finding:
    """Measure perplexity, KL to FP16 in nats and shared first choices, with 95 % intervals, on a text all methods read.

    `text`: 'english' (the default), 'french' or 'code', which ship with the package, or a text; `tokens` (4096; at
    least 1024): how much of it is read; `reading`: 'pooled' (a window in one call) or 'decode' (token by token);
    `floor` ('on'): FP16 with its sums in another order beside them; `engine` ('auto'), `model`, `device`, `verbose`.
    `checkpoint`, `other`: two checkpoints of one tokenizer, the second measured against the first.

        llmq.quality(["llm-int8", "int8-weight-only"], tokens=1024)
    """
    return ask("quality", methods=methods, **settings)


def ask(
    lab: str, *, model: str = "demo", device: str | None = None, verbose: bool | None = None, **settings
) -> Finding:
    """Ask any lab, by the last word of its command; `settings` are named and spelled as its options there.

    Raises BadChoice naming the choices for a lab or a setting that is none.

        llmq.ask("ablation", windows=1)
    """
    labs = {cls.command[-1]: cls for cls in lab_classes().values() if cls.command}
    if lab not in labs:
        raise unknown("lab", lab, labs)
    return Finding(answer_to(question(labs[lab], settings, model=model, device=device_for(device)), verbose))


def question(
    lab: type[Lab], settings: Mapping[str, Any], *, model: str, device: str, threshold: float = DEFAULT_THRESHOLD
) -> Lab:
    """The question of a lab, its `settings` named and spelled as its options at the command line. `threshold`: of a
    method whose name says none. Raises BadChoice for a setting that is none, or cannot be used."""
    options = options_of(lab)
    for name in settings.keys() - options.keys():
        raise unknown(f"setting of {lab.command[-1]}", name, options)
    defaults = {"threshold": THRESHOLD.check("threshold", threshold)}
    given = {field.name: _read(field, settings.get(name, MISSING), defaults) for name, field in options.items()}
    return lab(model=model, device=device, **given)


def options_of(lab: type[Lab]) -> dict[str, Field]:
    """The annotated fields of a lab by the names that their options have in Python."""
    return {field.flag.lstrip("-").replace("-", "_"): field for field in fields_of(lab)}


def names() -> dict:
    """The models that have names, and the methods: what `models --json` prints."""
    return {
        "models": [
            {"name": p.name, "hub_id": p.hub_id, "about": p.about, "licence": p.licence, "gated": p.gated}
            for p in PRESETS.values()
        ],
        "methods": [{"name": m.name, "label": m.label, "about": m.about} for m in METHODS.values()],
    }


def open_model(name: str = "demo", *, random_weights: bool = False, verbose: bool | None = None) -> opening.Model:
    """Open a model for its `.config`, `.tokenizer`, `.encode(prompt)` and `.tensors()`, fetching what is missing.

    `random_weights`: a preset's shape alone. Raises BadChoice for a name that means nothing, ModelUnavailable else.

        llmq.open_model("demo").encode("Name three colours.")
    """
    quiet_libraries()
    model = opening.open_model(name, random_weights=random_weights)
    _telling(verbose, show_progress)(model.prepare())
    return model


def save_quantized(
    model: str, method: str | Method, folder: str | Path, *, format: str = "", device: str | None = None,
    statistics: bool = True, verbose: bool | None = None,
) -> dict:  # fmt: skip
    """Quantize a model and write it as a checkpoint that transformers and llmq open; return what was written.

    `format`: 'gptq', 'compressed-tensors' or 'bitsandbytes', '' for the method's own. `statistics`: a calibration's go
    with it. Raises BadChoice for a folder that exists and for what no format holds.

        llmq.save_quantized("demo", "nf4", "demo-nf4")
    """
    wanted, where = Contestant.parse(_typed(method)).method, {"folder": Path(folder), "device": device_for(device)}
    return answer_to(Quantization(model=model, method=wanted, format=format, statistics=statistics, **where), verbose)


def load(path: str | Path) -> Finding:
    """Load what `save` or `--save` wrote, to be shown without a model. Raises UserError for a file that is neither."""
    if not _is_run(Path(path)):
        return Finding(load_answer(Path(path)))
    run = Run.load(path)
    return Finding(RunAnswer(run, Summary(run.replay())))


def free() -> None:
    """Drop every loaded model, once the calls before this one are answered."""
    with machine().queue.turn() as turn:
        while not turn.wait(1.0):
            pass
        machine().pool.drop_others(set())


@cache
def machine() -> Machine:
    """The machine of this process, made when it is first needed."""
    return Machine()


def _with_keys() -> Machine:
    """The machine, with the keys of servers that the environment has now."""
    found = machine()
    found.reach = Reach(keys=keys_of_environment())
    return found


def answer_to(question: Question, verbose: bool | None = None):
    """What a question comes to at last."""
    *_, last = _telling(verbose)(_with_keys().run(question))
    return last


def device_for(name: str | None, *, several: bool = False) -> str:
    """The device of that name (of `several`, where they can be used), with the libraries told to keep quiet before
    anything loads."""
    quiet_libraries()
    return device_named(name, several=several)


def _telling(verbose: bool | None, tell: Callable[[Iterable], Any] = reported) -> Callable[[Iterable], Any]:
    """What tells of every item where that is wanted, and takes them in silence elsewhere."""
    return tell if (sys.stderr.isatty() if verbose is None else verbose) else list


def _read(field: Field, value: Any, defaults: Mapping[str, Any]) -> Any:
    """A value for a field as it is spelled at the command line; MISSING: the field's default, as if it were typed."""
    value = field.default if value is MISSING else value
    if value is None and field.default is None:
        return None
    if isinstance(field.kind, Text | Switch):
        return field.kind.check(field.named, value)
    return field.kind.read(field.named, field.kind.spell(value) if value is field.default else _typed(value), defaults)


def _typed(value: Any) -> str:
    """As people type it: a method by its name, several values with commas between them."""
    if isinstance(value, list | tuple):
        return ",".join(map(_typed, value))
    return value.spelled if isinstance(value, Method) else str(value)


def _cut(block: Block) -> Block:
    if isinstance(block, Table) and len(block.rows) > ROWS:
        rest = [f"… {len(block.rows) - ROWS} more", *[""] * (len(block.headers) - 1)]
        return replace(block, rows=[*block.rows[:ROWS], rest])
    return type(block)(f"{block[:CHARACTERS]} …") if isinstance(block, str) and len(block) > CHARACTERS else block


def _is_run(path: Path) -> bool:
    """Whether a file begins as a saved run does; a lab's answer is one object on many lines. Raises UserError where it
    cannot be read."""
    first = next((line for line in read_text(path).split("\n") if line.strip()), "")
    try:
        return json.loads(first).get("format") == FORMAT
    except (ValueError, AttributeError):
        return False
