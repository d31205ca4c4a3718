"""What each command does once its options are read: ask the machine, show the answer, give an exit status."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from llmq.errors import BadChoice
from llmq.events import Event, Run, is_run
from llmq.fields import Field, Switch, Text, fields_of
from llmq.files import read_text, write_text
from llmq.formatting import plain_json
from llmq.labs.base import Answer, Lab
from llmq.reporting import memory_lines, reported, shown_block
from llmq.summary import Summary
from llmq.terminal import show_progress

EXIT_FAILED = 1


def run_compare(options) -> int:
    from llmq.engine.sampling import SamplingSettings
    from llmq.environment import describe
    from llmq.labs.compare import Comparison
    from llmq.machine.door import Machine
    from llmq.models.opening import open_model

    comparison = Comparison(
        prompt=options.prompt,
        model=options.model,
        contestants=_contestants(options),
        sampling=SamplingSettings(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        ),
        schedule=options.schedule,
        device=device_of(options),
        random_weights=options.random_weights,
        engine=options.engine,
    )
    model = open_model(comparison.model, random_weights=comparison.random_weights)
    run = Run(comparison.settings(), {})
    summary = _consume(run.record(Machine().run(comparison), time.monotonic))
    run.environment = describe(comparison.device, model.source)
    return _show_run(run, summary, options)


def run_replay(options) -> int:
    """Show a saved run or a lab's saved answer again."""
    if not is_run(options.file):
        from llmq.labs import load_answer

        return show(load_answer(options.file), options)
    run = Run.load(options.file)
    return _show_run(run, _consume(run.replay()), options)


def _consume(events: Iterable[Event]) -> Summary:
    summary = Summary()
    for event in reported(events):
        summary.add(event)
    return summary


def answer(question, machine=None):
    """What `question` comes to at last, with its progress told at the terminal."""
    from llmq.machine.door import Machine

    *_, last = reported((machine or Machine()).run(question))
    return last


def _show_run(run: Run, summary: Summary, options) -> int:
    from llmq.labs.run_answer import RunAnswer

    found = RunAnswer(run, summary)
    if options.save:
        run.save(options.save)
        options.save = None
    return show(found, options) or (EXIT_FAILED if any(o.error for o in summary.outcomes.values()) else 0)


def run_lab(cls: type[Lab], options) -> int:
    """Ask the question of a lab as the options say, and show what it comes to."""
    question = {field.name: _value(field, options) for field in fields_of(cls)}
    return show(answer(cls(model=options.model, device=device_of(options), **question)), options)


def _value(field: Field, options):
    """What the options hold for a field; its default where they say nothing."""
    given = getattr(options, field.name, None)
    if isinstance(field.kind, Text):
        return _text(field, given, options)
    if isinstance(field.kind, Switch):
        return given
    if given is None and field.default is None:
        return None
    text = field.kind.spell(field.default) if given is None else given
    return field.kind.read(field.named, text, {"threshold": options.threshold})


def _text(field: Field, given: str | None, options) -> str:
    """A text given as it is or in a file. Raises BadChoice where a positional one is missing, or both are given."""
    file = getattr(options, f"{field.name}_file", None)
    missing = given is None and file is None
    if field.kind.positional and missing and not getattr(options, field.kind.unless or "json", None):
        other = f"--{field.kind.unless}" if field.kind.unless else f"{field.kind.file} FILE"
        raise BadChoice(f"no {field.named} is given; give one, or {other}")
    if given is not None and file is not None:
        raise BadChoice(f"give either a {field.named} or {field.kind.file} FILE")
    return read_text(file) if file is not None else given or ""


def show(found: Answer, options) -> int:
    """Write what is to be written of an answer, and print it for people or as JSON."""
    from llmq.labs import save_answer

    if options.html:
        from llmq.figures.pages import page

        write_text(options.html, page(found.title, found.blocks()))
    if options.save:
        save_answer(found, options.save)
    if options.json:
        print(json.dumps(plain_json(found.to_json()), allow_nan=False))
    else:
        print("\n\n".join(filter(None, map(shown_block, found.blocks()))))
    return 0


def run_bench(options) -> int:
    from llmq.bench import bench_named

    cls = bench_named(options.what)
    names = {field.name for field in fields(cls)} & vars(options).keys()
    given = {name: getattr(options, name) for name in names}
    bench = cls(**given | {"contestants": _contestants(options), "device": device_of(options)})
    return _print_result(answer(bench), options, bench.columns)


def _contestants(options) -> tuple:
    from llmq.contestant import Contestant

    return Contestant.parse_all(options.methods, options.threshold)


def device_of(options) -> str:
    """The device the options name, with the libraries told to keep quiet before anything loads."""
    from llmq.environment import device_named
    from llmq.models.loading import quiet_libraries

    quiet_libraries()
    return device_named(options.device)


def _print_result(result: dict, options, columns: tuple[str, ...]) -> int:
    if options.save:
        write_text(options.save, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if options.json:
        print(json.dumps(result, allow_nan=False))
        return 0
    print("  ".join(f"{column:>20}" for column in columns))
    for row in result["results"]:
        cells = ("-" if row[column] is None else row[column] for column in columns)
        print("  ".join(f"{cell:>20,.5g}" if isinstance(cell, float) else f"{cell:>20}" for cell in cells))
    return 0


def run_memory(options) -> int:
    from llmq.memory import forecast

    result = forecast(
        options.model,
        _contestants(options),
        tokens=options.context,
        batch=options.batch,
        device_bytes=None if options.device_memory is None else options.device_memory * 1e9,
    )
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(memory_lines(result)))
    return 0


def run_models(options) -> int:
    from llmq.methods import METHODS
    from llmq.models.loading import quiet_libraries
    from llmq.models.opening import open_model
    from llmq.models.presets import PRESETS

    if options.fetch or options.save_int8:
        quiet_libraries()
    if options.fetch:
        show_progress(open_model(options.fetch).prepare())
    if options.save_int8:
        from llmq.models.int8_checkpoint import save_int8

        name, folder = options.save_int8
        model = open_model(name)
        show_progress(model.prepare())
        show_progress(save_int8(model.source, Path(folder)))
        return 0
    result = {
        "models": [
            {"name": p.name, "hub_id": p.hub_id, "about": p.about, "licence": p.licence, "gated": p.gated}
            for p in PRESETS.values()
        ],
        "methods": [{"name": m.name, "label": m.label, "about": m.about} for m in METHODS.values()],
    }
    if options.json:
        print(json.dumps(result))
        return 0
    for kind, rows in result.items():
        print(f"{kind}:")
        for row in rows:
            print(f"  {row['name']:<24}{row['about']}")
    return 0
