"""The class's routes, below `/lesson/class`: JSON in, JSON out, every refusal one sentence. No gradio.

A token travels as `Authorization: Bearer …`, which no page of another site can send in somebody's name. Whatever is
asked often is answered from memory; what is written, or drawn, is done in a thread.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmq.classroom.classes import Classes
from llmq.classroom.refusals import Full, NoClass, NoToken, NotYours, WrongKey
from llmq.classroom.store import NotKept
from llmq.errors import BadChoice, UserError
from llmq.files import parse_json
from llmq.lesson.exhibits import right_choices
from llmq.lesson.steps import STEPS
from llmq.ui.shell.guesses import Guesses
from llmq.ui.shell.login import is_let_in, refusal

PLACE = "/lesson/class"
MOST_BYTES = 2000  # of a request's body
MOST_ADDRESS = 200  # characters of an address that a QR code holds
CODES_AT_ONCE, CODE_SECONDS = 100, 0.5  # wrong codes of an address: typing errors of a whole school are fewer
NO_CLASSES = "this server has no classes; whoever runs it starts it with --class"
QUIET_MODULES = 4  # white around a QR code, as its standard wants
STATUS = {
    WrongKey: 401, NoToken: 401, NotYours: 403, NoClass: 404, Full: 409, BadChoice: 400, NotKept: 507,
}  # fmt: skip
WORDS = {str: "text", bool: "true or false", type(None): "null"}
MISSING = object()


class TooLarge(UserError):
    """A body that no part of the lesson sends."""


class TooMany(UserError):
    """Codes that do not exist, one after the other; `seconds` until the next may be tried."""

    def __init__(self, seconds: float):
        super().__init__(f"too many wrong codes from your address; try again in {math.ceil(seconds)} s")
        self.seconds = seconds


def routes_of(classes: Classes | None, codes: Guesses | None = None) -> list[Route]:
    """The routes for the web server; with None those that say that there are no classes."""
    if classes is None:
        return [Route(PLACE, _none), Route(f"{PLACE}/{{rest:path}}", _none, methods=["GET", "POST"])]
    part = _Routes(classes, codes or Guesses(at_once=CODES_AT_ONCE, every_seconds=CODE_SECONDS))
    post = {"methods": ["POST"]}
    of_class = f"{PLACE}/{{code}}"
    return [
        Route(PLACE, _answered(part.there)),
        Route(f"{PLACE}/teach", _answered(part.teach), **post),
        Route(of_class, _answered(part.state)),
        Route(f"{of_class}/join", _answered(part.join), **post),
        Route(f"{of_class}/vote", _answered(part.vote), **post),
        Route(f"{of_class}/lead", _answered(part.lead), **post),
        Route(f"{of_class}/reset", _answered(part.reset), **post),
        Route(f"{of_class}/end", _answered(part.end), **post),
        Route(f"{of_class}/export", _answered(part.export)),
        Route(f"{of_class}/qr.svg", _answered(part.qr)),
        Route(f"{PLACE}/{{rest:path}}", _answered(part.nothing), methods=["GET", "POST"]),
    ]


async def _none(request: Request) -> Response:
    if not is_let_in(request):
        return refusal()
    return JSONResponse({"classes": False, "error": NO_CLASSES}, 404, {"Cache-Control": "no-store"})


def _answered(work: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """`work` for whoever is let in, its refusals as JSON, and nothing of it kept by a browser or a proxy."""

    async def endpoint(request: Request) -> Response:
        if not is_let_in(request):
            return refusal()
        try:
            answer = await work(request)
        except UserError as error:
            answer = _refused(error)
        answer.headers["Cache-Control"] = "no-store"
        return answer

    return endpoint


def _refused(error: UserError) -> Response:
    if isinstance(error, TooMany):
        return JSONResponse({"error": str(error)}, 429, {"Retry-After": str(math.ceil(error.seconds))})
    if isinstance(error, TooLarge):
        return JSONResponse({"error": str(error)}, 413, {"Connection": "close"})
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400)
    return JSONResponse({"error": str(error)}, status)


class _Routes:
    """What is done for each address. `codes` counts the codes without a class that an address has tried."""

    def __init__(self, classes: Classes, codes: Guesses):
        self.classes, self.codes = classes, codes

    async def there(self, request: Request) -> Response:
        return JSONResponse({"classes": True})

    async def nothing(self, request: Request) -> Response:
        return JSONResponse({"error": "there is no such address; reload the page"}, 404)

    async def teach(self, request: Request) -> Response:
        given = await _body(request, key=str)
        code, token = await run_in_threadpool(self.classes.teach, _wanted(given, "key"))
        return JSONResponse({"class": code, "token": token})

    async def join(self, request: Request) -> Response:
        code = self._code(request)
        await _body(request)
        return JSONResponse({"token": await run_in_threadpool(self.classes.join, code)})

    async def state(self, request: Request) -> Response:
        return JSONResponse(self.classes.state(self._code(request), token_of(request), _seen(request)))

    async def vote(self, request: Request) -> Response:
        code, given = self._code(request), await _body(request, question=str, choice=str)
        asked = _wanted(given, "question"), _wanted(given, "choice")
        counted, choice = await run_in_threadpool(self.classes.vote, code, token_of(request), *asked)
        return JSONResponse({"counted": counted, "choice": choice})

    async def lead(self, request: Request) -> Response:
        code, given = self._code(request), await _body(request, step=str | None, revealed=bool)
        return JSONResponse(await run_in_threadpool(self.classes.lead, code, token_of(request), given))

    async def reset(self, request: Request) -> Response:
        code, given = self._code(request), await _body(request, question=str | None)
        question = _wanted(given, "question")  # a slip is not to delete everything
        return JSONResponse(await run_in_threadpool(self.classes.reset, code, token_of(request), question))

    async def end(self, request: Request) -> Response:
        code, _ = self._code(request), await _body(request)
        await run_in_threadpool(self.classes.end, code, token_of(request))
        return JSONResponse({})

    async def export(self, request: Request) -> Response:
        kind = request.query_params.get("format", "csv")
        if kind not in ("csv", "json"):
            raise BadChoice(f"format is {kind!r:.80}; choose csv or json")
        found = self.classes.export(self._code(request), token_of(request))
        named = {"Content-Disposition": f'attachment; filename="class-{found["class"]}-{found["date"]}.{kind}"'}
        if kind == "json":
            return JSONResponse(found, headers=named)
        right = await run_in_threadpool(right_choices)
        return Response(csv_of(found, right), media_type="text/csv; charset=utf-8", headers=named)

    async def qr(self, request: Request) -> Response:
        code = self._code(request)
        if not self.classes.is_class(code):
            raise NoClass(f"there is no class {code:.20}; ask the teacher for its code")
        address = student_link(request.query_params.get("at", ""), code)
        return Response(await run_in_threadpool(qr_code, address), media_type="image/svg+xml")

    def _code(self, request: Request) -> str:
        """The code in the address, as it is written. Whoever has no token of that class, and has tried many codes that
        are nobody's, waits, whatever code comes next: an answer would tell a right one."""
        code = request.path_params["code"].upper()
        if self.classes.is_member(code, token_of(request)):
            return code
        address = request.client.host if request.client else ""
        if seconds := self.codes.take(address):
            raise TooMany(seconds)
        if self.classes.is_class(code) or self.classes.was_class(code):
            self.codes.give_back(address)
        return code


