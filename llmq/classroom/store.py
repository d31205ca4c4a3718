"""Where classes are kept: one SQLite file, whole after a kill and after a power failure. It knows no rule.

A change is on the disk when the method that makes it returns, or it is not made at all. One process has the file, by
SQLite's own lock, which the system takes back however the process ends.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from llmq.errors import UserError

VERSION = 1  # of the tables
APPLICATION = int.from_bytes(b"llmq")
BUSY_SECONDS = 3.0  # a server that has been told to end still has the file for two
KEY_BYTES = 12  # of a teacher's key that is made here; 16 characters
TABLES = """
CREATE TABLE server (key TEXT NOT NULL, starts INTEGER NOT NULL);
CREATE TABLE class (
    code TEXT PRIMARY KEY, teacher BLOB NOT NULL, made REAL NOT NULL, changed REAL NOT NULL, step TEXT
) WITHOUT ROWID;
CREATE TABLE revealed (class TEXT, step TEXT, PRIMARY KEY (class, step)) WITHOUT ROWID;
CREATE TABLE voter (number INTEGER PRIMARY KEY AUTOINCREMENT, class TEXT NOT NULL, token BLOB NOT NULL UNIQUE);
CREATE INDEX voter_of ON voter (class);
CREATE TABLE vote (
    class TEXT, question TEXT, voter INTEGER, choice TEXT NOT NULL, PRIMARY KEY (class, question, voter)
) WITHOUT ROWID;
CREATE TABLE ended (code TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
"""
PARTS = ("vote", "voter", "revealed")  # tables with rows of a class


class NotKept(UserError):
    """A change that could not be written down, and was not made."""


@dataclass
class KeptClass:
    """A class as the file has it. `teacher` and the keys of `voters` are digests of tokens."""

    code: str
    teacher: bytes
    made: float
    changed: float
    step: str | None = None
    revealed: set[str] = field(default_factory=set)
    voters: dict[bytes, int] = field(default_factory=dict)
    votes: dict[str, dict[int, str]] = field(default_factory=dict)  # question -> voter -> choice


class Store:
    """The open file. Raises UserError, in one line, for a file that cannot be it.

    `key`: the teacher's key, made with the file; `starts`: how often the file has been opened before.
    """

    def __init__(self, path: Path):
        self._lock, self._db = threading.Lock(), None
        try:
            self._db = _connect(path.absolute())  # SQLite has names of its own, ':memory:' for one
            self.key, self.starts = self._begin()
        except (OSError, sqlite3.Error, NotKept) as error:
            self.close()
            why = _why(error.__cause__ if isinstance(error, NotKept) else error)
            raise UserError(f"cannot keep classes in {path}: {why}; choose another --class-file") from error

    def _begin(self) -> tuple[str, int]:
        with self._writing() as db:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in TABLES.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO server VALUES (?, -1)", (secrets.token_urlsafe(KEY_BYTES),))
                db.execute(f"PRAGMA application_id = {APPLICATION}")
                db.execute(f"PRAGMA user_version = {VERSION}")
            db.execute("UPDATE server SET starts = starts + 1")
            return db.execute("SELECT key, starts FROM server").fetchone()

    def load(self) -> tuple[list[KeptClass], set[str]]:
        """All classes, and the codes of those that have ended."""
        with self._lock:
            db = self._open()
            rows = db.execute("SELECT code, teacher, made, changed, step FROM class")
            found = {row[0]: KeptClass(*row) for row in rows}
            for code, step in db.execute("SELECT class, step FROM revealed"):
                found[code].revealed.add(step)
            for code, token, number in db.execute("SELECT class, token, number FROM voter"):
                found[code].voters[token] = number
            for code, question, voter, choice in db.execute("SELECT class, question, voter, choice FROM vote"):
                found[code].votes.setdefault(question, {})[voter] = choice
            return list(found.values()), {code for (code,) in db.execute("SELECT code FROM ended")}

    def add_class(self, kept: KeptClass) -> None:
        with self._writing() as db:
            row = (kept.code, kept.teacher, kept.made, kept.changed)
            db.execute("INSERT INTO class (code, teacher, made, changed) VALUES (?, ?, ?, ?)", row)

    def add_voter(self, code: str, token: bytes, now: float) -> int:
        """Return the voter's number, which no other has or had."""
        with self._changing(code, now) as db:
            return db.execute("INSERT INTO voter (class, token) VALUES (?, ?)", (code, token)).lastrowid

    def add_vote(self, code: str, question: str, voter: int, choice: str, now: float) -> None:
        with self._changing(code, now) as db:
            db.execute("INSERT INTO vote VALUES (?, ?, ?, ?)", (code, question, voter, choice))

    def lead(self, code: str, step: str | None, revealed: Iterable[str], now: float) -> None:
        with self._changing(code, now) as db:
            db.execute("UPDATE class SET step = ? WHERE code = ?", (step, code))
            db.execute("DELETE FROM revealed WHERE class = ?", (code,))
            db.executemany("INSERT INTO revealed VALUES (?, ?)", [(code, name) for name in revealed])

    def reset(self, code: str, questions: Iterable[str], hidden: Iterable[str], now: float) -> None:
        """Delete the votes on `questions`, and that the steps `hidden` were revealed."""
        with self._changing(code, now) as db:
            db.executemany("DELETE FROM vote WHERE class = ? AND question = ?", [(code, name) for name in questions])
            db.executemany("DELETE FROM revealed WHERE class = ? AND step = ?", [(code, name) for name in hidden])

    def end(self, code: str, now: float) -> None:
        """Delete all that a class has; its code is not given again."""
        with self._writing() as db:
            _delete(db, code, now)

    def expire(self, before: float, now: float) -> None:
        """End the classes whose last change was `before`, and forget codes of classes that ended before that."""
        with self._writing() as db:
            for (code,) in db.execute("SELECT code FROM class WHERE changed < ?", (before,)).fetchall():
                _delete(db, code, now)
            db.execute("DELETE FROM ended WHERE at < ?", (before,))

    def close(self) -> None:
        with self._lock:
            if self._db:
                self._db.close()
            self._db = None

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise NotKept("the server is about to end; ask again when it is back")
        return self._db

    @contextmanager
    def _changing(self, code: str, now: float) -> Iterator[sqlite3.Connection]:
        with self._writing() as db:
            db.execute("UPDATE class SET changed = ? WHERE code = ?", (now, code))
            yield db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, committed at the block's end and undone by any failure. Raises NotKept."""
        with self._lock:
            db = self._open()
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException as error:
                if db.in_transaction:  # SQLite itself undoes it after some failures
                    with suppress(sqlite3.Error):
                        db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise NotKept(f"this was not kept: {_why(error)}; tell whoever runs the server") from error
                raise


def _connect(path: Path) -> sqlite3.Connection:
    """The file, made for its owner alone where there is none, as this process's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        _check(db)
        os.chmod(path, 0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
    except BaseException:
        db.close()
        raise
    return db


def _check(db: sqlite3.Connection) -> None:
    """Raise UserError for a database that is another program's or another version's, before anything is changed."""
    (application,), (version,) = (
        db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION:
        raise sqlite3.DatabaseError("it is another program's database")
    if tables and version != VERSION:
        raise sqlite3.DatabaseError(f"it is of version {version}, and this program reads version {VERSION}")
    if tables and (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise sqlite3.DatabaseError(f"it is damaged ({' '.join(found.split())})")


def _delete(db: sqlite3.Connection, code: str, now: float) -> None:
    for table in PARTS:
        db.execute(f"DELETE FROM {table} WHERE class = ?", (code,))
    db.execute("DELETE FROM class WHERE code = ?", (code,))
    db.execute("INSERT OR REPLACE INTO ended VALUES (?, ?)", (code, now))


def _why(error: BaseException | None) -> str:
    """What went wrong, in words without a path."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # of an extended code the kind
    if code == sqlite3.SQLITE_BUSY:
        return "another process serves it"
    if code == sqlite3.SQLITE_FULL:
        return "the disk is full"
    return str(getattr(error, "strerror", None) or error)
