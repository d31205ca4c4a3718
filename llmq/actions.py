"""What each command does once its options are read: ask the machine, show the answer, give an exit status."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.face import Finding, answer_to, compare, device_for, load
from llmq.fields import Field, Switch, Text, fields_of
from llmq.files import read_text, write_text
from llmq.labs.base import Lab
from llmq.labs.run_answer import RunAnswer
from llmq.reporting import memory_lines, shown_block
from llmq.terminal import show_progress

EXIT_FAILED = 1


def run_compare(options) -> int:
    names = ("prompt", "model", "device", "schedule", "engine", "random_weights")
    names += ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    methods = [contestant.method for contestant in _contestants(options)]
    return show(compare(methods=methods, verbose=True, **{name: getattr(options, name) for name in names}), options)


def run_replay(options) -> int:
    """Show a saved run or a lab's saved answer again."""
    return show(load(options.file), options)


def run_lab(cls: type[Lab], options) -> int:
    """Ask the question of a lab as the options say, and show what it comes to."""
    question = {field.name: _value(field, options) for field in fields_of(cls)}
    answer = answer_to(cls(model=options.model, device=device_for(options.device), **question), verbose=True)
    return show(Finding(answer), options)


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


def show(finding: Finding, options) -> int:
    """Write what is to be written of an answer, and print it for people or as JSON. A comparison in which a method
    failed is exit status 1."""
    if options.save:
        finding.save(options.save)
    if options.html:
        finding.html(options.html)
    if options.json:
        print(json.dumps(finding.to_json(), allow_nan=False))
    else:
        print("\n\n".join(filter(None, map(shown_block, finding.answer.blocks()))))
    compared = finding.answer.summary.outcomes if isinstance(finding.answer, RunAnswer) else {}
    return EXIT_FAILED if any(outcome.error for outcome in compared.values()) else 0


def run_bench(options) -> int:
    from llmq.bench import bench_named

    cls = bench_named(options.what)
    names = {field.name for field in fields(cls)} & vars(options).keys()
    given = {name: getattr(options, name) for name in names}
    bench = cls(**given | {"contestants": _contestants(options), "device": device_for(options.device)})
    return _print_result(answer_to(bench, verbose=True), options, bench.columns)


def _contestants(options) -> tuple[Contestant, ...]:
    return Contestant.parse_all(options.methods, options.threshold)


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
    from llmq.cards import device_bytes
    from llmq.memory import forecast

    result = forecast(
        options.model,
        _contestants(options),
        tokens=options.context,
        batch=options.batch,
        device_bytes=None if options.device_memory is None else device_bytes(options.device_memory),
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
