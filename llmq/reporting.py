"""Runs and results in words and in JSON, for a terminal and for scripts."""

from __future__ import annotations

from collections.abc import Iterator

from llmq.events import Event, Failed, Finished, Freed, Loaded, Loading, Planned, Run, Waiting
from llmq.inspect.report import OutlierReport
from llmq.summary import Outcome, Summary


def progress_line(event: Event) -> str:
    match event:
        case Waiting(position=position) if position:
            return "waiting for another run to leave the device"
        case Planned():
            return f"{event.schedule} on {event.device}" + (f": {event.reason}" if event.reason else "")
        case Loading(contestant="", message=message):
            return message.partition(" (")[0].partition(" · ")[0]
        case Loading():
            return f"loading {event.contestant}" + (f": {event.message}" if event.message else "")
        case Loaded():
            return f"{event.contestant}: {event.weight_bytes / 1e6:,.0f} MB of weights in {event.seconds:.1f} s"
        case Finished():
            return f"{event.contestant}: finished ({event.reason})"
        case Freed():
            seen = "verified" if event.verified else "NOT verified"
            return f"{event.contestant}: freed {event.freed_bytes / 1e6:,.0f} MB ({seen})"
        case Failed():
            return f"{event.contestant}: failed: {event.message}"
    return ""


def run_as_json(run: Run, summary: Summary) -> dict:
    """The stable keys of `compare --json` (and of `replay --json`)."""
    plan = summary.plan
    return {
        "model": run.settings.get("model"),
        "device": plan.device if plan else run.settings.get("device"),
        "schedule": plan.schedule if plan else run.settings.get("schedule"),
        "schedule_reason": plan.reason if plan else "",
        "peak_source": "torch allocator" if plan and plan.device.startswith("cuda") else "tensor sizes",
        "contestants": [_contestant_as_json(outcome) for outcome in summary.outcomes.values()],
        "agreement": summary.agreement(),
        "settings": run.settings,
        "environment": run.environment,
    }


def _contestant_as_json(outcome: Outcome) -> dict:
    return {
        "method": outcome.contestant,
        "engine": outcome.engine,
        "text": outcome.text,
        "token_ids": outcome.token_ids,
        "prompt_tokens": outcome.prompt_tokens,
        "load_seconds": outcome.load_seconds,
        "prefill_seconds": outcome.prefill_seconds,
        "decode_tokens_per_second": outcome.decode_tokens_per_second,
        "weight_bytes": outcome.weight_bytes,
        "kv_bytes": outcome.kv_bytes,
        "peak_bytes": outcome.peak_bytes,
        "finish_reason": outcome.reason,
        "error": outcome.error,
    }


def table(result: dict) -> Iterator[str]:
    yield f"{'method':<14}{'first token':>13}{'decode':>14}{'weights':>12}{'peak':>12}"
    for c in result["contestants"]:
        first = f"{c['prefill_seconds']:.3f} s" if c["prefill_seconds"] is not None else "-"
        speed = f"{c['decode_tokens_per_second']:.2f} tok/s" if c["decode_tokens_per_second"] else "-"
        weights = f"{c['weight_bytes'] / 1e6:,.1f} MB" if c["weight_bytes"] else "-"
        peak = f"{c['peak_bytes'] / 1e6:,.1f} MB" if c["peak_bytes"] else "-"
        yield f"{c['method']:<14}{first:>13}{speed:>14}{weights:>12}{peak:>12}"
    first = result["agreement"]["first_divergence"]
    yield "the texts agree throughout" if first is None else f"the first different token is number {first + 1}"


def outlier_lines(report: OutlierReport, threshold: float) -> Iterator[str]:
    """The outlier report for a terminal: one line a kind of module, then the strongest channels."""
    from llmq.inspect.views import strongest_channels

    yield f"{report.model}, {report.method}, |x| >= {threshold:g}, {report.prompt_tokens} prompt tokens"
    for kind in report.kinds:
        modules = [module for module in report.modules if module.kind == kind]
        with_columns = sum(bool(module.prefill_columns(threshold)) for module in modules)
        most = max(len(module.prefill_columns(threshold)) for module in modules)
        at = " (last position alone)" if modules[0].layer is None else ""  # the head's
        yield f"  {kind:<10} prefill: {with_columns} of {len(modules)} layers have outlier columns, {most} at most{at}"
    yield "strongest channels:"
    for row in strongest_channels(report, threshold, 10):
        yield f"  {row.kind:<10} channel {row.channel:<6} |x| up to {row.absmax:,.1f} (layer {row.layer}, {row.phase})"


def memory_lines(result: dict) -> Iterator[str]:
    """The forecast as a table in GB (1e9 bytes)."""
    yield f"{result['model']}, {result['context']:,} tokens, batch {result['batch']}; GB"
    names = ("weights", "scales", "kv", "workspace", "total")
    yield f"  {'method':<14}" + "".join(f"{name:>11}" for name in names)
    for row in result["results"]:
        fits = {None: "", True: "  fits", False: "  does not fit"}[row["fits"]]
        cells = ("not known" if row[name] is None else f"{row[name] / 1e9:.3f}" for name in names)
        yield f"  {row['method']:<14}" + "".join(f"{cell:>11}" for cell in cells) + fits
