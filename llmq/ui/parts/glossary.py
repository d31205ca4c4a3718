"""The words that a newcomer may not know, and text in which they are explained on hover and on focus. No gradio."""

from __future__ import annotations

import html
import re

TERMS = {
    "token": "A piece of text, often a word or a part of one: what a language model reads and writes.",
    "prefill": "The model reads the whole prompt at once, before it writes anything.",
    "decode": "The model writes one token after the other, each time reading what it wrote before.",
    "perplexity": "How surprised a model is by a text: 1 is never, 17 is as if it hesitated between 17 tokens each "
    "time. Lower is better.",
    "KL": "Kullback–Leibler divergence, in nats: how far the odds that two models give the next token lie apart. 0 is "
    "the same odds.",
    "SQNR": "Signal to quantization noise, in decibels: how much larger the numbers are than the error of rounding "
    "them. 10 dB more is a tenth of the noise.",
    "outlier": "A number many times larger than the rest. One scale for all would have to reach it, which leaves the "
    "others few of the 256 steps of 8 bit.",
    "outlier feature": "A channel whose numbers are outliers in many layers and at many tokens.",
    "channel": "One of the places in the list of numbers that a layer reads for each token; a column of its input.",
    "threshold": "From this size on a number counts as an outlier, and its whole column stays in 16 bit.",
    "residual stream": "The list of numbers for a token that every layer reads and adds its own result to.",
    "norm": "The step in front of a layer that brings its numbers to a common size.",
    "logit": "What a model gives each possible next token before they become odds.",
    "FP16": "Numbers of 16 bit with a floating point: two bytes each. How a model usually comes.",
    "BF16": "Numbers of 16 bit with a floating point that reach as far as those of 32 bit, with fewer digits.",
    "FP32": "Numbers of 32 bit with a floating point: four bytes each.",
    "int8": "Whole numbers from −127 to 127: one byte each. A scale for each row says what they stand for.",
    "weight": "A number that the model learnt. A model is its weights: millions or billions of them.",
    "embedding": "The table that turns each token into the list of numbers that the layers work on.",
    "KV cache": "What the model keeps of every token it has read, keys and values, so as not to read it again. It "
    "grows with the text.",
    "workspace": "Memory for results on the way through a layer, free again afterwards.",
    "peak memory": "The most that one method held at a time: weights, KV cache and, on a GPU, workspace.",
    "tok/s": "Tokens per second. Each token is timed by itself, and reading the prompt is left out.",
    "coverage": "Which part of the weights the method really keeps in 8 bit. The rest stays as it was.",
}
# What the kinds of linear layer do, by the name they have here.
KINDS = {
    "q/k/v": "What attention asks, offers and passes on: queries, keys and values, made of one input.",
    "o": "Brings what attention gathered back into the residual stream.",
    "gate/up": "The first half of the feed-forward part: from the residual stream into a wider list.",
    "down": "The second half: from the wide list back into the residual stream. Its input has the largest numbers.",
}
_NAMES = {name.lower(): name for name in TERMS}
# A part of a name, as in LLM.int8() and bnb-int8, is no word.
_ANY = re.compile(
    rf"(?<![\w.-])({'|'.join(re.escape(name) for name in sorted(TERMS, key=len, reverse=True))})(s?)\b", re.IGNORECASE
)
Piece = str | list[str]  # text, or a word as it stands there and its name among the terms


def term(shown: str, says: str) -> str:
    """Markup: `shown`, with `says` below it while it is pointed at or has the focus."""
    return (
        f'<span class="llmq-term" tabindex="0">{html.escape(shown)}'
        f'<span class="llmq-says" role="tooltip">{html.escape(says)}</span></span>'
    )


def with_terms(text: str) -> list[Piece]:
    """A text cut where the first use of each known word is, which comes with its name."""
    found, seen, end = [], set(), 0
    for match in _ANY.finditer(text):
        if (name := match[1].lower()) not in seen:
            seen.add(name)
            found += [text[end : match.start()], [match[0], _NAMES[name]]]
            end = match.end()
    return [piece for piece in (*found, text[end:]) if piece]


def explained(text: str) -> str:
    """Markup of a plain paragraph in which the first use of each known word is explained; `**so**` is strong."""
    marked = "".join(
        html.escape(piece, quote=False) if isinstance(piece, str) else term(piece[0], TERMS[piece[1]])
        for piece in with_terms(text)
    )
    strong = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", marked)
    return f'<p class="llmq-explained">{strong}</p>'


def kinds_explained() -> str:
    """Markup: every kind of linear layer, explained."""
    return f'<p class="llmq-explained llmq-kinds">{" · ".join(term(kind, says) for kind, says in KINDS.items())}</p>'
