"""The talking: one server, asked in a thread with an event loop of its own, so that what arrives has its time whatever
else is computed, and giving up closes the connection at once, by which a server knows to stop.

Times are of this machine's clock when an event was read: over HTTP, with the server's queue.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import httpx
from httpx_sse import EventSource, SSEError

from llmq.errors import UserError, first_line
from llmq.files import parse_json
from llmq.servers.limits import MOST_ANSWER, MOST_EVENT, Bounded, Order
from llmq.servers.protocol import (
    DONE,
    Arrived,
    Broken,
    Reading,
    Refused,
    Request,
    Stopped,
    Told,
    Usage,
    models_of,
    piece_of,
    read_by,
    words_of,
)
from llmq.servers.reach import Reach
from llmq.servers.served import Served

POLL_SECONDS = 0.1  # between two looks whether to stop
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "llmq"}  # nothing packed, which could unfold to any size


@dataclass(frozen=True)
class Patience:
    """Seconds: until a connection stands, until an answer begins (a queue, a long prompt), between two events, and
    from the end of a text to its usage."""

    connect: float = 5.0
    first: float = 300.0
    between: float = 60.0
    usage: float = 5.0


PATIENCE = Patience()


class Connection:
    """One server's: `models()` lists what it has, `ask(request, model)` asks for an answer. `close()` ends whatever is
    under way. Everything raises UserError in one line that says what happened and holds no key."""

    def __init__(
        self, served: Served, reach: Reach, patience: Patience = PATIENCE,
        clock: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        self.served, self._reach, self._patience, self._clock = served, reach, patience, clock
        self._key = reach.key(served)
        self._loop = asyncio.new_event_loop()
        self._client: httpx.AsyncClient | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()

    def models(self, stopped: Callable[[], bool] = lambda: False) -> tuple[str, ...]:
        """The models that the server offers."""
        return self._wait(self._submit(self._models()), stopped)

    def gauge(self, name: str) -> Future:
        """Ask for the sum of a gauge of the server's `/metrics`, which comes in a while: None where it is not told."""
        return self._submit(self._gauge(name))

    def ask(self, request: Request, model: str) -> Reply:
        """Ask for an answer, which begins to arrive. Raises BadChoice for what this kind of server cannot do."""
        body, arrived = request.body(self.served.dialect, model), SimpleQueue()
        return Reply(self._submit(self._stream(request.path, body, arrived.put)), arrived)

    def read(
        self, reading: Reading, model: str, ids: Sequence[int], stopped: Callable[[], bool] = lambda: False
    ) -> tuple[tuple[Told | None, ...], Usage | None]:
        """What the server tells of a text whose tokens are `ids`; see `protocol.read_by`."""
        body = reading.body(self.served.dialect, model)
        return read_by(self._wait(self._submit(self._post(reading.path, body)), stopped), ids)

    def close(self) -> None:
        """End what is under way, and the connection with it."""
        if self._thread.is_alive():
            self._submit(self._end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # In the thread

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client:
            await self._client.aclose()

    def _asked(self) -> tuple[httpx.AsyncClient, str, dict]:
        """The client, the base of the addresses to ask, and what goes with each request."""
        parts, address = urlsplit(self.served.url), self._reach.address(self.served)
        if self._client is None:
            timeout = httpx.Timeout(self._patience.first, connect=self._patience.connect)
            self._client = httpx.AsyncClient(timeout=timeout, headers=HEADERS, trust_env=address is None)
        with_key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        if address is None:
            return self._client, self.served.url, {"headers": with_key}
        named = f"[{address}]" if ":" in address else address
        port = f":{parts.port}" if parts.port else ""
        checked = {"headers": with_key | {"Host": parts.netloc}, "extensions": {"sni_hostname": parts.hostname}}
        return self._client, f"{parts.scheme}://{named}{port}{parts.path}", checked

    async def _models(self) -> tuple[str, ...]:
        return models_of(await self._get("/models"))

    async def _gauge(self, name: str) -> float | None:
        base = urlsplit(self.served.url).path
        try:
            text = await self._get("/metrics", below=base.removesuffix("/v1"))
            lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
            return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else None
        except (UserError, httpx.HTTPError, ValueError):
            return None

    async def _get(self, path: str, below: str | None = None) -> str:
        """A small text."""
        client, base, asked = await asyncio.to_thread(self._asked)
        if below is not None:
            parts = urlsplit(base)
            base = f"{parts.scheme}://{parts.netloc}{below}"
        async with client.stream("GET", f"{base}{path}", **asked) as response:
            await self._check(response)
            return (await _read(response)).decode("utf-8", "replace")

    async def _post(self, path: str, body: dict) -> str:
        """An answer in one piece."""
        client, base, asked = await asyncio.to_thread(self._asked)
        async with client.stream("POST", f"{base}{path}", json=body, **asked) as response:
            await self._check(response)
            return (await _read(response, MOST_ANSWER)).decode("utf-8", "replace")

    async def _stream(self, path: str, body: dict, arrived: Callable[[Arrived], None]) -> None:
        client, base, asked = await asyncio.to_thread(self._asked)
        asked["headers"] |= {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        sent, order = self._clock(), Order(body["max_tokens"])
        async with client.stream("POST", f"{base}{path}", json=body, **asked) as response:
            await self._check(response)
            response.encoding = "utf-8"
            response.stream = Bounded(response.stream)
            with suppress(httpx.RemoteProtocolError):  # said below: the answer was not over
                async for data in self._events(response, order):
                    piece = piece_of(data)
                    order.add(piece)
                    arrived(Arrived(piece, self._clock() - sent))
        if not order.ended:
            raise Broken(
                f"the server closed the connection before its answer was over, after {order.texts} pieces of it"
            )

    async def _events(self, response: httpx.Response, order: Order) -> AsyncIterator[str]:
        """The data of each event, until the stream is over; after the end of the text only its usage is waited for."""
        events, limit = EventSource(response).aiter_sse(), self._patience.first
        while True:
            try:
                event = await asyncio.wait_for(anext(events), limit)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if order.ended:
                    return
                raise Broken(f"the server has sent nothing for {limit:g} s, and was given up") from None
            if event.event == "error":
                raise UserError(f"the server says: {words_of(event.data)}")
            if event.data == DONE:
                return
            if event.data:
                yield event.data
            limit = self._patience.usage if order.ended else self._patience.between

    async def _check(self, response: httpx.Response) -> None:
        """Raise UserError for an answer that is none."""
        at, status = f"the server at {self.served.host}", response.status_code
        if response.is_redirect:
            there = urlsplit(response.headers.get("location", ""))
            raise UserError(f"{at} sends on to {(there.netloc or there.path)[:100]}; give that address if you trust it")
        if status < 400:
            return
        said = words_of(_as_json(await _read(response)))
        if status in (401, 403):
            wrong = "refuses the key it was given" if self._key else "wants a key"
            raise UserError(f"{at} {wrong} ({status}): {said}")
        raise Refused(f"{at} answers {status}: {said}", status)

    # Between the two

    def _submit(self, work: Coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(self._told(work), self._loop)

    async def _told(self, work: Coroutine) -> Any:
        """What `work` comes to, with what may go wrong on the way in words, without the key."""
        try:
            return await work
        except UserError as error:
            raise self._without_key(error) from error.__cause__
        except SSEError:
            raise UserError(
                f"what answers at {self.served.url} sends no stream of events; is that the address of an API? Most "
                "end in /v1"
            ) from None
        except httpx.HTTPError as error:
            raise UserError(self._without_key_in(self._failure(error))) from None

    def _failure(self, error: httpx.HTTPError) -> str:
        at, wait = f"the server at {self.served.host}", self._patience
        causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        if unfit := next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None):
            return f"the certificate of {at} does not fit: {getattr(unfit, 'verify_message', '') or first_line(unfit)}"
        match error:
            case httpx.ConnectTimeout() | httpx.ConnectError():
                why = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), "")
                return f"no server answers at {self.served.url} ({why or first_line(error)})"
            case httpx.TimeoutException():
                return f"{at} has not answered for {wait.first:g} s, and was given up"
            case _:
                return f"{at} does not answer as it should: {first_line(error)}"

    def _without_key(self, error: UserError) -> UserError:
        error.args = tuple(self._without_key_in(str(part)) for part in error.args)
        return error

    def _without_key_in(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text

    def _wait(self, future: Future, stopped: Callable[[], bool]) -> Any:
        while True:
            try:
                return future.result(POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise
                if stopped():
                    future.cancel()
                    raise Stopped from None


class Reply:
    """An answer that is arriving, however long nobody looks."""

    def __init__(self, running: Future, arrived: SimpleQueue):
        self._running, self._arrived = running, arrived

    def get(self, seconds: float) -> Arrived | None:
        """The next piece, None where none comes within `seconds`, or none any more. Raises Broken where the answer
        ended before its end, UserError where the server says so; what had arrived comes first."""
        with suppress(Empty):
            return self._arrived.get(timeout=seconds) if seconds else self._arrived.get_nowait()
        if self._running.done() and self._arrived.empty():
            self._running.result()
        return None

    @property
    def over(self) -> bool:
        """Whether nothing will come any more."""
        return self._running.done() and self._arrived.empty()

    def close(self) -> None:
        """End it, at the server too."""
        self._running.cancel()


async def _read(response: httpx.Response, most: int = MOST_EVENT) -> bytes:
    """All of an answer that is no stream."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        if (size := size + len(part)) > most:
            raise Broken(f"the server sent more than {most // 10**6} MB")
    return b"".join(parts)


def _as_json(data: bytes) -> Any:
    text = data.decode("utf-8", "replace")
    try:
        return parse_json(text)
    except ValueError:
        return "no reason given" if text.lstrip().startswith("<") else text
