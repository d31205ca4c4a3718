"""What was found, in sentences, table rows and plain values: the same words at a terminal, on the page, in a file."""

from __future__ import annotations

from llmq.formatting import format_share
from llmq.inspect.agreement import TokenAgreement
from llmq.inspect.cause import Cause
from llmq.inspect.emergence import Emergence, massive_activations
from llmq.inspect.reading import Read
from llmq.inspect.report import OutlierReport, agreement_with_kernel

PATCHES = 15  # of the table
PATCH_HEADERS = ["Put back to 16 bit", "Margin (logits)", "Forecast then", "Repaired"]
MASSIVE_HEADERS = ["Where", "Layer", "Token", "Text", "Channel", "|x|", "Times typical"]
MASSIVE = 10


def account_line(report: OutlierReport, threshold: float) -> str:
    """Whether hooks and layers agree, in a sentence."""
    found = agreement_with_kernel(report)
    if found is None:
        return f"{report.method} sends no columns to 16 bit apart, so only the hooks' rings are drawn."
    same, calls = found
    layers = sum(module.sent is not None for module in report.modules)
    line = (
        f"In {same:,} of {calls:,} calls ({layers} linear layers, the prompt and {report.generated_tokens} tokens) the "
        f"layer's own list is exactly what the hooks found at the run's threshold {report.threshold:g}."
    )
    moved = threshold != report.threshold
    return line + (f" The rings are drawn for {threshold:g} now; watch again to ask the layers." if moved else "")


def emergence_line(found: Emergence) -> str:
    """The paper's figures in a sentence."""
    features = found.outlier_features
    reach = f"{len(found.features)} dimensions reach 6 somewhere in {found.positions} positions"
    if not features:
        return f"No dimension meets the criterion in this prompt; {reach}."
    names = ", ".join(str(feature.channel) for feature in features[:6]) + (", …" if len(features) > 6 else "")
    return (
        f"**{len(features)}** outlier feature{'s' * (len(features) != 1)} (dimension {names}), in "
        f"**{format_share(found.layers_touched)}** of {found.layers} layers, at up to "
        f"**{format_share(found.positions_touched)}** of positions; {reach}."
    )


def massive_rows(report: OutlierReport) -> list[list[str]]:
    """The table of massive activations."""
    return [
        [
            found.where if found.where == "residual stream" else f"input of {found.where}",
            str(found.layer),
            str(found.token),
            repr(found.text),
            str(found.channel),
            f"{found.absmax:,.1f}",
            f"{found.times_typical:,.0f} ×",
        ]
        for found in massive_activations(report, MASSIVE)
    ]


def summary_of(read: Read) -> str:
    """Agreement in one line."""
    found, labels = read.agreement, (read.reading.baseline.label, read.reading.contestant.label)
    same = sum(token.agrees for token in found.tokens)
    return (
        f"Both read the same {len(found.tokens)} tokens: {same} times ({format_share(found.top1_agreement)}) the same "
        f"first choice, mean KL {found.mean_kl:.3g} nats, perplexity {found.perplexities[0]:.4g} ({labels[0]}) and "
        f"{found.perplexities[1]:.4g} ({labels[1]})."
    )


def drift_line(read: Read) -> str:
    """Where the two free texts part; '' where none was written."""
    drift, labels = read.agreement.drift, (read.reading.baseline.label, read.reading.contestant.label)
    if drift is None:
        return ""
    if drift.position is None:
        shorter = min(len(drift.baseline_ids), len(drift.other_ids))
        return f"Writing freely, both write the same {shorter} tokens."
    own, other = (read.text_of(ids[drift.position]) for ids in (drift.baseline_ids, drift.other_ids))
    margins = f"{drift.margins[0]:.3g} and {drift.margins[1]:.3g} nats" if drift.margins else "unknown margins"
    return (
        f"Writing freely, the texts part at token {drift.position + 1}: {labels[0]} writes {own!r}, {labels[1]} "
        f"{other!r}, each preferring its own by {margins}. From there on they read different texts, so a large "
        "difference of texts can come from a small one of numbers."
    )


