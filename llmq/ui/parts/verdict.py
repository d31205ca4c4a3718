"""What a run showed, in plain sentences built from its own figures. No gradio. Of the models' texts they quote the two
tokens where those part: plain text, never markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmq.contestant import shown_name
from llmq.formatting import LOOPS, format_bytes, format_speed
from llmq.summary import Outcome, Summary
from llmq.ui.parts.difference import about_even

USUAL = "That is usual for LLM.int8() through bitsandbytes at batch size 1:"
WHY_SLOWER_GPU = (
    "every linear layer starts many small kernels to quantize its input, and waits for the host to hear whether there "
    "are outliers."
)
WHY_SLOWER_CPU = "on a CPU without AVX-512 it turns the int8 weights of every layer into FP32 again for each token."
WHY_OURS_CPU = (
    "Through transformers on a CPU it runs on torch's own operations, which turn the int8 weights into FP32 too; "
    "the lean loop does not."
)


@dataclass(frozen=True)
class Verdict:
    """`headline`: one sentence, what a reader takes home; `details`: the sentences with every figure, and why."""

    headline: str = ""
    details: tuple[str, ...] = ()


def verdict(summary: Summary, cpu: str = "") -> Verdict:
    """Cost and saving of each later contestant against the first, and how far the texts agree. `cpu`: the processor's
    capability as torch names it."""
    if not summary.outcomes:
        return Verdict()
    baseline, *others = summary.outcomes.values()
    place = "gpu" if summary.plan and summary.plan.device.startswith("cuda") else cpu
    whole = [] if baseline.error else [other for other in others if not other.error]
    short = [line for other in whole if (line := _headline(baseline, other))]
    told = [line for other in whole if (line := _against(baseline, other, place))]
    if others and others[0] in whole and (agreement := _agreement(summary, baseline, others[0])):
        told.append(agreement)
        short = _with_texts(short, summary)
    failed = [f"{_name(o)} did not finish, so there is nothing to compare" for o in (baseline, *others) if o.error]
    if held := summary.peak_by_device:
        each = ", ".join(f"{format_bytes(count)} on {device}" for device, count in held.items())
        told.append(f"Live tensors at their most: {each}.")
    return Verdict(" ".join(f"{line}." for line in failed + short), tuple(dict.fromkeys(told)))


def _headline(baseline: Outcome, other: Outcome) -> str:
    """'int8 · ours needs 39 % less memory and writes 1.8 times faster than FP16'; '' where too little is known."""
    if not (baseline.weight_bytes and other.weight_bytes):
        return ""
    memory = f"needs {_change(other.weight_bytes / baseline.weight_bytes)}"
    ratio = _ratio(baseline, other)
    speed = "" if ratio is None else f" and writes {_times(ratio)}"
    return f"{_name(other)} {memory}{speed}{'' if ratio is None or about_even(ratio) else f' than {_name(baseline)}'}"


def _with_texts(short: list[str], summary: Summary) -> list[str]:
    """The sentences `short`, and how far the first two texts agree; where they part, what each chose there."""
    if not short:
        return []
    same = summary.agreement()["matching_prefix_tokens"]
    if parting := summary.parting():
        where = f"After {same} equal {'token' if same == 1 else 'tokens'}," if same else "At the first token,"
        return [*short, f"{where} {parting.sentence()}"]
    lengths = {len(outcome.token_ids) for outcome in list(summary.outcomes.values())[:2]}
    far = "" if len(lengths) == 1 else f" for {_tokens(same)}"
    return [f"{short[0]}; the texts are the same{far}", *short[1:]]


def _against(baseline: Outcome, other: Outcome, place: str) -> str:
    if not (baseline.weight_bytes and other.weight_bytes):
        return ""
    memory = (
        f"{_name(other)} holds {format_bytes(other.weight_bytes)} of weights where {_name(baseline)} holds "
        f"{format_bytes(baseline.weight_bytes)}: {_change(other.weight_bytes / baseline.weight_bytes)}."
    )
    return f"{memory} {_speed(baseline, other, place)}"


def _change(share: float) -> str:
    percent = f"{abs(1 - share):.0%}"
    return "as much memory" if percent == "0%" else f"{percent} {'less' if share < 1 else 'more'} memory"


def _ratio(baseline: Outcome, other: Outcome) -> float | None:
    """How many times faster than the baseline; None where there were too few tokens."""
    ours, theirs = other.decode_tokens_per_second, baseline.decode_tokens_per_second
    return ours / theirs if ours and theirs else None


def _times(ratio: float) -> str:
    if about_even(ratio):
        return "at about the same speed"
    return f"{ratio:.1f} times faster" if ratio > 1 else f"{1 / ratio:.1f} times slower"


def _speed(baseline: Outcome, other: Outcome, place: str) -> str:
    ratio = _ratio(baseline, other)
    if ratio is None:
        return "There were too few tokens to state a speed."
    pair = " against ".join(format_speed(outcome.decode_tokens_per_second) for outcome in (other, baseline))
    reason = _reason(other, place) if ratio < 1 and not about_even(ratio) else ""
    return f"It decoded at {pair}{_crossing(baseline, other)}: {_times(ratio).removeprefix('at ')} in this run.{reason}"


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
    where = (
        f"are the same for {_tokens(same)} and part at token {first + 1}" if first else "differ from the first token on"
    )
    sure = _how_sure((baseline, other), summary.places())
    return f"The two texts {where}.{sure} All later differences follow from this one."


def _how_sure(pair: tuple[Outcome, Outcome], places: Sequence[int]) -> str:
    """How likely each model held the token that it wrote where they part, as far as it is known."""
    chances = {_name(one): one.chance(place) for one, place in zip(pair, places, strict=True)}
    known = {name: chance for name, chance in chances.items() if chance is not None}
    told = ", ".join(f"{name} gave its own choice {chance:.0%}" for name, chance in known.items())
    return f" There {told}{': little decided it' if max(known.values()) < 0.5 else ''}." if known else ""


def _name(outcome: Outcome) -> str:
    return shown_name(outcome.contestant)


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"
