"""A server with classes: the file that its flags and variables name, and the link that makes whoever has it a teacher.
No gradio."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import quote

from llmq.cache import cache_folder
from llmq.classroom.classes import Classes
from llmq.lesson.steps import questions
from llmq.ui.shell.access import is_open

FILE = "classes.sqlite3"
KEY = "LLMQ_CLASS_KEY"
EVERY_NETWORK = ("0.0.0.0", "::")
ELSEWHERE = "192.0.2.1"  # an address of nobody, for documents: nothing is sent there


def open_classes(file: str | None) -> Classes:
    """The classes of `file`, by default of one in the cache folder. Raises UserError for what it cannot be."""
    path = Path(file).expanduser() if file else cache_folder() / FILE
    asked = questions()
    return Classes(path, asked, tuple(asked), key=os.environ.get(KEY) or None)


def announce(classes: Classes, host: str, local: str, share: str | None) -> str:
    """What the terminal says of a server that listens: the teacher's link, once for every address that it has."""
    addresses = [_outward(host, local), *_named(), *([share] if share else [])]
    links = (f"{address.rstrip('/')}/lesson/#teach={quote(classes.key, safe='')}" for address in addresses)
    lines = ["* The teacher's link, for nobody else:", *(f"    {link}" for link in dict.fromkeys(links))]
    lines.append("  Students get theirs, and its QR code, from that page.")
    if len(addresses) == 1 and not is_open(host, share=False, hosted=False):
        lines.append(f"  {host} is this machine alone: --host 0.0.0.0, or --share, lets a class in.")
    return "\n".join(lines)


def _named() -> list[str]:
    """Where the page is by what the environment says: a proxy's address, a Space's."""
    root, space = os.environ.get("GRADIO_ROOT_PATH", ""), os.environ.get("SPACE_HOST")
    return [*([root] if root.startswith(("http://", "https://")) else []), *([f"https://{space}"] if space else [])]


def _outward(host: str, local: str) -> str:
    """`local`, with this machine's address in its network where every network is served."""
    if host.strip("[]") not in EVERY_NETWORK:
        return local
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((ELSEWHERE, 9))
            return f"http://{probe.getsockname()[0]}:{local.rstrip('/').rpartition(':')[2]}/"
    except OSError:  # no network but its own
        return local
