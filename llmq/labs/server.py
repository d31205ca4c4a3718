"""How near a server is to the methods here: it writes, they read its text, and each place is held against the other.

A server tells the log-probabilities of a few tokens at each place, if of any. The divergence is that of those tokens
one by one and of all others as one: lumping can only hide a difference, so it is a lower bound of the KL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Annotated

from llmq.contestant import Contestant, Contestants, shown_name
from llmq.engine.base import Interrupted
from llmq.engine.choice import choose_engines
from llmq.engine.loading import Key
from llmq.environment import describe
from llmq.errors import UserError
from llmq.events import Event, Progress
from llmq.fields import Choice, Number, Text
from llmq.formatting import MISSING, format_share, quoted
from llmq.labs.compare import SENT
from llmq.labs.rows import RowAnswer, Rows, TableLab
from llmq.machine.door import Lease
from llmq.models.opening import Model
from llmq.models.text import as_text, one_token
from llmq.scores import lumped_divergence
from llmq.servers.protocol import Refused, Request, Told, Usage
from llmq.servers.served import OneServer, Served

if TYPE_CHECKING:
    import torch

    from llmq.servers.connection import Connection

POLL_SECONDS = 0.1  # between two looks at what has arrived
LIKELIEST = 20  # tokens at a place, of a server that tells so many
WISHES_REFUSED = (400, 422, 500, 501)  # what servers answer that cannot tell log-probabilities
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
        "A server answers greedily, and every method here reads its answer. Where the server tells log-probabilities, "
        "KL says how far each method's are from them; otherwise the first choices are compared. Both have to run the "
        "same model."
    )
    explained = (
        "**KL, at least.** Of the tokens that the server names at a place each counts by itself, and all others "
        "together as one: so the figure is never more than the whole KL (method to server, nats for a token). "
        "**Chosen token.** How far the log-probabilities of the token that was written lie apart, on average."
    )
    example, prompted = EXAMPLE, "What the server answers."
    server: Annotated[Served, OneServer(label="Server")] = Served.parse("openai@http://localhost:8000/v1")
    prompt: Annotated[str, Text(help=f"what it answers; default: {EXAMPLE}", flag="--prompt")] = ""
    contestants: Annotated[tuple[Contestant, ...], Contestants(label="Methods", help="that read it, with commas")] = (
        Contestant.parse_all("fp16,llm-int8")
    )
    tokens: Annotated[int, Number(2, 512, whole=True, help="of the answer", label="Tokens", shown=256, step=1)] = 64
    sent: Annotated[
        str, Choice(SENT, ("as a message", "as the text read here"), help="messages or text", label="The prompt goes")
    ] = SENT[0]
    columns = {
        "Method": lambda row: shown_name(row["method"]),
        "KL, at least": lambda row: _shown(row["kl_lower_bound"], "{:.3g}"),
        "Same first choice": lambda row: f"{format_share(row['top1_agreement'])} of {row['tokens']}",
        "Chosen token": lambda row: _shown(row["logprob_difference"], "{:.3g} nats"),
        "First other choice": lambda row: _shown_first(row),
    }

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Yield events, progress, and an answer after every method; stopped early, what was measured stays."""
        lease.reach.check(self.server)
        model = yield from lease.open(self.model)
        prompt_ids = model.encode(self.prompt.strip() or self.example, new_tokens=self.tokens)
        yield lease.progress(f"{self.server.title} writes", 0.0)
        written = self._written(lease, model, prompt_ids)
        ids = _ids_of(written, model)
        if written.usage and written.usage.prompt_tokens != len(prompt_ids):
            raise UserError(
                f"the server read {written.usage.prompt_tokens} tokens of prompt where {self.model} reads "
                f"{len(prompt_ids)}: another model or template. Choose the model that it runs, or send the text"
            )
        told = {"prompt": self.prompt.strip() or self.example, "answer": written.text, "sent": self.sent}
        told |= {"server": self.server.label, "answer_tokens": len(ids), "likeliest": _named(written.tokens)}
        told |= {"command": self.typed()} | describe(self.device, model.source)
        facts = {"text": f"what {self.server.title} wrote", "tokens": len(ids)}
        yield from self.gathered(self._rows(lease, model, prompt_ids, ids, written), told, lambda rows: facts)

    def _written(self, lease: Lease, model: Model, prompt_ids: list[int]) -> Written:
        from llmq.servers.connection import Connection

        prompt, raw = self.prompt.strip() or self.example, self.sent == "text"
        if raw:
            prompt = prompt_ids if self.server.dialect.ids else as_text(model.tokenizer, prompt_ids)
        request = Request(prompt, raw, self.tokens, likeliest=LIKELIEST)
        with closing(Connection(self.server, lease.reach)) as connection:
            name = self.server.model or self.server.only_one(connection.models(lease.stop.is_set))
            try:
                return _heard(connection, request, name, lease)
            except Refused as error:
                if error.status not in WISHES_REFUSED:
                    raise
                return _heard(connection, Request(prompt, raw, self.tokens), name, lease)

    def _rows(self, lease: Lease, model: Model, prompt_ids: list[int], ids: list[int], written: Written) -> Rows:
        for contestant in self.contestants:
            loop = choose_engines("auto", [contestant.method], model.config.to_dict(), self.device)[0]
            engine = yield from lease.load(Key.of(model, contestant.method, self.device, loop), contestant)
            yield lease.progress(f"{contestant.title} reads it", None)
            logits = engine.logits([*prompt_ids, *ids], lease.stop.is_set)[len(prompt_ids) - 1 : -1].float().cpu()
            yield {"method": contestant.label} | _compared(logits, ids, written, model)

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