def token_of(request: Request) -> str:
    """The token that a request brings; '' where there is none."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _seen(request: Request) -> int | None:
    given = request.query_params.get("seen", "")
    if given and not (given.isascii() and given.isdecimal() and len(given) < 19):
        raise BadChoice(f"seen is {given!r:.80}; give the version of the last answer")
    return int(given) if given else None


async def _body(request: Request, **kinds: type) -> dict:
    """The JSON object that a request brings; nothing is an empty one. Raises TooLarge, and BadChoice for a name or a
    type that is not in `kinds`."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise TooLarge(f"the request has more than {MOST_BYTES} bytes; reload the page")
    try:
        given = parse_json(data.decode() or "{}")
    except ValueError:
        raise BadChoice("the request is no JSON; reload the page") from None
    if not isinstance(given, dict):
        raise BadChoice("the request is JSON, but no object; reload the page")
    for name, value in given.items():
        if name not in kinds:
            raise BadChoice(f"unknown name {name!r:.80}; give {', '.join(kinds) or 'nothing'}")
        if not isinstance(value, kinds[name]):
            raise BadChoice(f"{name} is {value!r:.80}; give {_words(kinds[name])}")
    return given


def _words(kind: type) -> str:
    return " or ".join(words for one, words in WORDS.items() if issubclass(one, kind))


def _wanted(given: dict, name: str):
    if (value := given.get(name, MISSING)) is MISSING:
        raise BadChoice(f"{name} is missing; reload the page")
    return value


def csv_of(found: dict, right: Mapping[str, str]) -> str:
    """The counts of `Classes.export`, a row for each choice; steps have the numbers that the page shows. `right`: the
    choice that is, by question."""
    numbers = {question: number for number, step in enumerate(STEPS, 1) for question in step.questions}
    out = io.StringIO()
    rows = csv.writer(out)
    rows.writerow(("step", "question", "choice", "right", "votes", "class", "date"))
    for question, counts in found["votes"].items():
        for choice, votes in counts.items():
            is_right = "yes" if right.get(question) == choice else "no"
            rows.writerow((numbers[question], question, choice, is_right, votes, found["class"], found["date"]))
    return out.getvalue()


def student_link(at: str, code: str) -> str:
    """Where students of a class go, on the server whose address is `at`. Raises BadChoice for what is no address."""
    try:
        parts = urlsplit(at)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is none, brackets that do not match
        good = False
    good = good and at.isascii() and at.isprintable() and not set(at) & set(' ?#@\\"<>') and len(at) <= MOST_ADDRESS
    if not good:
        raise BadChoice(f"at is {at!r:.80}; give the address of the page, such as https://school.example/llmq/")
    return f"{at.rstrip('/')}/lesson/?class={code}"


def qr_code(text: str) -> bytes:
    """The SVG of a QR code, black on white with its quiet zone, as large as whoever shows it wants."""
    import segno

    out = io.BytesIO()
    code = segno.make_qr(text, error="m")
    code.save(
        out, kind="svg", border=QUIET_MODULES, dark="#000", light="#fff", xmldecl=False, omitsize=True, nl=False,
        svgclass=None, lineclass=None,
    )  # fmt: skip
    return out.getvalue()
