"""A model hub on 127.0.0.1: as much of its protocol as a download needs, and its ways of saying no."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

PIECE = 100  # bytes
PIECE_SECONDS = 0.5


class Hub:
    """Serves `repositories`: id -> folder, and (id, revision) -> folder. `refusals`: id -> (status, X-Error-Code), for
    the question after the repository; `file_refusals`: for its files only, as a gated repository has. `broken`:
    ids whose answer breaks off. `requests` lists (method, path), `tokens` what each was signed with. While `slow` is
    set files come a piece at a time; `trickled` counts those pieces."""

    def __init__(self, repositories=None, refusals=None, file_refusals=None, broken=()):
        self.repositories, self.refusals = repositories or {}, refusals or {}
        self.file_refusals, self.broken = file_refusals or {}, broken
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[str | None] = []
        self.slow, self.trickled = threading.Event(), 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path))
        self.tokens.append(request.headers.get("Authorization"))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        asks_for_a_file = not path.startswith("/api/")
        refusal = self.file_refusals.get(repository) if asks_for_a_file else self.refusals.get(repository)
        if repository in self.broken:
            request.connection.close()
        elif refusal or repository not in self.repositories:
            status, code = refusal or (404, "RepoNotFound")
            _send(request, b"", status, {"X-Error-Code": code} if code else {})
        elif (folder := self._folder(repository, rest)) is None:
            _send(request, b"", 404, {"X-Error-Code": "RevisionNotFound"})
        elif asks_for_a_file:
            self._send_file(request, folder, "/".join(rest[2:]))
        elif rest[:1] == ["tree"]:
            _send(request, json.dumps([_entry(folder, file) for file in _files(folder)]).encode())
        else:
            siblings = [{"rfilename": str(f.relative_to(folder)), "size": f.stat().st_size} for f in _files(folder)]
            _send(request, json.dumps({"id": repository, "sha": commit_of(folder), "siblings": siblings}).encode())

    def _folder(self, repository: str, rest: list[str]) -> Path | None:
        """The folder that `rest` of an address asks for: main's, or that of the revision or commit it names."""
        revision = unquote(rest[1]) if rest else "main"
        known = {"main": self.repositories[repository]}
        known |= {key[1]: folder for key, folder in self.repositories.items() if key[0] == repository}
        known |= {commit_of(folder): folder for folder in known.values()}
        return Path(known[revision]) if revision in known else None

    def _send_file(self, request, folder: Path, name: str) -> None:
        commit = {"X-Repo-Commit": commit_of(folder)}
        if not (folder / name).is_file():
            return _send(request, b"", 404, {"X-Error-Code": "EntryNotFound"} | commit)
        data = (folder / name).read_bytes()
        _send(request, data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'} | commit, self._pieces)

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        while data and self.slow.is_set():
            yield data[:PIECE]
            data, self.trickled = data[PIECE:], self.trickled + 1
            time.sleep(PIECE_SECONDS)
        yield data


def commit_of(folder) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, file: Path) -> dict:
    data = file.read_bytes()
    path = str(file.relative_to(folder))
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _send(request, data: bytes, status=200, headers: dict | None = None, pieces=lambda data: [data]) -> None:
    request.send_response(status)
    for name, value in (
        {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
    ).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        with suppress(ConnectionError):  # whoever asked has gone
            for piece in pieces(data):
                request.wfile.write(piece)
