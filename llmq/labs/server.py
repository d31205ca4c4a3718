"""How near a server is to the methods here: it writes and they read its text, or both read the same text, and each
place is held against the other.

A server tells the log-probabilities of a few tokens at each place, if of any. The divergence is that of those tokens
one by one and of all others as one: lumping can only hide a difference, so it is a lower bound of the KL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.contestant import Contestant, Contestants, shown_name
from llmq.engine.base import Interrupted
from llmq.engine.choice import choose_engines
from llmq.engine.loading import Key
from llmq.environment import describe
from llmq.errors import BadChoice, UserError
from llmq.events import Event, Progress
from llmq.fields import Choice, Number, Text
from llmq.formatting import MISSING, format_share, quoted
from llmq.labs.compare import SENT
from llmq.labs.held import Held, compared, first_of, named_in, require_in_place, require_same_pieces
from llmq.labs.rows import RowAnswer, Rows, TableLab
from llmq.machine.door import Lease
from llmq.models.opening import Model
from llmq.models.text import as_text, one_token
from llmq.servers.protocol import Reading, Refused, Request, Told, Usage
from llmq.servers.served import OneServer, Served

if TYPE_CHECKING:
    from llmq.servers.connection import Connection

POLL_SECONDS = 0.1  # between two looks at what has arrived
LIKELIEST = 20  # tokens at a place, of a server that tells so many
WISHES_REFUSED = (400, 422, 500, 501)  # what servers answer that cannot tell log-probabilities
READ = ("answer", "text")
EXAMPLE = "Name three colours and say where each is seen."


@dataclass(frozen=True)
class Written:
    """What a server wrote: its text, the tokens where it tells them, and its count of the prompt's and of these."""

    text: str
    tokens: tuple[Told, ...]
    usage: Usage | None


