"""What each command does once its options are read: run the core, print for people or as JSON, give an exit status."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from llmq.events import Event, Run
from llmq.files import read_text, write_text
from llmq.reporting import memory_lines, reported, run_as_json, table
from llmq.summary import Summary
from llmq.terminal import show_progress

EXIT_FAILED = 1


def run_compare(options) -> int:
    from llmq.compare import compare
    from llmq.contestants import Comparison
    from llmq.engine.residents import Residents
    from llmq.engine.sampling import SamplingSettings
    from llmq.environment import describe
    from llmq.models.loading import resolve

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
    source = resolve(comparison.model, random_weights=comparison.random_weights)
    run = Run(comparison.settings(), {})
    summary = _consume(run.record(compare(comparison, Residents()), time.monotonic))
    run.environment = describe(comparison.device, source)
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
    from llmq.bench.quality import QualityBench, bench_quality

    bench = QualityBench(
        model=options.model,
        contestants=_contestants(options),
        device=device_of(options),
        text=read_text(options.text) if options.text else None,
        tokens=options.tokens,
        engine=options.engine,
    )
    result = bench_quality(bench, _report)
    return _print_result(result, options, ("method", "perplexity", "kl_to_fp16", "top1_agreement"))


def run_bench(options) -> int:
    shared = {
        "model": options.model,
        "contestants": _contestants(options),
        "device": device_of(options),
        "random_weights": options.random_weights,
        "prompt_tokens": options.prompt_tokens,
        "repeats": options.repeats,
        "engine": options.engine,
    }
    if options.what == "prefill":
        from llmq.bench.prefill import Bench, bench_prefill

        columns = ("method", "engine", "seconds", "tokens_per_second", "workspace_bytes")
        return _print_result(bench_prefill(Bench(**shared), _report), options, columns)
    if options.what == "load":
        from llmq.bench.load import Bench, bench_load

        columns = ("method", "engine", "load_seconds", "ready_seconds", "weight_bytes", "peak_load_bytes")
        return _print_result(bench_load(Bench(**shared), _report), options, columns)
    if options.what == "peers":
        from llmq.bench.peers import PeersBench, bench_peers

        bench = PeersBench(**shared, new_tokens=options.new_tokens, busy=options.busy)
        columns = ("method", "tokens_per_second", "prefill_tokens_per_second", "against", "decode_ratio")
        columns += ("prefill_ratio", "bandwidth_fraction", "weight_bytes")
        return _print_result(bench_peers(bench, _report), options, columns)
    if options.what == "hooks":
        from llmq.bench.hooks import HooksBench, bench_hooks

        bench = HooksBench(**shared, new_tokens=options.new_tokens)
        columns = ("method", "prefill_ratio", "decode_ratio", "prefill_seconds", "decode_seconds_per_token")
        return _print_result(bench_hooks(bench, _report), options, (*columns, "held_bytes"))
    from llmq.bench.decode import DecodeBench, bench_decode

    bench = DecodeBench(**shared, new_tokens=options.new_tokens)
    columns = (
        "method",
        "engine",
        "tokens_per_second",
        "prefill_seconds",
        "bandwidth_fraction",
        "weight_bytes",
        "peak_bytes",
    )
    return _print_result(bench_decode(bench, _report), options, columns)


def _contestants(options) -> tuple:
    from llmq.contestants import Contestant

    return tuple(Contestant.parse(name, options.threshold) for name in options.methods.split(","))


def device_of(options) -> str:
    """The device the options name, with the libraries told to keep quiet before anything loads."""
    from llmq.environment import device_named
    from llmq.models.loading import quiet_libraries

    quiet_libraries()
    return device_named(options.device)


def _report(line: str) -> None:
    print(f"llmq: {line}", file=sys.stderr)


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
    from llmq.models.loading import prepare, quiet_libraries, resolve
    from llmq.models.presets import PRESETS
    from llmq.quant import METHODS

    if options.fetch or options.save_int8:
        quiet_libraries()
    if options.fetch:
        show_progress(prepare(resolve(options.fetch)))
    if options.save_int8:
        from llmq.models.int8_checkpoint import save_int8

        name, folder = options.save_int8
        show_progress(prepare(resolve(name)))
        show_progress(save_int8(resolve(name), Path(folder)))
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
