"""What each command does once its options are read: ask the machine, show the answer, give an exit status."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.contestant import Contestant, entrants
from llmq.environment import every_device
from llmq.errors import BadChoice
from llmq.face import (
    Finding,
    answer_to,
    compare,
    device_for,
    load,
    names,
    open_model,
    options_of,
    question,
    save_quantized,
)
from llmq.fields import Field, Text
from llmq.files import read_text, write_text
from llmq.labs.base import Lab
from llmq.reporting import memory_lines, reported, shown_block
from llmq.summary import RunAnswer
from llmq.terminal import show_progress

if TYPE_CHECKING:
    from llmq.bench.speed import DecodeBench

EXIT_FAILED = 1
ALL_BENCHES = {"what", "device", "threshold", "methods", "save", "json", "run"}  # options of every kind of `bench`


def run_compare(options) -> int:
    given = ("prompt", "model", "device", "schedule", "engine", "random_weights", "sent")
    given += ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    methods = [contestant.label for contestant in entrants(options.methods, options.threshold)]
    return show(compare(methods=methods, verbose=True, **{name: getattr(options, name) for name in given}), options)


def run_replay(options) -> int:
    """Show a saved run or a lab's saved answer again."""
    return show(load(options.file), options)


def run_lab(cls: type[Lab], options) -> int:
    """Ask the question of a lab as the options say, and show what it comes to."""
    given = {name: _given(field, options) for name, field in options_of(cls).items()}
    settings = {name: value for name, value in given.items() if value is not None}
    device = device_for(options.device)
    asked = question(cls, settings, model=options.model, device=device, threshold=options.threshold)
    return show(Finding(answer_to(asked, verbose=True)), options)


def _given(field: Field, options) -> str | bool | None:
    """What the options hold for a field; None where they say nothing."""
    given = getattr(options, field.name, None)
    return _text(field, given, options) if isinstance(field.kind, Text) else given


