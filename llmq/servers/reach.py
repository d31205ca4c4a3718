"""Which servers may be asked, and the keys that go with them.

Whoever may type an address could have this machine knock at its neighbours' doors: where strangers can, only servers
that the owner names are asked, and none at a private address. A name is looked up once, and what was checked is what is
connected to. A key belongs to one host, so that no other is ever sent it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from llmq.errors import BadChoice, UserError
from llmq.servers.served import Served

KEYS = "LLMQ_SERVER_KEYS"


@dataclass(frozen=True)
class Reach:
    """`hosts`: those that may be asked, as their addresses name them ('host:8000'), None for any, wherever it is;
    `keys`: host -> key."""

    hosts: frozenset[str] | None = None
    keys: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    def check(self, served: Served) -> None:
        """Raise BadChoice where nobody here may ask this server."""
        if self.hosts is not None and served.host not in self.hosts:
            named = f"; it asks {', '.join(sorted(self.hosts))}" if self.hosts else ""
            raise BadChoice(f"this page asks no server at {served.host}{named}")

    def address(self, served: Served) -> str | None:
        """The address to connect to: None for whatever the name means. Raises UserError where it is a private one and
        must not be."""
        self.check(served)
        if self.hosts is None:
            return None
        parts = urlsplit(served.url)
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port or parts.scheme, type=socket.SOCK_STREAM)
        except OSError as error:
            raise UserError(f"no server has the name {parts.hostname}: {error.strerror or error}") from None
        addresses = [ip_address(entry[4][0]) for entry in found]
        if not all(map(_public, addresses)):
            raise BadChoice(f"{served.host} is at a private address, which this page does not ask")
        return str(addresses[0])

    def key(self, served: Served) -> str | None:
        return self.keys.get(served.host)

    def with_keys(self, keys: Mapping[str, str]) -> Reach:
        return Reach(self.hosts, {**self.keys, **keys})


def _public(address: IPv4Address | IPv6Address) -> bool:
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast and (inner is None or _public(inner))


def keys_of_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """host -> key, out of `LLMQ_SERVER_KEYS`, such as 'host:8000=KEY other=KEY'. Raises UserError for what is none."""
    found = {}
    for number, part in enumerate(environment.get(KEYS, "").split(), 1):
        host, equals, key = part.partition("=")
        if not (host and equals and key):
            raise UserError(f"entry {number} of {KEYS} is not host=KEY; separate several by spaces")
        found[host] = key
    return found


ANYWHERE = Reach()
