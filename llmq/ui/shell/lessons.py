"""The lesson on this server: its files below `/lesson/`, and the way there from `/?lesson=2`. No gradio.

The files are those of `llmq lesson --static`; here their page also knows of the app, and whether it has classes.
"""

from __future__ import annotations

import gzip
import hashlib
import threading
from functools import cache
from pathlib import PurePath

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmq.lesson import pack
from llmq.ui.shell.login import is_let_in, refusal

PLACE = "/lesson"
MAKING = threading.Lock()


def routes_of(has_classes: bool) -> list[Route]:
    """The routes for the web server, to stand behind those of the class."""

    async def shown(request: Request) -> Response:
        if not is_let_in(request):
            return refusal()
        name = request.path_params.get("name") or "index.html"
        found = await run_in_threadpool(_file, name, has_classes)
        if found is None:
            return JSONResponse({"error": "there is no such file in the lesson"}, 404)
        packed, tag = found
        headers = {"ETag": tag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        kind = pack.TYPES[PurePath(name).suffix]
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(gzip.decompress(packed), media_type=kind, headers=headers)
        return Response(packed, media_type=kind, headers=headers | {"Content-Encoding": "gzip"})

    async def there(request: Request) -> Response:
        return RedirectResponse("lesson/")

    return [Route(PLACE, there), Route(f"{PLACE}/", shown), Route(f"{PLACE}/{{name}}", shown)]


def _file(name: str, has_classes: bool) -> tuple[bytes, str] | None:
    """As `_packed`, made once however many ask for it at the same time."""
    with MAKING:
        return _packed(name, has_classes)


@cache
def _packed(name: str, has_classes: bool) -> tuple[bytes, str] | None:
    """A file of the lesson, compressed, and what marks it; None where it has no such file."""
    text = pack.files().get(name)
    if text is None:
        return None
    if name == "index.html":
        for wanted in (b'data-live="no"', *([b'data-class="no"'] if has_classes else [])):
            text = text.replace(wanted, wanted.replace(b"no", b"yes"))
    packed = gzip.compress(text, mtime=0)
    return packed, f'"{hashlib.sha256(packed).hexdigest()[:24]}"'


class ToTheLesson:
    """Sends whoever opens `/?lesson=2` to the lesson; a step of it on the page itself has `live` in its address."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/" and scope["method"] == "GET":
            query = Request(scope).query_params
            if "lesson" in query and "live" not in query:
                return await RedirectResponse(f"lesson/?{query}")(scope, receive, send)
        await self.app(scope, receive, send)