def _text(field: Field, given: str | None, options) -> str:
    """A text given as it is or in a file. Raises BadChoice where a positional one is missing, or both are given."""
    file = getattr(options, f"{field.name}_file", None)
    missing = given is None and file is None and not field.kind.optional
    if field.kind.positional and missing and not getattr(options, field.kind.unless or "json", None):
        other = f"--{field.kind.unless}" if field.kind.unless else f"{field.kind.file} FILE"
        raise BadChoice(f"no {field.named} is given; give one, or {other}")
    if given is not None and file is not None:
        raise BadChoice(f"give either a {field.named} or {field.kind.file} FILE")
    if file is None or str(file) in field.kind.names:
        return given or str(file or "")
    if field.kind.names and not file.exists():
        raise BadChoice(f"{field.named} is {str(file)!r}; choose {', '.join(field.kind.names)} or a file")
    return read_text(file)


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
    given = {name: value for name, value in vars(options).items() if name not in ALL_BENCHES}
    known = [field.name for field in fields(cls) if field.name not in ("contestants", "device")]
    for name in given.keys() - set(known):
        own, *others = (f"--{one.replace('_', '-')}" for one in (name, *known))
        raise BadChoice(f"bench {options.what} has no {own}; it has {', '.join(others)}")
    bench = cls(**given | {"contestants": _contestants(options), "device": device_for(options.device)})
    result = answer_to(bench, verbose=True)
    if options.save:
        write_text(options.save, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return _print(options, result, chain(_columns(result["results"], bench.columns), _notes(result)))


def _notes(result: dict) -> Iterator[str]:
    """What the figures come to, and what speaks against them, below them."""
    yield from result.get("findings", ())
    yield from result["notes"]
    for row in result["results"]:
        yield from (f"{row['method']}: {note}" for note in row["notes"])


def run_sweep(options) -> int:
    """Measure what is missing of a sweep, and show all of it. A cell without an answer is exit status 1."""
    from llmq.sweeps.grid import Grid, models_in
    from llmq.sweeps.run import sweep

    tokens = options.tokens or (64 if options.what == "speed" else 4096)
    methods = tuple(name.strip() for name in options.methods.split(","))
    grid = Grid(options.what, models_in(options.models), methods, tokens)
    devices = [device_for(name.strip()) for name in options.devices.split(",")] if options.devices else every_device()
    for item in reported(sweep(grid, options.out, devices, ray=options.ray, again=options.again)):
        answer = item
    options.save = None
    show(Finding(answer), options)
    return EXIT_FAILED if len(answer.rows) < len(grid.cells) else 0


def run_tasks(options) -> int:
    from llmq.tasks import COLUMNS, Tasks

    given = {name: getattr(options, name) for name in ("model", "include", "limit", "shots")}
    names = tuple(name.strip() for name in options.tasks.split(","))
    asked = Tasks(tasks=names, contestants=_contestants(options), device=device_for(options.device), **given)
    result = answer_to(asked, verbose=True)
    return _print(options, result, _columns(result["results"], COLUMNS))


def _columns(rows: list[dict], names: tuple[str, ...]) -> Iterator[str]:
    yield "  ".join(f"{name:>20}" for name in names)
    for row in rows:
        cells = ("-" if row[name] is None else row[name] for name in names)
        yield "  ".join(f"{cell:>20,.5g}" if isinstance(cell, float) else f"{cell:>20}" for cell in cells)


def _contestants(options) -> tuple[Contestant, ...]:
    return Contestant.parse_all(options.methods, options.threshold)


def _print(options, result: dict, lines: Iterable[str]) -> int:
    """Print a result as JSON or, in `lines`, for people."""
    print(json.dumps(result, allow_nan=False) if options.json else "\n".join(lines))
    return 0


def run_quantize(options) -> int:
    given = {name: getattr(options, name) for name in ("device", "format", "statistics")}
    result = save_quantized(options.model, options.method, options.save, verbose=True, **given)
    return _print(options, result, _written(result))


def _written(result: dict) -> Iterator[str]:
    yield f"{result['folder']}: {result['weight_bytes'] / 1e6:,.0f} MB of weights, {result['format']}"
    if result["calibration"]:
        yield f"{result['calibration']}: the statistics of the calibration"


def run_memory(options) -> int:
    from llmq.cards import device_bytes
    from llmq.memory import forecast

    room = None if options.device_memory is None else device_bytes(options.device_memory)
    asked = {"tokens": options.context, "answer": options.new_tokens, "batch": options.batch, "device_bytes": room}
    result = forecast(options.model, _contestants(options), **asked)
    return _print(options, result, memory_lines(result))


def run_advise(options) -> int:
    """Advise on a model for the memory that is free here, or for what is named; measure first where that is asked."""
    from llmq.labs.advice import Place, advise, stored_results
    from llmq.models.opening import describe_model

    device, named = device_for(options.device), options.device_memory
    model, place = describe_model(options.model), Place.here(device) if named is None else Place.named(named)
    asked = {"results": stored_results(), "tokens": options.context, "batch": options.batch}
    advice = advise(model, _contestants(options), place, **asked)
    if options.measure:
        measured = answer_to(_measuring(advice.result, device), verbose=True)
        advice = advise(model, _contestants(options), place, **asked, measured=measured)
    return show(Finding(advice), options)


def _measuring(advice: dict, device: str) -> DecodeBench:
    """What measures the speed of the methods that fit. Raises BadChoice where none does, or for several texts."""
    from llmq.bench.speed import DecodeBench

    fitting = tuple(Contestant.parse(row["method"]) for row in advice["results"] if row["fits"])
    if not fitting or advice["batch"] != 1:
        why = "speed is measured at batch 1" if fitting else "no method fits, so nothing can be measured"
        raise BadChoice(f"{why}; leave out --measure")
    return DecodeBench(model=advice["model"], contestants=fitting, device=device)


def run_lesson(options) -> int:
    """Write the lesson or its recordings; with neither, list its steps."""
    from llmq.lesson import pack, recording

    written = [*(recording.record(options.record) if options.record else ())]
    written += pack.write(options.static) if options.static else []
    titles = pack.words()
    steps = [{"step": step.name, "title": titles[f"{step.name}.title"]["en"]} for step in pack.STEPS]
    lines = map(str, written) if written else (f"{n:>3}  {step['title']}" for n, step in enumerate(steps, 1))
    return _print(options, {"steps": steps, "written": [str(path) for path in written]}, lines)


def run_models(options) -> int:
    """List what has a name; fetch or write a model where that is asked for."""

    if options.fetch:
        open_model(options.fetch, verbose=True)
    if options.save_int8:
        from llmq.models.int8_checkpoint import save_int8

        name, folder = options.save_int8
        show_progress(save_int8(open_model(name, verbose=True).source, Path(folder)))
        return 0
    result = names()
    return _print(options, result, _listed(result))


def _listed(result: dict[str, list[dict]]) -> Iterator[str]:
    for kind, rows in result.items():
        yield f"{kind}:"
        yield from (f"  {row['name']:<24}{row['about']}" for row in rows)
