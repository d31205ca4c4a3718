"""A server as a contestant, in the words people type: `vllm@http://host:8000/v1#model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import SplitResult, urlsplit

from llmq.errors import BadChoice
from llmq.fields import Kind
from llmq.servers.dialects import Dialect, dialect_named

MARK = "://"  # in the name of a contestant: it is a server
LONGEST = 500  # characters of a name
EXAMPLE = "such as vllm@http://localhost:8000/v1#model"


@dataclass(frozen=True)
class Served:
    """The `model` of a server; '' is the only one it has. `url` is the base of its API, without a slash at the end."""

    dialect: Dialect
    url: str
    model: str = ""
    threshold: ClassVar[None] = None  # of outlier columns, as a method has one

    @classmethod
    def parse(cls, text: str) -> Served:
        """`kind@http://host:port/v1#model`. Raises BadChoice saying what is wrong with it."""
        name, _, address = text.strip().partition("@")
        if len(text) > LONGEST or not text.isprintable() or MARK in name:
            raise BadChoice(f"{text[:80]!r} is no server; name one as kind@address#model, {EXAMPLE}")
        dialect = dialect_named(name)
        url, _, model = address.partition("#")
        parts = _split(url)
        if parts.username is not None or parts.password is not None:
            raise BadChoice(
                "a server's address holds no key; set LLMQ_SERVER_KEYS=host:port=KEY, or use the key's field"
            )
        if parts.query:
            raise BadChoice(f"the address of a server ends before its '?': {url.partition('?')[0]}")
        return cls(dialect, f"{parts.scheme}{MARK}{parts.netloc}{parts.path.rstrip('/') or '/v1'}", model.strip())

    @property
    def label(self) -> str:
        """Unique within a run, and what `parse` reads."""
        return f"{self.dialect.name}@{self.url}" + (f"#{self.model}" if self.model else "")

    @property
    def host(self) -> str:
        """As in the address, with the port where that names one."""
        return urlsplit(self.url).netloc

    def only_one(self, models: Sequence[str]) -> str:
        """The one of `models` that the server lists. Raises BadChoice naming them where that is not one."""
        if len(models) != 1:
            has = f"has {', '.join(models)[:300]}" if models else "lists no models"
            raise BadChoice(f"the server at {self.host} {has}; name one: {self.label}#model")
        return models[0]

    @property
    def title(self) -> str:
        named = f", {self.model.rstrip('/').rpartition('/')[2]}" if self.model else ""
        return f"{self.dialect.title} at {self.host}{named}"

    @property
    def about(self) -> str:
        return (
            "A server, asked over HTTP: it holds the weights, so what it computes in is its own affair, and each time "
            "is measured here, with its queue and the way there and back."
        )


@dataclass(frozen=True)
class OneServer(Kind):
    """A server by name."""

    help: str = f"a server, {EXAMPLE}"
    holds: ClassVar[type] = Served

    def parse(self, name: str, text: str) -> Served:
        return Served.parse(text)

    def spell(self, value: Served) -> str:
        return value.label


def is_served(text: str) -> bool:
    """Whether the name of a contestant names a server."""
    return MARK in text


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        host = parts.port is not None or parts.hostname  # reading a port checks it
    except ValueError as error:
        raise BadChoice(f"{url[:80]!r} is no address of a server: {error}") from None
    if parts.scheme not in ("http", "https") or not (host and parts.hostname):
        raise BadChoice(f"{url[:80]!r} is no address of a server; it begins with http:// or https://, {EXAMPLE}")
    return parts
