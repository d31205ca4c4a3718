"""The words that a newcomer may not know, each explained where it stands: one line a word, for the whole page.

`words.js` finds them in whatever the page shows, paragraphs, captions, headers and labels alike, underlines the first
use of each in its paragraph or table, and shows `TERMS`' line while a word is pointed at, touched or has the focus. A
word inside a picture stands again in its caption (`spoken_in`). No gradio.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# What the kinds of linear layer do, by the name they have here.
KINDS = {
    "q/k/v": "Three layers with one input. They make what attention asks (queries), offers (keys) and passes on "
    "(values).",
    "o": "The layer that brings what attention gathered back into the residual stream.",
    "gate/up": "The first half of the feed-forward part: from the residual stream into a wider list.",
    "down": "The second half of the feed-forward part: from the wide list back into the residual stream. Its input has "
    "the largest numbers.",
}
TERMS = {
    "token": "A piece of text, often a word or a part of one: what a language model reads and writes.",
    "prefill": "The model reads the whole prompt at once, before it writes anything.",
    "decode": "The model writes one token after the other, and reads what it wrote each time.",
    "first token": "The time from the prompt to the first token: the model reads the prompt (prefill) and writes once.",
    "perplexity": "How surprised a model is by a text: 1 is never, 17 is as if it hesitated between 17 tokens each "
    "time. Lower is better.",
    "KL": "Kullback–Leibler divergence, in nats: how far two models' odds for the next token lie apart. 0 is the same "
    "odds.",
    "nat": "A unit of information: 1 nat is 1.44 bits. An answer twice as unlikely has 0.69 nats more.",
    "log-probability": "The logarithm of how likely a text is; 0 is certain, and more negative is less likely.",
    "first choice": "The token that a model finds likeliest.",
    "top-1 agreement": "At how many tokens two models have the same first choice.",
    "SQNR": "Signal to quantization noise, in decibels: how much larger the numbers are than the error of rounding "
    "them. 10 dB more is a tenth of the noise.",
    "dB": "Decibel: 10 dB is a ratio of 10 in power, 20 dB one of 100.",
    "absmax": "One scale, set by the largest number: that one becomes 127, and all others share the steps below it.",
    "quantize": "To round numbers to a few codes and a scale, so that they take less memory.",
    "outlier": "A number many times larger than the rest. A scale that reaches it leaves the others few of the 256 "
    "steps of 8 bit.",
    "outlier feature": "A channel whose numbers are outliers in many layers and at many tokens.",
    "massive activation": "A single number thousands of times larger than the rest, often at the first token.",
    "channel": "One place in the list of numbers that a layer reads for each token; a column of its input.",
    "activation": "A number that is computed while the model reads or writes, unlike a weight, which is learnt.",
    "threshold": "From this size on a number counts as an outlier, and its whole column stays in 16 bit.",
    "residual stream": "The list of numbers for a token that every layer reads and adds its own result to.",
    "norm": "The step in front of a layer that brings its numbers to a common size.",
    "module": "One linear layer: a matrix of weights that its input is multiplied by. Seven make up a LLaMA's layer.",
    "attention": "The part of a layer in which a token looks at all tokens before it.",
    "softmax": "Turns scores into shares that are positive and add up to 1.",
    "logit": "The score of each possible next token, before scores become odds.",
    "FP16": "Numbers of 16 bit with a floating point: two bytes each. How a model usually comes.",
    "BF16": "Numbers of 16 bit with a floating point that reach as far as those of 32 bit, with fewer digits.",
    "FP32": "Numbers of 32 bit with a floating point: four bytes each.",
    "int8": "Whole numbers from −127 to 127: one byte each. A scale, as a rule one for each row, says what they stand "
    "for.",
    "weight": "A number that the model learnt. A model is its weights: millions or billions of them.",
    "tensor": "A table of numbers: a layer's weights, or what it reads.",
    "embedding": "The table that turns each token into the list of numbers that the layers work on.",
    "KV cache": "What the model keeps of every token it has read, keys and values, so as not to read it again. It "
    "grows with the text.",
    "GQA": "Grouped-query attention: several heads of attention share one set of keys and values, so that the KV cache "
    "is smaller.",
    "HBM": "The large memory of a GPU, where weights and KV cache are.",
    "VRAM": "The memory of a graphics card.",
    "workspace": "Memory for results on the way through a layer, free again afterwards.",
    "peak memory": "The most that one method held at a time: weights, KV cache and, on a GPU, workspace.",
    "context": "How many tokens the model has before it at once: the prompt and its own answer.",
    "batch": "How many texts are worked on at once.",
    "kernel": "One piece of work as it is given to a GPU or CPU, such as a matrix product.",
    "tok/s": "Tokens per second. Each token is timed by itself, and reading the prompt is left out.",
    "lean loop": "Our own program for LLaMA models, without transformers: less is done around each product.",
    "GFLOP": "A billion operations on floating-point numbers: multiplications and additions.",
    "spread": "How far the slowest and the fastest repeat lie apart, as a share of the median.",
    "calibrate": "To run the model over a short text first, and to choose scales by what its layers read there.",
    "emulated": "Rounded as the method says but multiplied in FP32: the error is real, the speed is not.",
    "coverage": "Which part of the weights the method really keeps in 8 bit. The rest stays as it was.",
    **{f"input of {kind}": says for kind, says in KINDS.items()},
}
# A part of a name, as in LLM.int8() and bnb-int8, is no word.
WORD = rf"(?<![\w.-])({'|'.join(re.escape(name) for name in sorted(TERMS, key=len, reverse=True))})(?:s|d)?(?![\w-])"
_ANY = re.compile(WORD, re.IGNORECASE)


def spoken_in(pictured: Iterable[str], beside: str) -> list[str]:
    """The known words, as they stand in TERMS, of the texts of a picture that its caption `beside` does not have."""
    said, seen = ([word.lower() for word in _ANY.findall(text)] for text in (beside, " | ".join(pictured)))
    return [name for name in TERMS if name.lower() in seen and name.lower() not in said]


def term(shown: str, says: str) -> str:
    """Markup: `shown`, which is explained by `says` and not by a line of TERMS."""
    return f'<span class="llmq-term" tabindex="0" data-says="{html.escape(says)}">{html.escape(shown)}</span>'


def explained(text: str) -> str:
    """Markup of plain paragraphs; `**so**` is strong, and what stands between backticks is code."""
    strong = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text, quote=False))
    marked = re.sub("`(.+?)`", r"<code>\1</code>", strong)
    return "".join(f'<p class="llmq-explained">{paragraph}</p>' for paragraph in marked.split("\n\n"))


def kinds_explained() -> str:
    """Markup: every kind of linear layer, explained."""
    return f'<p class="llmq-explained llmq-kinds">{" · ".join(term(kind, says) for kind, says in KINDS.items())}</p>'
