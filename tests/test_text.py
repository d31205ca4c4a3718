"""Text that only grows and is exactly the decoding; prompts that are refused before anything is loaded."""

from __future__ import annotations

import itertools
import random

import pytest
from conftest import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from llmq.errors import BadChoice, UserError
from llmq.models.text import TextStream, encode_prompt

REPLACEMENT = "\ufffd"
TEXTS = [
    "plain words, and more",
    "Ça a été naïf, où ça ?",
    "日本語 한국어 中文",
    "👩‍👩‍👧‍👦 🇫🇷 e\u0301 🏳️‍🌈",
    " leading\n\n\ttabs\r\n and trailing ",
    "<script>alert('x')</script> & <b>",
    "a",
]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def byte_level():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def byte_fallback():
    """Like LLaMA-2's: '▁' for a space, a leading one dropped when decoding, bytes for what has no token of its own."""
    letters = sorted({c for c in "".join(TEXTS) if c.isascii() and not c.isspace()}) + ["▁"]
    symbols = [f"<0x{i:02X}>" for i in range(256)] + letters
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    return made


def symbols_of_bytes() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes: itself where one is printable, else 256 upwards in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


SYMBOLS = symbols_of_bytes()


def ids_of(tokenizer, data: bytes) -> list[int]:
    return tokenizer.convert_tokens_to_ids([SYMBOLS[byte] for byte in data])


