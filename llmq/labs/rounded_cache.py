"""A KV cache in 8 bit: half of the memory, and what rounding keys and values costs in quality.

Absmax for each token and head, as weights are rounded row by row. How a token is rounded depends on no other, so a text
read in one call gives what it gives a token at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmq.formatting import format_bytes
from llmq.labs.rows import BASELINE, SCORES, RowLab, Rows, Workbench, share_of


@dataclass(frozen=True, kw_only=True)
class RoundedCache(RowLab):
    """The text read with keys and values in FP16, then in int8; the weights stay in FP16."""

    kind, command, part = "rounded-cache", ("experiment", "rounded-cache"), "Attention"
    title = "The KV cache in 8 bit"
    about = (
        "The KV cache is rounded to int8 as it is written, with one scale for each token and head. How much memory "
        "does that save, and how far do the odds of the next token move (KL)? The weights stay in FP16."
    )
    columns = {
        "Keys and values": "{cache}",
        "Bytes a token": lambda row: format_bytes(row["kv_bytes_per_token"]),
        **SCORES,
        "Same first choice": share_of("top1_agreement"),
    }

    def measure(self, bench: Workbench) -> Rows:
        from llmq.inspect.rounded_cache import CACHES, read_with

        truth = None
        with bench.engine(BASELINE, loop="hf") as engine:
            for number, (name, layer) in enumerate(CACHES.items()):
                logits, kept = [], 0
                for place, ids in enumerate(bench.texts):
                    done = (number + place / len(bench.texts)) / len(CACHES)
                    yield bench.progress(f"{name}: window {place + 1} of {len(bench.texts)}", done)
                    found, size = read_with(engine, ids, layer)
                    logits, kept = [*logits, found], kept + size
                truth = truth or logits
                per_token = kept / sum(map(len, bench.texts))
                yield {"cache": name, "kv_bytes_per_token": per_token} | bench.score(logits, truth)

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        if len(rows) < 2:
            return ""
        full, small = (row["kv_bytes_per_token"] for row in rows)
        return (
            f"In int8 a token takes {format_bytes(small)} instead of {format_bytes(full)}, **{small / full:.0%}**; KL "
            f"to the cache in FP16 is {rows[1]['kl_to_fp16']:.3g} nats."
        )
