"""What a run showed, in plain sentences built from its own figures. No gradio; no word of the model's text."""

from __future__ import annotations

from llmq.formatting import format_bytes, format_speed
from llmq.methods import METHODS
from llmq.summary import Outcome, Summary

USUAL = "That is usual for LLM.int8() through bitsandbytes at batch size 1:"
WHY_SLOWER_GPU = (
    "it reads half the bytes, but every linear layer launches many small kernels to quantize its input, and waits for "
    "the host to hear whether there are outliers."
)
WHY_SLOWER_CPU = "on a CPU without AVX-512 it turns the int8 weights of every layer into FP32 again for each token."
WHY_OURS_CPU = (
    "Through transformers on a CPU it runs on torch's own operations, which turn the int8 weights into FP32 too; the "
    "lean loop does not."
)
LOOPS = {"hf": "transformers", "lean": "the lean loop"}


def verdict(summary: Summary, cpu: str = "") -> str:
    """Cost and saving of each later contestant against the first, and how far the texts agree. Markdown. `cpu`: the
    processor's capability as torch names it."""
    if not summary.outcomes:
        return ""
    baseline, *others = summary.outcomes.values()
    place = "gpu" if summary.plan and summary.plan.device.startswith("cuda") else cpu
    lines = dict.fromkeys(line for other in others for line in _against(baseline, other, place))
    agreement = _agreement(summary, baseline, others[0]) if others else ""
    return "\n\n".join(line for line in (*lines, agreement) if line)


def _against(baseline: Outcome, other: Outcome, place: str) -> list[str]:
    if failed := [o for o in (baseline, other) if o.error]:
        return [f"**{_name(o)} did not finish**, so there is nothing to compare." for o in failed]
    if not (baseline.weight_bytes and other.weight_bytes):
        return []
    memory = (
        f"**{_name(other)}** holds {format_bytes(other.weight_bytes)} of weights where {_name(baseline)} holds "
        f"{format_bytes(baseline.weight_bytes)}: {_change(other.weight_bytes / baseline.weight_bytes)}."
    )
    return [f"{memory} {_speed(baseline, other, place)}".strip()]


def _change(share: float) -> str:
    percent = f"{abs(1 - share):.0%}"
    return "as much memory" if percent == "0%" else f"{percent} {'less' if share < 1 else 'more'} memory"


def _speed(baseline: Outcome, other: Outcome, place: str) -> str:
    ours, theirs = other.decode_tokens_per_second, baseline.decode_tokens_per_second
    if not (ours and theirs):
        return "There were too few tokens to state a speed."
    ratio = theirs / ours
    pair = f"{format_speed(ours)} against {format_speed(theirs)}{_crossing(baseline, other)}"
    if ratio > 1.05:
        reason = _reason(other, place)
        return f"It decoded at {pair}: **{ratio:.1f} times slower** in this run.{reason}"
    if ratio < 0.95:
        return f"It decoded at {pair}: **{1 / ratio:.1f} times faster** in this run."
    return f"It decoded at {pair}: about the same speed in this run."


def _reason(slower: Outcome, place: str) -> str:
    if slower.contestant.startswith("bnb-"):
        reason = {"gpu": WHY_SLOWER_GPU, "AVX512": ""}.get(place, WHY_SLOWER_CPU)  # with AVX-512 we have measured none
        return f" {USUAL} {reason}" if reason else ""
    ours = slower.contestant.startswith("llm-int8") and slower.engine != "lean"
    return f" {WHY_OURS_CPU}" if ours and place != "gpu" else ""


def _crossing(baseline: Outcome, other: Outcome) -> str:
    """A ratio of speeds is about the methods only where both ran through one loop."""
    if not (baseline.engine and other.engine) or baseline.engine == other.engine:
        return ""
    return f" (in different loops: {LOOPS[other.engine]} and {LOOPS[baseline.engine]})"


def _agreement(summary: Summary, baseline: Outcome, other: Outcome) -> str:
    found = summary.agreement()
    same, first = found["matching_prefix_tokens"], found["first_divergence"]
    if not (baseline.token_ids and other.token_ids):
        return ""
    if first is None:
        return f"The two texts agree on all {_tokens(same)} that both produced."
    if first == 0:
        return "The two texts differ from the first token on; after that each continues its own text."
    return (
        f"The two texts agree for {_tokens(same)} and part at token {first + 1}; from there on each continues its own "
        "text, so later differences follow from this one."
    )


def _name(outcome: Outcome) -> str:
    method, at, threshold = outcome.contestant.partition("@")
    label = METHODS[method].label if method in METHODS else method  # a recording may name methods unknown here
    return f"{label}, threshold {threshold}" if at else label


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"