@dataclass(frozen=True, kw_only=True)
class ServerLab(TableLab):
    """`contestants` read what `server` answers to `prompt` in up to `tokens` tokens."""

    kind, command, part = "server", ("server",), "Server"
    title, button = "Which method here is a server nearest to?", "Ask the server"
    about = (
        "A server answers greedily, and every method here reads its answer; or it reads a text as they do. Where the "
        "server tells log-probabilities, KL says how far each method's are from them; otherwise the first choices are "
        "compared. Both have to run the same model."
    )
    explained = (
        "**KL, at least.** Of the tokens that the server names at a place each counts by itself, and all others "
        "together as one: so the figure is never more than the whole KL (method to server, nats for a token). "
        "**Chosen token.** How far the log-probabilities of the token that was written lie apart, on average."
    )
    example, prompted = EXAMPLE, "What the server answers, or reads."
    server: Annotated[Served, OneServer(label="Server")] = Served.parse("openai@http://localhost:8000/v1")
    prompt: Annotated[str, Text(help=f"what it answers or reads; default: {EXAMPLE}", flag="--prompt")] = ""
    contestants: Annotated[tuple[Contestant, ...], Contestants(label="Methods", help="that read it, with commas")] = (
        Contestant.parse_all("fp16,llm-int8")
    )
    tokens: Annotated[
        int, Number(2, 512, whole=True, help="of the answer or text", label="Tokens", shown=256, step=1)
    ] = 64
    sent: Annotated[
        str, Choice(SENT, ("as a message", "as the text read here"), help="messages or text", label="The prompt goes")
    ] = SENT[0]
    read: Annotated[
        str,
        Choice(READ, ("the server's answer", "the prompt, as a text"), help="answer, or text: the prompt itself",
               label="Both read"),
    ] = READ[0]  # fmt: skip
    columns = {
        "Method": lambda row: shown_name(row["method"]),
        "KL, at least": lambda row: _shown(row["kl_lower_bound"], "{:.3g}"),
        "Same first choice": lambda row: _shown_agreement(row),
        "Chosen token": lambda row: _shown(row["logprob_difference"], "{:.3g} nats"),
        "First other choice": lambda row: _shownfirst_of(row),
    }

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Yield events, progress, and an answer after every method; stopped early, what was measured stays."""
        lease.reach.check(self.server)
        model = yield from lease.open(self.model)
        reads = self.read == "text"
        yield lease.progress(f"{self.server.title} {'reads' if reads else 'writes'}", 0.0)
        held = self._read(lease, model) if reads else self._answered(lease, model)
        asked = {"prompt": self._given, "read": self.read, "sent": "text" if reads else self.sent}
        told = asked | {"server": self.server.label, "likeliest": named_in(held.told)}
        told |= {} if reads else {"answer": held.text, "answer_tokens": len(held.ids)}
        told |= {"command": self.typed()} | describe(self.device, model.source)
        text = f"what {self.server.title} {'read' if reads else 'wrote'}"
        facts = {"text": text, "tokens": len(held.ids)}
        yield from self.gathered(self._rows(lease, model, held), told, lambda rows: facts)

    @property
    def _given(self) -> str:
        return self.prompt.strip() or self.example

    def _answered(self, lease: Lease, model: Model) -> Held:
        """What the server answers."""
        prompt_ids = model.encode(self._given, new_tokens=self.tokens)
        written = self._written(lease, model, prompt_ids)
        ids = _ids_of(written, model)
        self._require_same(written.usage, prompt_ids, "another model or template. Choose the model that it runs, or "
                           "send the text")  # fmt: skip
        return Held(prompt_ids, ids, written.tokens[: len(ids)], written.text)

    def _read(self, lease: Lease, model: Model) -> Held:
        """What the server tells of the prompt as a text, up to `tokens` of it."""
        ids = model.tokenizer(self._given)["input_ids"][: min(self.tokens, model.context)]
        text = as_text(model.tokenizer, ids)
        if len(ids) < 2:
            raise BadChoice("the text is one token, and nothing is told of a first one; give a longer text")
        with closing(self._connected(lease)) as connection:
            reading = Reading(ids if self.server.dialect.ids else text, LIKELIEST)
            places, usage = connection.read(reading, self._name(connection, lease), ids, lease.stop.is_set)
        self._require_same(usage, ids, "another model. Choose the model that it runs")
        told = tuple(place for place in places if place is not None)
        if len(told) != len(ids) - 1 or not all(place.likeliest for place in told):
            raise UserError("the server does not tell the likeliest tokens of what it reads; let it answer")
        require_same_pieces(told, ids[1:], model)
        choices = [first_of(place, model) for place in told]
        require_in_place(choices, ids[1:])
        return Held(ids[:1], ids[1:], told, text, choices)

    def _require_same(self, usage: Usage | None, ids: Sequence[int], why: str) -> None:
        if usage and usage.prompt_tokens != len(ids):
            raise UserError(
                f"the server read {usage.prompt_tokens} tokens of prompt where {self.model} reads {len(ids)}: {why}"
            )

    def _connected(self, lease: Lease) -> Connection:
        from llmq.servers.connection import Connection

        return Connection(self.server, lease.reach)

    def _name(self, connection: Connection, lease: Lease) -> str:
        """Of the model that is asked."""
        return self.server.model or self.server.only_one(connection.models(lease.stop.is_set))

    def _written(self, lease: Lease, model: Model, prompt_ids: list[int]) -> Written:
        prompt, raw = self._given, self.sent == "text"
        if raw:
            prompt = prompt_ids if self.server.dialect.ids else as_text(model.tokenizer, prompt_ids)
        request = Request(prompt, raw, self.tokens, likeliest=LIKELIEST)
        with closing(self._connected(lease)) as connection:
            name = self._name(connection, lease)
            try:
                return _heard(connection, request, name, lease)
            except Refused as error:
                if error.status not in WISHES_REFUSED:
                    raise
                return _heard(connection, Request(prompt, raw, self.tokens), name, lease)

    def _rows(self, lease: Lease, model: Model, held: Held) -> Rows:
        for contestant in self.contestants:
            loop = choose_engines("auto", [contestant.method], model.config.to_dict(), self.device)[0]
            engine = yield from lease.load(Key.of(model, contestant.method, self.device, loop), contestant)
            yield lease.progress(f"{contestant.title} reads it", None)
            logits = engine.logits([*held.prompt_ids, *held.ids], lease.stop.is_set)
            found = compared(logits[len(held.prompt_ids) - 1 : -1].float().cpu(), held, model)
            yield {"method": contestant.label} | found

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        known = [row for row in rows if row["kl_lower_bound"] is not None]
        if known:
            best = min(known, key=lambda row: row["kl_lower_bound"])
            return f"The server is nearest to **{shown_name(best['method'])}**: KL {best['kl_lower_bound']:.3g} nats."
        if rows:
            best = max(rows, key=lambda row: row["top1_agreement"])
            share = format_share(best["top1_agreement"])
            return f"**{shown_name(best['method'])}** would have chosen {share} of the server's tokens."
        return ""


def _heard(connection: Connection, request: Request, model: str, lease: Lease) -> Written:
    """The whole answer."""
    reply, pieces = connection.ask(request, model), []
    while not reply.over:
        if lease.stop.is_set():
            raise Interrupted
        if arrived := reply.get(POLL_SECONDS):
            pieces.append(arrived.piece)
    reply.get(0)  # raises what went wrong at last
    usage = next((piece.usage for piece in reversed(pieces) if piece.usage), None)
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Written("".join(piece.text for piece in pieces), tokens, usage)


def _ids_of(written: Written, model: Model) -> list[int]:
    """The server's text in the tokens of the model here, as far as both cut it alike. Raises UserError where they do
    not from the beginning."""
    ids = model.tokenize(written.text) if written.text else []
    if not written.tokens:
        if not ids:
            raise UserError("the server ended its text at once, so there is nothing to read; try another prompt")
        return ids
    same = 0
    for token_id, told in zip(ids, written.tokens, strict=False):
        if one_token(model.tokenizer, told.data.decode("utf-8", "replace")) != token_id:
            break
        same += 1
    if same == 0:
        raise UserError("the server cuts its text into other tokens than the model here; choose the model that it runs")
    return ids[:same]


def _shown_agreement(row: dict) -> str:
    if row["top1_agreement"] is None:
        return MISSING
    return f"{format_share(row['top1_agreement'])} of {row.get('choices', row['tokens'])}"


def _shown(value: float | None, form: str) -> str:
    return MISSING if value is None or not math.isfinite(value) else form.format(value)


def _shownfirst_of(row: dict) -> str:
    first = row["first_difference"]
    if first is None:
        return "none"
    return f"token {first['place'] + 1}: {quoted(first['method'])} for the server's {quoted(first['server'])}"
