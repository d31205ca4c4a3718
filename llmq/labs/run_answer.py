"""A comparison that ran, as an answer: it is shown, written and loaded like a lab's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmq.events import Run
from llmq.figures.blocks import Block, Table, Verbatim
from llmq.formatting import MISSING, format_bytes, format_seconds, format_speed, shown_coverage
from llmq.summary import Outcome, Summary


@dataclass(frozen=True)
class RunAnswer:
    """A comparison that ran, as an answer: texts, figures, and where the texts part."""

    run: Run
    summary: Summary
    kind = "compare"

    @property
    def title(self) -> str:
        return f"{self.run.settings.get('model')}: {' and '.join(self.summary.outcomes)}"

    def blocks(self) -> Iterator[Block]:
        outcomes = self.summary.outcomes.values()
        for outcome in outcomes:
            yield Verbatim(f"--- {outcome.contestant}\n{outcome.error or outcome.text}")
        rows = [
            [
                outcome.contestant,
                format_seconds(outcome.prefill_seconds),
                format_speed(outcome.decode_tokens_per_second),
                format_bytes(outcome.weight_bytes),
                shown_coverage(outcome.coverage) or MISSING,
                format_bytes(outcome.peak_bytes),
            ]
            for outcome in outcomes
        ]
        yield Table(["Method", "First token", "Decode", "Weights", "In 8 bit", "Peak"], rows, "Measured")
        yield self._first_divergence()

    def _first_divergence(self) -> str:
        """Where the first two texts part; '' where there are not two, or one was not finished."""
        pair = list(self.summary.outcomes.values())[:2]
        if len(pair) < 2 or any(outcome.error for outcome in pair):
            return ""
        first = self.summary.agreement()["first_divergence"]
        return "the texts agree throughout" if first is None else f"the first different token is number {first + 1}"

    def to_json(self) -> dict:
        """The stable keys of `compare --json` and of `replay --json`."""
        run, plan = self.run, self.summary.plan
        return {
            "model": run.settings.get("model"),
            "device": plan.device if plan else run.settings.get("device"),
            "schedule": plan.schedule if plan else run.settings.get("schedule"),
            "schedule_reason": plan.reason if plan else "",
            "peak_source": "torch allocator" if plan and plan.device.startswith("cuda") else "tensor sizes",
            "contestants": [_outcome_json(outcome) for outcome in self.summary.outcomes.values()],
            "agreement": self.summary.agreement(),
            "settings": run.settings,
            "environment": run.environment,
        }


def _outcome_json(outcome: Outcome) -> dict:
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
        "coverage": outcome.coverage or None,
        "kv_bytes": outcome.kv_bytes,
        "peak_bytes": outcome.peak_bytes,
        "finish_reason": outcome.reason,
        "error": outcome.error,
    }