def cause_line(cause: Cause, read: Read) -> str:
    """The finding in one or two sentences."""
    token, labels = read.texts[cause.position], (read.reading.baseline.label, read.reading.contestant.label)
    wanted, got = read.text_of(cause.baseline_token), read.text_of(cause.other_token)
    if not cause.diverges:
        return f"Token {cause.position} ({token!r}): both hold {wanted!r} likeliest, so there is nothing to repair."
    start = (
        f"Token {cause.position} ({token!r}): {labels[0]} forecasts {wanted!r}, {labels[1]} {got!r}, "
        f"{-cause.margin:.3g} logits ahead."
    )
    if not cause.patches:
        return start
    tried = f"{len(cause.patches)} modules tried" + (" so far" if cause.stopped else "")
    if not cause.repairs:
        return f"{start} No single module repairs it ({tried}): the error is spread over many."
    best = cause.repairs[0]
    others = len(cause.repairs) - 1
    more = f", and {others} other{'s' * (others > 1)} alone would do it too" if others else ""
    return f"{start} With only {best.module} in 16 bit it is {wanted!r} again{more} ({tried})."


def patch_rows(cause: Cause, read: Read) -> list[list[str]]:
    """The table of patches, best first."""
    return [
        [patch.module, f"{patch.margin:+.3f}", repr(read.text_of(patch.token_id)), "yes" if patch.repaired else "no"]
        for patch in cause.patches[:PATCHES]
    ]


def agreement_json(read: Read) -> dict:
    """The keys of `agreement --json`."""
    found, reading, drift = read.agreement, read.reading, read.agreement.drift
    return {
        "kind": "agreement",
        "model": reading.model,
        "device": reading.device,
        "baseline": reading.baseline.label,
        "method": reading.contestant.label,
        "text": reading.text,
        "token_ids": list(found.token_ids),
        "texts": list(read.texts),
        "continuation": found.continuation,
        "mean_kl": found.mean_kl,
        "top1_agreement": found.top1_agreement,
        "perplexities": list(found.perplexities),
        "tokens": [_token_json(read, token) for token in found.tokens],
        "drift": drift
        and {
            "position": drift.position,
            "margins": drift.margins and list(drift.margins),
            "baseline_ids": list(drift.baseline_ids),
            "other_ids": list(drift.other_ids),
        },
    }


def _token_json(read: Read, token: TokenAgreement) -> dict:
    lists = {
        name: [{"text": read.text_of(g.token_id), "token_id": g.token_id, "probability": g.probability} for g in side]
        for name, side in (("baseline", token.baseline), ("other", token.other))
    }
    return {
        "position": token.position,
        "token_id": token.token_id,
        "text": read.texts[token.position],
        "kl": token.kl,
        "rank": token.rank,
        "logprobs": list(token.logprobs),
        **lists,
    }


def cause_json(cause: Cause, read: Read) -> dict:
    """The keys of `explain-token --json`."""
    return {
        "kind": "cause",
        "model": read.reading.model,
        "device": read.reading.device,
        "baseline": read.reading.baseline.label,
        "method": read.reading.contestant.label,
        "token_ids": list(read.agreement.token_ids),
        "position": cause.position,
        "text": read.texts[cause.position],
        "baseline_token": {"token_id": cause.baseline_token, "text": read.text_of(cause.baseline_token)},
        "other_token": {"token_id": cause.other_token, "text": read.text_of(cause.other_token)},
        "margin": cause.margin,
        "stopped": cause.stopped,
        "layers": [
            {
                "layer": entry.layer,
                "relative_error": entry.relative,
                "sqnr_db": entry.sqnr_db,
                "outlier_count": entry.outlier_count,
                "strongest": [
                    {"input_of": kind, "channel": channel, "absmax": value} for kind, channel, value in entry.outliers
                ],
            }
            for entry in cause.layers
        ],
        "patches": [
            {
                "module": patch.module,
                "margin": patch.margin,
                "token": read.text_of(patch.token_id),
                "repaired": patch.repaired,
            }
            for patch in cause.patches
        ],
        "repairs": [patch.module for patch in cause.repairs],
    }
