"""Where the page is served, tried before anything is fetched or loaded. No gradio."""

from __future__ import annotations

import errno
import socket

from llmq.errors import BadChoice

DEFAULT_PORTS = range(7860, 7960)  # those that Gradio goes through
ADVICE = "choose another --port (0: any free one) or --host (127.0.0.1: this machine; 0.0.0.0: every network)"


def free_address(host: str, port: str | None) -> tuple[str, int]:
    """`host`, and a port that can be served there: the given one, any free one for '0', the first free one of
    DEFAULT_PORTS for None. Raises BadChoice."""
    if port is not None and not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise BadChoice(f"port is {port!r:.80}; choose a whole number from 1 to 65535, or 0 for any free one")
    name = host.strip("[]")  # an IPv6 address has brackets in a URL only
    for number in DEFAULT_PORTS if port is None else [int(port)]:
        try:
            return f"[{name}]" if ":" in name else name, _bind(name, number)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                break
    raise BadChoice(f"cannot serve at {host}:{number}: {reason}; {ADVICE}")


def _bind(host: str, port: int) -> int:
    """Take the address as uvicorn will, then the port on 127.0.0.1 as Gradio does before, and let both go."""
    for name in (host, "127.0.0.1"):
        family, kind, protocol, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            port = trial.getsockname()[1]
    return port
