"""What stands between the network and Gradio: who may ask, what every answer tells a browser, what a failure says.

`Answers` is inside Gradio's own middleware and sees a page before it is compressed; `Door` is outside all of it, so
that a request from a foreign page reaches nothing. No gradio.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmq.errors import NO_ROOM, BadChoice
from llmq.ui.shell.guesses import Guesses

INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
MAY_SHOW_US = (  # in a frame: a Space's page, a notebook's cell, and pages of the visitor's own machine
    "'self' https://huggingface.co https://*.hf.space https://colab.research.google.com "
    "https://*.googleusercontent.com http://localhost:* http://127.0.0.1:*"
)
SITE = re.compile(r"https?://(?:\*\.)?[a-z0-9-]+(?:\.[a-z0-9-]+)*(?::(?:\d+|\*))?", re.IGNORECASE)
POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-eval'",  # Gradio makes functions of the text of its events
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "media-src": "'self' data: blob:",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
}
FOREIGN = "this page may be used from its own address only; a proxy in front of it must pass the Host header on"
TOO_MANY = "too many wrong passwords from your address; try again in {:.0f} s"
UNUSED = re.compile(r"/(?:gradio_api/(?:proxy=|vibe-|undo-vibe|process_recording|deep_link|dev/)|monitoring)")
# Where a password is given: a visitor's, the owner's, a teacher's.
GUESSED = re.compile(r".*/(?:login|jobs(?:/\d+/end)?|lesson/class/teach)/?")
WRONG = (400, 401)
NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL}
MISTAKES = (LookupError, ValueError, TypeError, AttributeError, AssertionError, RecursionError, OverflowError)
log = logging.getLogger(__name__)


def sites_in(text: str) -> tuple[str, ...]:
    """The sites of a comma-separated list. Raises BadChoice for what a browser would not take for one."""
    sites = tuple(filter(None, (part.strip() for part in text.split(","))))
    for site in sites:
        if not SITE.fullmatch(site):
            raise BadChoice(
                f"--allow-frames is {site!r}; choose sites such as https://school.example or https://*.school.example"
            )
    return sites


def policy(page: bytes = b"", frames: tuple[str, ...] = ()) -> str:
    """The content security policy of an answer: of scripts within `page` exactly those that it has; `frames`: the sites
    that may show it beside MAY_SHOW_US."""
    digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in INLINE_SCRIPT.findall(page))
    scripts = " ".join(f"'sha256-{digest}'" for digest in dict.fromkeys(digests))
    rules = POLICY | {
        "script-src": f"{POLICY['script-src']} {scripts}".strip(),
        "frame-ancestors": " ".join((MAY_SHOW_US, *frames)),
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin", "Content-Security-Policy": policy()}


class Answers:
    """Gives every answer its headers, and makes one line of JSON of whatever fails inside."""

    def __init__(self, app: ASGIApp, frames: tuple[str, ...] = ()):
        self.app, self.frames = app, frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        answer = _Answer(scope["path"], send, self.frames)
        try:
            await self.app(scope, receive, answer.send)
        except ClientDisconnect:
            pass
        except Exception as error:  # the boundary: whatever Gradio's routes make of a request
            log.error("%r: %s", scope["path"][:120], place_of(error))
            await answer.fail(scope, receive, error)


@dataclass
class _Answer:
    """One answer on its way out. A page is held until it is whole, a failure's stack until it is a sentence."""

    path: str
    out: Send
    frames: tuple[str, ...]
    start: Message | None = None
    begun: bool = False
    body: list[bytes] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            if message["status"] == 500 and _is_call(self.path):
                message["status"] = 400  # Gradio's answer to every refusal of a question that is asked without a queue
            if headers.get("content-type", "").startswith("text/html"):
                self.start = message
                return
        elif self.start is not None:
            self.body.append(message.get("body", b""))
            if message.get("more_body"):
                return
            page = b"".join(self.body)
            MutableHeaders(scope=self.start)["Content-Security-Policy"] = policy(page, self.frames)
            begin, self.start, message = self.start, None, {"type": "http.response.body", "body": page}
            await self.out(begin)
        self.begun = True
        await self.out(message)

    async def fail(self, scope: Scope, receive: Receive, error: Exception) -> None:
        if self.begun:  # the status has been sent: what is left is to end
            await self.out({"type": "http.response.body", "body": b""})
        else:
            status, told = in_words(self.path, error)
            await JSONResponse({"error": told}, status)(scope, receive, self.send)


def _is_call(path: str) -> bool:
    return "/gradio_api/run/" in path or "/gradio_api/api/" in path


def in_words(path: str, error: Exception) -> tuple[int, str]:
    """The status and the sentence for a request that a route of Gradio's made `error` of."""
    called = _is_call(path) or "/gradio_api/call/" in path
    if called and (isinstance(error, KeyError) or type(error).__name__ == "FnIndexInferError"):
        return 404, f"no endpoint is called {path.rpartition('/')[2][:80]!r}"
    if called and isinstance(error, TypeError):  # gradio_client's words about parameters
        return 400, str(error).partition(". Please click")[0].partition("\n")[0]
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return 507, "the server's disk is full; tell whoever runs it"
    if isinstance(error, OSError) and error.errno in NO_SUCH_FILE:
        return 404, "there is no such file"
    if isinstance(error, MISTAKES):
        return 400, "this is no request that the page makes; reload the page"
    return 500, "the server failed at this request; its log says more"


def place_of(error: Exception) -> str:
    """What went wrong and where, in one line of a log."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}" if trace else "nowhere"
    return f"{type(error).__name__} in {where}: {' '.join(str(error).split())[:160]}"


class Door:
    """Lets in what comes from the page itself or from no page at all, and slows down whoever guesses passwords."""

    def __init__(self, app: ASGIApp, own_hosts: Callable[[], Iterable[str | None]], guesses: Guesses):
        self.app, self.own_hosts, self.guesses = app, own_hosts, guesses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self._is_own(headers):
            return await JSONResponse({"error": FOREIGN}, 403, HEADERS)(scope, receive, send)
        if UNUSED.search(scope["path"]):  # routes of Gradio's that no part of the page asks
            return await JSONResponse({"error": "there is no such address"}, 404, HEADERS)(scope, receive, send)
        if GUESSED.fullmatch(scope["path"]) and (scope["method"] == "POST" or "authorization" in headers):
            return await self._guess(scope, receive, send)
        await self.app(scope, receive, send)

    def _is_own(self, headers: Headers) -> bool:
        """A browser names the page that asks in Origin, and no page can change what it names."""
        if (origin := headers.get("origin")) is None:
            return True
        hosts = [headers.get("host"), *headers.get("x-forwarded-host", "").split(","), *self.own_hosts()]
        return urlsplit(origin).netloc.lower() in {host.strip().lower() for host in hosts if host}

    async def _guess(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = (scope.get("client") or ("",))[0]
        if seconds := self.guesses.take(address):
            headers = HEADERS | {"Retry-After": f"{seconds:.0f}"}
            return await JSONResponse({"error": TOO_MANY.format(seconds)}, 429, headers)(scope, receive, send)

        async def heard(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] not in WRONG:
                self.guesses.give_back(address)
            await send(message)

        await self.app(scope, receive, heard)