def _compared(logits: torch.Tensor, ids: Sequence[int], written: Written, model: Model) -> dict:
    """How one method holds the text: `logits` (tokens, vocabulary), row i of token i."""
    own = logits.double().log_softmax(1)
    choices = own.argmax(1).tolist()
    differing = [place for place, (choice, token) in enumerate(zip(choices, ids, strict=True)) if choice != token]
    row = {"tokens": len(ids), "top1_agreement": 1 - len(differing) / len(ids), "first_difference": None}
    row |= {"kl_lower_bound": None, "logprob_difference": None}
    if differing:
        place = differing[0]
        chosen = model.tokenizer.decode([choices[place]])
        row["first_difference"] = {"place": place, "server": model.tokenizer.decode([ids[place]]), "method": chosen}
    told = written.tokens[: len(ids)]
    if len(told) == len(ids):
        held = own[range(len(ids)), list(ids)].tolist()
        row["logprob_difference"] = mean(abs(ours - one.logprob) for ours, one in zip(held, told, strict=True))
    if told and all(one.likeliest for one in told):
        row["kl_lower_bound"] = mean(lumped_divergence(own[at], _by_id(one, model)) for at, one in enumerate(told))
    return row


def _by_id(told: Told, model: Model) -> dict[int, float]:
    """The log-probabilities at a place by the tokens here; what is none here belongs to the rest."""
    found = {one_token(model.tokenizer, data.decode("utf-8", "replace")): value for data, value in told.likeliest}
    return {token: value for token, value in found.items() if token is not None}


def _named(tokens: Sequence[Told]) -> int | None:
    """At how many tokens of a place the server told its log-probabilities."""
    return min((len(token.likeliest) for token in tokens), default=0) or None


def _shown(value: float | None, form: str) -> str:
    return MISSING if value is None or not math.isfinite(value) else form.format(value)


def _shown_first(row: dict) -> str:
    first = row["first_difference"]
    if first is None:
        return "none"
    return f"token {first['place'] + 1}: {quoted(first['method'])} for the server's {quoted(first['server'])}"
