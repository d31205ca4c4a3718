"""One class in memory: who is here, who has voted for what, and how much of that each of its members sees."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmq.classroom.store import KeptClass
from llmq.errors import unknown
from llmq.scores import chance_range

HERE_SECONDS = 60.0  # who asked within these is here


def digest_of(token: str) -> bytes:
    """What is kept of a token: nobody who reads the file can ask in another's name."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


@dataclass(frozen=True)
class Lesson:
    """What is asked: the choices of each question, and the steps in their order. A question is of the step that has its
    name, or its name before a hyphen: 'quiz-1' is of 'quiz'."""

    questions: Mapping[str, Sequence[str]]
    steps: tuple[str, ...]

    def __post_init__(self):
        for question in self.questions:
            self.step_of(question)

    def step_of(self, question: str) -> str:
        found = [step for step in self.steps if question == step or question.startswith(f"{step}-")]
        assert found, f"the question {question!r} is of no step of {', '.join(self.steps)}"
        return max(found, key=len)

    def check(self, question: str, choice: str | None = None) -> None:
        """Raise BadChoice for a question, or a choice of it, that there is not."""
        if question not in self.questions:
            raise unknown("question", question[:80], self.questions)
        if choice is not None and choice not in self.questions[question]:
            raise unknown(f"choice of {question}", choice[:80], self.questions[question])


@dataclass
class Group:
    """A class. `heard`: when each voter last asked, who asked last at the end; `here`: the people that `shown` tells
    of; `counts`: of the votes on each question."""

    kept: KeptClass
    version: int
    heard: OrderedDict[int, float] = field(default_factory=OrderedDict)
    here: int = 0
    counts: dict[str, Counter[str]] = field(init=False)

    def __post_init__(self):
        self.counts = {question: Counter(votes.values()) for question, votes in self.kept.votes.items()}

    def hear(self, voter: int, now: float) -> None:
        self.heard[voter] = now
        self.heard.move_to_end(voter)

    def count_here(self, now: float) -> None:
        """Forget who has not asked for a while; another number of people is a change."""
        while self.heard and now - next(iter(self.heard.values())) > HERE_SECONDS:
            self.heard.popitem(last=False)
        if len(self.heard) != self.here:
            self.here = len(self.heard)
            self.version += 1

    def count(self, question: str, voter: int, choice: str) -> None:
        self.kept.votes.setdefault(question, {})[voter] = choice
        self.counts.setdefault(question, Counter())[choice] += 1

    def uncount(self, question: str) -> None:
        self.kept.votes.pop(question, None)
        self.counts.pop(question, None)

    def vote_of(self, question: str, voter: int | None) -> str | None:
        return self.kept.votes.get(question, {}).get(voter)

    def counts_of(self, lesson: Lesson, question: str) -> dict[str, int]:
        """Votes for each choice."""
        counted = self.counts.get(question, Counter())
        return {choice: counted[choice] for choice in lesson.questions[question]}

    def shown(self, lesson: Lesson, voter: int | None) -> dict:
        """What a voter sees of the class; None: its teacher."""
        step = self.kept.step if self.kept.step in lesson.steps else None  # a later lesson may have lost it
        return {
            "version": self.version,
            "step": step,
            "revealed": step in self.kept.revealed,
            "people": self.here,
            "teacher": voter is None,
            "votes": {question: self._tally(lesson, question, voter) for question in lesson.questions},
        }

    def _tally(self, lesson: Lesson, question: str, voter: int | None) -> dict:
        """Of one question: how many have voted; how, for whom that cannot lead any more; and how many would be right if
        all had guessed."""
        counts, yours = self.counts_of(lesson, question), self.vote_of(question, voter)
        shown = voter is None or yours is not None or lesson.step_of(question) in self.kept.revealed
        votes = sum(counts.values())
        return {
            "votes": votes,
            "counts": counts if shown else None,
            "yours": yours,
            "chance": chance_range(votes, len(counts)),
        }