def streamed(tokenizer, ids) -> tuple[list[str], str]:
    stream = TextStream(tokenizer)
    return [stream.push(i) for i in ids], stream.flush()


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def last_run(ids) -> list[int]:
    """The byte tokens at the end; with byte fallback they are the ids below 256."""
    run = itertools.takewhile(lambda token_id: token_id < 256, reversed(ids))
    return list(run)[::-1]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_pieces_join_to_the_text_and_never_show_half_a_character(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == text == decoded(tokenizer, ids)
    assert rest == (decoded(tokenizer, last_run(ids)) if kind == "byte_fallback" else "")
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("character", ["é", "日", "👩"])
def test_a_character_appears_whole_with_its_last_byte(character, byte_level):
    data = character.encode()
    assert streamed(byte_level, ids_of(byte_level, data)) == ([""] * (len(data) - 1) + [character], "")


@pytest.mark.parametrize("cut", range(1, len("aé日👩".encode())))
def test_a_text_cut_inside_a_character_is_flushed_as_it_decodes(cut, byte_level):
    ids = ids_of(byte_level, "aé日👩".encode()[:cut])
    pieces, rest = streamed(byte_level, ids)
    assert "".join(pieces) + rest == decoded(byte_level, ids)
    assert REPLACEMENT not in "".join(pieces)


@pytest.mark.parametrize(
    "data", [b"\xc3A", b"\xff\xfe ok", b"\xe6\x97A\xa5", b"\x80\x80\x80", b"\xf0\x9f\xc3\xa9!", b""]
)
def test_broken_bytes_stream_as_they_decode(data, byte_level):
    ids = ids_of(byte_level, data)
    pieces, rest = streamed(byte_level, ids)
    assert "".join(pieces) + rest == decoded(byte_level, ids)


def test_any_bytes_stream_as_they_decode(byte_level):
    noise = random.Random(0)
    for _ in range(150):
        data = b"".join(
            noise.choice([b"a", "é".encode(), "👩".encode(), bytes([noise.randrange(256)])]) for _ in range(12)
        )
        ids = ids_of(byte_level, data)
        pieces, rest = streamed(byte_level, ids)
        assert "".join(pieces) + rest == decoded(byte_level, ids), data


@pytest.mark.parametrize("cut", range(1, len("aé日👩".encode()) + 1))
def test_with_byte_fallback_too_a_cut_text_is_what_it_decodes_to(cut, byte_fallback):
    ids = byte_fallback("aé日👩", add_special_tokens=False)["input_ids"][: cut + 1]
    pieces, rest = streamed(byte_fallback, ids)
    assert "".join(pieces) + rest == decoded(byte_fallback, ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_any_ids_stream_as_they_decode_and_nothing_waits_that_need_not(kind, request):
    """Bytes of characters, other bytes, letters, spaces and special tokens in any order."""
    tokenizer, noise = request.getfixturevalue(kind), random.Random(1)
    chunks = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("é", "👩", "a", " ", "b c")]
    chunks += [[token_id] for token_id in range(len(tokenizer))]
    for _ in range(400):
        ids = list(itertools.chain(*(noise.choice(chunks[: noise.choice([5, None])]) for _ in range(12))))
        stream, shown = TextStream(tokenizer), ""
        for count, token_id in enumerate(ids, 1):
            shown += stream.push(token_id)
            text = decoded(tokenizer, ids[:count])
            assert text.startswith(shown), ids
            special = token_id in tokenizer.all_special_ids
            in_bytes = kind == "byte_fallback" and token_id < 256
            assert shown == text or text.endswith(REPLACEMENT) or special or in_bytes, ids
        assert shown + stream.flush() == decoded(tokenizer, ids), ids


def test_special_tokens_are_no_text_and_interrupt_none(byte_level):
    first, second = ids_of(byte_level, "é".encode())
    ids = [256, *ids_of(byte_level, b"a"), first, second, 257, *ids_of(byte_level, b"b")]
    pieces, rest = streamed(byte_level, ids)
    assert ("".join(pieces), rest) == ("aéb", "")


def test_flush_gives_the_rest_once(byte_level):
    stream = TextStream(byte_level)
    assert stream.push(ids_of(byte_level, "é".encode())[0]) == ""
    assert (stream.flush(), stream.flush()) == (REPLACEMENT, "")


@pytest.mark.parametrize("prompt", ["", " ", "\n\t\r ", "\u2003", None, 5, ["hi"]])
def test_an_empty_prompt_is_refused(prompt, byte_level):
    with pytest.raises(BadChoice, match="the prompt is empty"):
        encode_prompt(byte_level, prompt, context=128)


@pytest.mark.parametrize("prompt", ["a\udcffb", "\ud83d"], ids=["byte of a terminal", "half an emoji"])
def test_a_prompt_that_is_no_text_is_refused(prompt, byte_level):
    """A terminal hands undecodable bytes over as lone surrogates; no tokenizer takes them."""
    with pytest.raises(BadChoice):
        encode_prompt(byte_level, prompt, context=128)


@pytest.mark.parametrize(("length", "context"), [(128, 128), (1500, 1024), (5, 1)])
def test_a_prompt_that_leaves_no_room_names_both_token_counts(length, context, byte_level):
    with pytest.raises(BadChoice, match=f"is {length:,} tokens long, and this model reads {context:,};"):
        encode_prompt(byte_level, "x" * length, context=context)


def test_a_prompt_may_fill_all_but_one_token(byte_level):
    assert len(encode_prompt(byte_level, "x" * 127, context=128)) == 127


@pytest.mark.parametrize("prompt", TEXTS)
def test_without_a_chat_template_the_prompt_is_fed_as_it_is(prompt, byte_level):
    assert encode_prompt(byte_level, prompt, context=128) == ids_of(byte_level, prompt.encode())


def test_a_chat_template_is_used_once_where_there_is_one():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = encode_prompt(tokenizer, "Hi <b>&amp;", context=128)
    assert tokenizer.decode(ids) == "[user]Hi <b>&amp;>"


def test_the_template_counts_towards_the_context():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(BadChoice, match="is 17 tokens long with its chat template.* reads 17;"):
        encode_prompt(tokenizer, "x" * 10, context=17)
    assert len(encode_prompt(tokenizer, "x" * 10, context=18)) == 17


def test_a_template_that_refuses_the_prompt_says_so():
    """A base model's template may raise; that is the model's fault, told in words."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only tools may speak') }}"
    with pytest.raises(UserError, match="only tools may speak"):
        encode_prompt(tokenizer, "Hi", context=128)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 + messages[0]['content'] }}", ["int", "str"]),
        ("{{ 9.0 ** 99999 }}", ["out of range"]),
        ("{{ 1 / 0 }}", ["division by zero"]),
        ("{% for", ["end of template"]),
        ("{{ nothing() }}", ["'nothing' is undefined"]),
        ("{{ raise_exception('') }}", ["TemplateError"]),
        ("{{ raise_exception('first\nsecond') }}", ["first"]),
        ("", None),
        (" ", ["leaves the prompt out"]),
        ("{{ messages[0]['role'] }}", ["leaves the prompt out"]),
        (5, []),
        ({"rag": TEMPLATE, "tool_use": TEMPLATE}, ["rag, tool_use", "default"]),
        ({"default": TEMPLATE, "tool_use": "{{ 1 / 0 }}"}, None),
    ],
)
def test_a_template_that_fails_is_one_line_with_the_way_out(template, words):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if words is None:
        assert encode_prompt(tokenizer, "Hi", context=128)
        return
    with pytest.raises(BadChoice) as caught:
        encode_prompt(tokenizer, "Hi", context=128)
    line = str(caught.value)
    assert line.startswith("the model's chat template cannot be used; choose another model, or remove `chat_template`")
    assert "\n" not in line and [word for word in words if word not in line] == []


class Failing:
    """A tokenizer whose template raises `error`."""

    chat_template = "any"

    def __init__(self, error):
        self.error = error

    def apply_chat_template(self, *_, **__):
        raise self.error


@pytest.mark.parametrize("error", [AssertionError(), RecursionError("too deep"), MemoryError(), KeyError("role")])
def test_whatever_a_template_raises_is_the_reason(error):
    with pytest.raises(BadChoice, match=f"cannot be used.*({type(error).__name__}|too deep|role)"):
        encode_prompt(Failing(error), "Hi", context=128)


@pytest.mark.parametrize("prompt", ["Hi", " two\nlines ", "Ça 日本"])
def test_a_template_that_reads_a_list_of_parts_gets_one(prompt):
    """Given a text, such a template writes an empty turn and raises nothing."""
    tokenizer = byte_tokenizer()
    parts = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
    tokenizer.chat_template = "[{{ messages[0]['role'] }}]" + parts + ">"
    assert tokenizer.decode(encode_prompt(tokenizer, prompt, context=128)) == f"[user]{prompt}>"


def test_a_prompt_without_a_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(BadChoice, match="makes no token of the prompt"):
        encode_prompt(tokenizer, "xx", context=128)
