"""What goes to a server of the OpenAI protocol, and what comes back: plain records, whatever carries them.

Everything that comes from a server is checked here: its kinds of values first, then its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmq.errors import BadChoice, UserError
from llmq.files import parse_json
from llmq.servers.dialects import PROMPT_LOGPROBS, Dialect

DONE = "[DONE]"
ENDS = {"stop": "eos", "length": "length"}
MOST_WORDS = 200  # characters of what a server says that are shown


class Broken(UserError):
    """A server's answer cannot be read, or ended before its end; what had come stays."""


class Refused(UserError):
    """The server answers with an error: its `status` of HTTP."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """Nobody wants the answer any more."""


@dataclass(frozen=True)
class Request:
    """One answer to ask for. `prompt`: a message of a user, to which the server's template is applied, or, `raw`, a
    text or the ids of a text as it is to be read. `temperature` 0 is greedy. `likeliest`: log-probabilities of so many
    tokens at each place."""

    prompt: str | Sequence[int]
    raw: bool = False
    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    likeliest: int = 0

    @property
    def path(self) -> str:
        return "/completions" if self.raw else "/chat/completions"

    def body(self, dialect: Dialect, model: str) -> dict[str, Any]:
        """The JSON object to send. Raises BadChoice for what this kind of server cannot do."""
        if self.top_k and not dialect.top_k:
            raise BadChoice(f"{dialect.title} takes no top-k; choose 0")
        prompt = {"prompt": self.prompt} if self.raw else {"messages": [{"role": "user", "content": self.prompt}]}
        body = {"model": model, **prompt, "max_tokens": self.max_tokens, "temperature": self.temperature}
        body |= {"stream": True, "stream_options": {"include_usage": True}, **dialect.own}
        if self.temperature:
            body |= {"seed": self.seed, "top_p": self.top_p} | ({"top_k": self.top_k} if self.top_k else {})
        if count := min(self.likeliest, dialect.most_likeliest):
            body |= {"logprobs": count} if self.raw else {"logprobs": True, "top_logprobs": count}
        return body


@dataclass(frozen=True)
class Reading:
    """A text to read, of which the server tells the log-probabilities: itself, or its ids where a server takes these.
    One token is asked for after it, as some servers write one at least."""

    text: str | Sequence[int]
    likeliest: int
    path: ClassVar[str] = "/completions"

    def body(self, dialect: Dialect, model: str) -> dict[str, Any]:
        """As of a Request."""
        if not dialect.reads:
            raise BadChoice(f"{dialect.title} tells no log-probabilities of what it reads; let it answer")
        body = {"model": model, "prompt": self.text, "max_tokens": 1, "temperature": 0, **dialect.own}
        if dialect.reads == PROMPT_LOGPROBS:
            return body | {PROMPT_LOGPROBS: self.likeliest}
        return body | {"echo": True, "logprobs": min(self.likeliest, dialect.most_likeliest)}


@dataclass(frozen=True)
class Told:
    """One token as a server tells it: its bytes, the natural log of its probability, and the likeliest at its place, by
    their bytes or, where the server tells these, by their ids."""

    data: bytes
    logprob: float
    likeliest: tuple[tuple[bytes | int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens, as the server counted them."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Piece:
    """One event of a stream: the `text` it adds, the tokens and the ids behind that where they are told, `end` ('eos',
    'length' or the server's word) with the last text, and the usage."""

    text: str = ""
    tokens: tuple[Told, ...] = ()
    ids: tuple[int, ...] = ()
    offset: int | None = None
    end: str = ""
    usage: Usage | None = None


@dataclass(frozen=True)
class Arrived:
    """A piece, and the seconds from the request to it."""

    piece: Piece
    seconds: float


def piece_of(data: str) -> Piece:
    """Read one event. Raises Broken for what is no event of the protocol, UserError with the server's own words where
    it is an error."""
    try:
        event = parse_json(data)
    except ValueError as error:
        raise Broken(f"the server sent an event that is not JSON: {error}") from None
    if isinstance(event, dict) and event.get("error"):
        raise UserError(f"the server says: {words_of(event)}")
    try:
        return _piece(event)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Broken(f"the server sent an event that is none of the protocol: {data[:80]!r}") from error


def _piece(event: Mapping) -> Piece:
    usage = _usage(event)
    choices = event["choices"] if "choices" in event or not usage else []
    if not choices:
        return Piece(usage=usage)
    if len(choices) > 1 or choices[0].get("index", 0) != 0:
        raise Broken("the server writes several texts where one was asked for")
    (choice,) = choices
    told = choice.get("logprobs") or {}
    if "delta" in choice:
        delta = choice["delta"] or {}
        text = _text(delta.get("reasoning_content")) + _text(delta.get("content"))
        tokens, offset = tuple(map(_chat_token, told.get("content") or ())), None
    else:
        text, tokens = _text(choice["text"]), _completion_tokens(told)
        offset = next(iter(told.get("text_offset") or ()), None)
    ids = tuple(map(_count, choice.get("token_ids") or ()))
    end = choice.get("finish_reason") or ""
    return Piece(text, tokens, ids, offset, ENDS.get(end, _text(end)), usage)


def _usage(event: Mapping) -> Usage | None:
    used = event.get("usage")
    return Usage(_count(used["prompt_tokens"]), _count(used["completion_tokens"])) if used else None


def _chat_token(found: Mapping) -> Told:
    return Told(_bytes(found), _log(found["logprob"]), tuple(map(_likely, found.get("top_logprobs") or ())))


def _likely(found: Mapping) -> tuple[bytes, float]:
    return _bytes(found), _log(found["logprob"])


def _bytes(found: Mapping) -> bytes:
    given = found.get("bytes")
    return bytes(given) if given is not None else _text(found["token"]).encode()


def _completion_tokens(told: Mapping) -> tuple[Told, ...]:
    """The older form: lists that run beside each other."""
    names, values = told.get("tokens") or (), told.get("token_logprobs") or ()
    tops = told.get("top_logprobs") or [None] * len(names)
    return tuple(
        Told(_text(name).encode(), _log(value), tuple((_text(n).encode(), _log(v)) for n, v in (top or {}).items()))
        for name, value, top in zip(names, values, tops, strict=True)
    )


def read_by(data: str, ids: Sequence[int]) -> tuple[tuple[Told | None, ...], Usage | None]:
    """What a server tells of a text that it read, a Told for each of `ids`, and its own count; of the first token it
    tells nothing. Raises Broken where this is no such answer, or one of another number of tokens."""
    try:
        answer = parse_json(data)
        (choice,) = answer["choices"]
        usage = _usage(answer)
        if (listed := choice.get(PROMPT_LOGPROBS)) is not None:
            return _by_ids(listed, ids), usage
        told = {name: choice["logprobs"][name] for name in ("tokens", "token_logprobs", "top_logprobs")}
        known = len(told["tokens"])
        if told["token_logprobs"][0] is not None:
            raise ValueError("a first token comes after nothing")
        places = (None, *_completion_tokens({name: values[1:] for name, values in told.items()}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Broken(f"the server tells no log-probabilities of what it read: {data[:80]!r}") from error
    if not len(ids) <= known <= len(ids) + 1:
        raise Broken(f"the server read {known} tokens where {len(ids)} were sent")
    return places[: len(ids)], usage


def _by_ids(listed: Sequence[Mapping | None], ids: Sequence[int]) -> tuple[Told | None, ...]:
    if len(listed) != len(ids):
        raise Broken(f"the server read {len(listed)} tokens where {len(ids)} were sent")
    found: list[Told | None] = []
    for token_id, place in zip(ids, listed, strict=True):
        if place is None:
            found.append(None)
            continue
        own = place[str(token_id)]
        likeliest = tuple((int(key), _log(entry["logprob"])) for key, entry in place.items())
        found.append(Told(_text(own.get("decoded_token")).encode(), _log(own["logprob"]), likeliest))
    return tuple(found)


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError(value)
    return value or ""


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise TypeError(value)
    return value


def _log(value: Any) -> float:
    if type(value) not in (int, float) or not value <= 1e-3:
        raise TypeError(value)
    return min(float(value), 0.0)


def models_of(text: str) -> tuple[str, ...]:
    """The models that a server lists. Raises Broken where that is no list of models."""
    try:
        return tuple(_text(entry["id"]) for entry in parse_json(text)["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise Broken("what it answers to /models is no list of models") from error


def words_of(answer: Any) -> str:
    """What an error says, in one short line: servers keep it in different places."""
    while isinstance(answer, dict):
        answer = next((answer[name] for name in ("error", "message", "detail") if answer.get(name)), "no reason given")
    return " ".join(str(answer).split())[:MOST_WORDS]
