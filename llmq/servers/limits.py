"""What a stream may be: no event larger than it can be, no piece twice, none more than were asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx

from llmq.servers.protocol import Broken, Piece

MOST_EVENT = 1_000_000  # bytes of one event
MOST_ANSWER = 64_000_000  # bytes of a whole answer


@dataclass
class Order:
    """Whether the pieces of an answer come in order: none twice, no more than were asked for."""

    most: int
    texts: int = 0
    ended: bool = False
    last: Piece = Piece()

    def add(self, piece: Piece) -> None:
        """Take a piece in. Raises Broken where it cannot come now."""
        if piece.offset is not None:
            known = self.last.offset if self.last.offset is not None else -1
            if piece.offset < known or (piece.offset == known and self.last.text):
                raise Broken("the server sent a part of its text twice")
            self.last = piece
        self.texts += bool(piece.text)
        if self.texts > self.most:
            raise Broken(f"the server writes on after the {self.most} tokens that it was asked for")
        self.ended = self.ended or bool(piece.end)


class Bounded(httpx.AsyncByteStream):
    """A stream in which no event and no answer is larger than it can be."""

    def __init__(self, stream: httpx.AsyncByteStream):
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        line = whole = 0
        async for part in self._stream:
            whole += len(part)
            line = line + len(part) if b"\n" not in part else len(part) - part.rfind(b"\n")
            if line > MOST_EVENT or len(part) > MOST_EVENT:
                raise Broken(f"the server sent more than {MOST_EVENT // 10**6} MB as one event")
            if whole > MOST_ANSWER:
                raise Broken(f"the server sent more than {MOST_ANSWER // 10**6} MB as one answer")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
