"""What each command does once its options are read: run the core, print for people or as JSON, give an exit status."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from llmq.events import Event, Run
from llmq.files import read_text, write_text
from llmq.reporting import memory_lines, reported, run_as_json, table
from llmq.summary import Summary
from llmq.terminal import show_progress

EXIT_FAILED = 1


def run_compare(options) -> int:
    from llmq.compare import Comparison
    from llmq.engine.sampling import SamplingSettings
    from llmq.environment import describe
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
    if options.save:
        run.save(options.save)
    return _print_run(run, summary, as_json=options.json)


def run_replay(options) -> int:
    run = Run.load(options.run_file)
    summary = _consume(run.replay())
    return _print_run(run, summary, as_json=options.json)


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


def _print_run(run: Run, summary: Summary, *, as_json: bool) -> int:
    result = run_as_json(run, summary)
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        for contestant in result["contestants"]:
            print(f"\n--- {contestant['method']}\n{contestant['text']}")
        print("\n" + "\n".join(table(result)))
    return EXIT_FAILED if any(c["error"] for c in result["contestants"]) else 0


def run_quality(options) -> int:
    from llmq.bench.quality import QualityBench

    bench = QualityBench(
        model=options.model,
        contestants=_contestants(options),
        device=device_of(options),
        text=read_text(options.text) if options.text else None,
        tokens=options.tokens,
        engine=options.engine,
    )
    return _print_result(answer(bench), options, ("method", "perplexity", "kl_to_fp16", "top1_agreement"))


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
