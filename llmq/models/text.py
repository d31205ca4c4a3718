"""Tokens in, readable text out: the chat template on one side, streaming across multi-byte characters on the other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llmq.errors import BadChoice, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ONE_BYTE = re.compile("<0x[0-9A-F]{2}>")
_INCOMPLETE = "\ufffd"  # what a decoder shows for the first bytes of a character whose rest is still to come


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, context: int) -> list[int]:
    """Return token ids of `prompt` as the user's turn of the model's chat template (plain text where it has none).

    Raises BadChoice for an empty prompt, for one that leaves no room in a context of `context` tokens, and for a
    template that cannot be used.
    """
    require_text(prompt, "prompt", "type something, or pick an example")
    if tokenizer.chat_template:
        ids = tokenizer(_in_template(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise BadChoice(f"the model's tokenizer makes no token of the prompt {prompt!r:.80}; write something else")
    if len(ids) >= context:
        length = f"{len(ids):,} tokens long" + (" with its chat template" if tokenizer.chat_template else "")
        raise BadChoice(
            f"the prompt is {length}, and this model reads {context:,}; "
            "shorten the prompt or choose a model with a longer context"
        )
    return ids


def require_text(text: str, name: str, advice: str) -> None:
    """Raises BadChoice for what no tokenizer can take; it calls it `name`, and gives `advice` where it is empty."""
    if not isinstance(text, str) or not text.strip():
        raise BadChoice(f"the {name} is empty; {advice}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadChoice(f"the {name} holds half a character (a lone surrogate); type it again") from None


def _in_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The user's turn as the template writes it. Raises BadChoice where it fails or leaves the prompt out."""
    template, reason = tokenizer.chat_template, ""
    if isinstance(template, dict) and "default" not in template:
        reason = f"it is one of several ({', '.join(template)}), and none of them is the default"
    for content in (prompt, [{"type": "text", "text": prompt}]):  # some templates read a list of parts
        turns = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program: it may raise anything
            reason = reason or first_line(error)
        else:
            if prompt.strip() in text:
                return text
    raise BadChoice(
        "the model's chat template cannot be used; choose another model, or remove `chat_template` from its folder: "
        f"prompts are then read as plain text ({reason or 'it leaves the prompt out'})"
    )


def as_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The ids of a prompt as the text of which a tokenizer makes them; a token that it puts in front by itself is none
    of it."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    begins = tokenizer.bos_token or ""
    adds = begins and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(begins) if adds else text


def one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of the token that `text` is; None where it is several or none, or where the tokenizer keeps no account of
    every byte, so that one text may be two tokens (a word with and without a space before it)."""
    if "ByteLevel" not in type(getattr(tokenizer.backend_tokenizer, "decoder", None)).__name__:
        return None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None


class TextStream:
    """Turns a growing list of token ids into text that only ever grows.

    The pieces joined, with `flush()` at the end, are exactly the decoding of all ids at once, whatever the ids. A later
    token changes what was decoded before in two ways, and text waits for both. A byte-level token may end in the middle
    of a character: its bytes wait until the character is whole. A vocabulary with byte fallback spells what it lacks in
    tokens of one byte: a run of them decodes as a whole, and one byte too many or too few turns each of its bytes into
    a replacement mark. So a run waits until another token ends it, and no part of it could be shown earlier.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # first id still decoded for context: some tokenizers drop a leading space
        self._shown = 0  # ids whose text has been given out
        self._in_bytes = False  # whether a run of byte tokens may go on

    def push(self, token_id: int) -> str:
        """Return the text that became readable with this token; empty while a character is incomplete."""
        self._ids.append(token_id)
        if _ONE_BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token_id) or ""):
            self._in_bytes = True
        elif self._in_bytes:  # a special token is no text and ends no run; nor would a leading space alone be any
            self._in_bytes = not self._decode([token_id, token_id])
        return "" if self._in_bytes else self._take(final=False)

    def flush(self) -> str:
        """Return the text that is left when no more tokens come."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        if not final and now.endswith(_INCOMPLETE):
            return ""
        if len(now) > len(before):
            self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
