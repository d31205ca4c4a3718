"""Who may do what in a class, and what everybody sees of it. No web framework: a caller gives a code and a token.

What the file holds is in memory, too, and every question is answered from there; a change is made in memory once it is
on the disk. `Classes` may be used by many threads.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmq.classroom.group import Group, Lesson, digest_of
from llmq.classroom.refusals import Full, NoClass, NoToken, NotYours, WrongKey
from llmq.classroom.store import KeptClass, Store
from llmq.errors import BadChoice, UserError, unknown

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZ"  # no 0 and O, no 1 and I
CODE_LENGTH = 6  # a thousand million codes
TOKEN_BYTES = 24
SHORTEST_KEY = 12
MOST_VOTERS, MOST_CLASSES = 500, 200
DAY = 86_400.0
UNUSED_SECONDS, REPLACED_SECONDS = 30 * DAY, DAY
VERSIONS_A_START = 10**9  # more than a server makes, so that its versions are none of the server before it


class Classes:
    """The classes that the file at `path` holds.

    `questions`: the choices of each; `steps`: those of the lesson, see `Lesson`. `key`: the teacher's, else the file's
    own. `clock`: seconds of the epoch. Raises UserError for a file or a key that cannot be used.
    """

    def __init__(
        self, path: Path, questions: Mapping[str, Sequence[str]], steps: Sequence[str],
        clock: Callable[[], float] = time.time, *, key: str | None = None,
    ):  # fmt: skip
        if key is not None and len(key) < SHORTEST_KEY:
            raise UserError(f"the teacher's key has {len(key)} characters; choose {SHORTEST_KEY} at least")
        self.lesson, self._clock = Lesson(questions, tuple(steps)), clock
        self._store = Store(path)
        self.key = key or self._store.key
        self._writing = threading.Lock()  # held through a change, the disk's part of it too
        self._memory = threading.Lock()  # held for microseconds: whoever asks waits for no disk
        now = clock()
        self._store.expire(now - UNUSED_SECONDS, now)
        kept, self._ended = self._store.load()
        self._first_version = self._store.starts * VERSIONS_A_START + 1
        self._classes = {one.code: Group(one, self._first_version) for one in kept}

    def close(self) -> None:
        self._store.close()

    def is_class(self, code: str) -> bool:
        return code in self._classes

    def was_class(self, code: str) -> bool:
        return code in self._ended

    def is_member(self, code: str, token: str) -> bool:
        """Whether `token` is the teacher's or a student's of this class."""
        group, digest = self._classes.get(code), digest_of(token)
        return group is not None and (digest in group.kept.voters or hmac.compare_digest(digest, group.kept.teacher))

    def _found(self, code: str) -> Group:
        if group := self._classes.get(code):
            return group
        if code in self._ended:
            raise NoClass(f"the class {code} has ended; ask the teacher for the new one")
        raise NoClass(f"there is no class {code:.20}; ask the teacher for its code")

    def _asked(self, code: str, token: str) -> tuple[Group, int | None]:
        """The class and the number of the voter who asks; None for its teacher."""
        group, digest = self._found(code), digest_of(token)
        if hmac.compare_digest(digest, group.kept.teacher):
            return group, None
        if (voter := group.kept.voters.get(digest)) is None:
            raise NoToken("this token is nobody's in this class; join it again")
        return group, voter

    def _led(self, code: str, token: str) -> Group:
        group, voter = self._asked(code, token)
        if voter is not None:
            raise NotYours("this is for the teacher of the class")
        return group

    def teach(self, key: str) -> tuple[str, str]:
        """Make a class for whoever has the teacher's key; return its code and its teacher's token."""
        if not hmac.compare_digest(key.encode("utf-8", "replace"), self.key.encode("utf-8", "replace")):
            raise WrongKey("this is not the teacher's key; the server printed the teacher's link when it started")
        with self._writing:
            now, token = self._clock(), secrets.token_urlsafe(TOKEN_BYTES)
            self._make_room(now)
            kept = KeptClass(self._new_code(), digest_of(token), made=now, changed=now)
            self._store.add_class(kept)
            with self._memory:
                self._classes[kept.code] = Group(kept, self._first_version)
        return kept.code, token

    def _new_code(self) -> str:
        while True:
            code = "".join(secrets.choice(ALPHABET) for _ in range(CODE_LENGTH))
            if code not in self._classes and code not in self._ended:
                return code

    def _make_room(self, now: float) -> None:
        """Drop the class that has been left alone for the longest where there are too many."""
        if len(self._classes) < MOST_CLASSES:
            return
        oldest = min(self._classes.values(), key=lambda group: group.kept.changed)
        if now - oldest.kept.changed < REPLACED_SECONDS:
            raise Full(f"this server has {MOST_CLASSES} classes, all of today; end one of yours, or come back tomorrow")
        self._end(oldest.kept.code, now)

    def _end(self, code: str, now: float) -> None:
        self._store.end(code, now)
        with self._memory:
            del self._classes[code]
            self._ended.add(code)

    def join(self, code: str) -> str:
        """Return the token of a new voter."""
        with self._writing:
            kept, now, token = self._found(code).kept, self._clock(), secrets.token_urlsafe(TOKEN_BYTES)
            if len(kept.voters) >= MOST_VOTERS:
                raise Full(f"this class has {MOST_VOTERS} students, which is the most; ask the teacher for a new one")
            voter = self._store.add_voter(code, digest_of(token), now)
            with self._changed(code, now) as group:
                group.kept.voters[digest_of(token)] = voter
                group.hear(voter, now)
        return token

    def vote(self, code: str, token: str, question: str, choice: str) -> tuple[bool, str]:
        """Count a vote, the first of a voter on a question; return whether it was, and the first one's choice."""
        with self._writing:
            group, voter = self._asked(code, token)
            if voter is None:
                raise NotYours("the teacher has no vote")
            self.lesson.check(question, choice)
            if (first := group.vote_of(question, voter)) is not None:
                return False, first
            now = self._clock()
            self._store.add_vote(code, question, voter, choice, now)
            with self._changed(code, now) as group:
                group.count(question, voter, choice)
                group.hear(voter, now)
        return True, choice

    def lead(self, code: str, token: str, changes: Mapping[str, Any]) -> dict:
        """Go to the `step` of `changes` (None: everybody walks alone), and say whether it is `revealed`; what is not in
        `changes` stays, and every step keeps whether it was. Returns the state."""
        with self._writing:
            kept = self._led(code, token).kept
            step = changes.get("step", kept.step)
            if step is not None and step not in self.lesson.steps:
                raise unknown("step", str(step)[:80], self.lesson.steps)
            revealed = set(kept.revealed)
            if (shown := changes.get("revealed")) is not None:
                if step is None and shown:
                    raise BadChoice("nothing can be revealed while everybody walks alone; choose a step first")
                revealed = revealed | {step} if shown else revealed - {step}
            if (step, revealed) != (kept.step, kept.revealed):
                now = self._clock()
                self._store.lead(code, step, revealed, now)
                with self._changed(code, now):
                    kept.step, kept.revealed = step, revealed
        return self.state(code, token)

    def reset(self, code: str, token: str, question: str | None = None) -> dict:
        """Delete all votes, or those on one question, and hide what its step had revealed: whoever votes now has seen
        no count since. Returns the state."""
        with self._writing:
            kept, now = self._led(code, token).kept, self._clock()
            if question is not None:
                self.lesson.check(question)
            questions = {*self.lesson.questions, *kept.votes} if question is None else {question}
            hidden = set(kept.revealed) if question is None else {self.lesson.step_of(question)}
            self._store.reset(code, questions, hidden, now)
            with self._changed(code, now) as group:
                for name in questions:
                    group.uncount(name)
                kept.revealed -= hidden
        return self.state(code, token)

    def end(self, code: str, token: str) -> None:
        """Delete the class and all that it has."""
        with self._writing:
            self._led(code, token)
            self._end(code, self._clock())

    @contextmanager
    def _changed(self, code: str, now: float) -> Iterator[Group]:
        """The class, to be changed in memory as it was on the disk."""
        with self._memory:
            group = self._classes[code]
            yield group
            group.kept.changed = now
            group.version += 1

    def state(self, code: str, token: str, seen: int | None = None) -> dict:
        """What a member sees of the class; its version alone where that is `seen`."""
        with self._memory:
            group, voter = self._asked(code, token)
            now = self._clock()
            if voter is not None:
                group.hear(voter, now)
            group.count_here(now)
            return {"version": seen} if seen == group.version else group.shown(self.lesson, voter)

    def export(self, code: str, token: str) -> dict:
        """All counts of a class, for its teacher, with its code and the day (UTC) on which it was made."""
        with self._memory:
            group = self._led(code, token)
            made = datetime.fromtimestamp(group.kept.made, UTC)
            counts = {question: group.counts_of(self.lesson, question) for question in self.lesson.questions}
            return {"class": code, "date": f"{made:%Y-%m-%d}", "students": len(group.kept.voters), "votes": counts}
