"""A class without a server: what is kept and survives, who may what, who sees which count."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from browser_support import ROOT
from scripted import Clock

from llmq.classroom import classes as rules
from llmq.classroom.classes import ALPHABET, CODE_LENGTH, DAY, Classes
from llmq.classroom.refusals import Full, NoClass, NoToken, NotYours, WrongKey
from llmq.classroom.store import NotKept
from llmq.errors import BadChoice, UserError

QUESTIONS = {"quiz-1": ("left", "right"), "quiz-2": ("left", "right"), "outliers": ("none", "few", "many")}
STEPS = ("welcome", "quiz", "outliers")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "classes.sqlite3"


@pytest.fixture
def opened(file, clock):
    """Open the file once more, as a server that is started again does."""
    found: list[Classes] = []

    def open_again(**options) -> Classes:
        for old in found:
            old.close()
        found.append(Classes(file, QUESTIONS, STEPS, clock, **options))
        return found[-1]

    yield open_again
    for old in found:
        old.close()


@pytest.fixture
def classes(opened) -> Classes:
    return opened()


def tally(state: dict, question: str = "quiz-1") -> tuple:
    found = state["votes"][question]
    return found["votes"], found["counts"], found["yours"]


def test_a_class_has_a_code_to_be_read_aloud_and_tokens_that_nobody_guesses(classes):
    code, teacher = classes.teach(classes.key)
    student = classes.join(code)
    assert len(code) == CODE_LENGTH == 6 and set(code) <= set(ALPHABET) and not set("01IO") & set(ALPHABET)
    assert len(ALPHABET) == len(set(ALPHABET)) == 32
    assert len({teacher, student, classes.join(code)}) == 3 and min(map(len, (teacher, student))) == 32


def test_whoever_has_not_the_key_makes_no_class(classes, opened):
    with pytest.raises(WrongKey, match="not the teacher's key"):
        classes.teach(classes.key + "x")
    assert len(classes.key) >= 12
    other = opened(key="a key of one's own é")
    assert other.teach("a key of one's own é")
    with pytest.raises(WrongKey):
        other.teach(classes.key)
    with pytest.raises(UserError, match="has 11 characters; choose 12"):
        opened(key="x" * 11)
    assert opened().key == classes.key, "the file's own is there again"


def test_the_first_vote_counts_and_a_later_one_is_told_which_it_was(classes):
    code, teacher = classes.teach(classes.key)
    student = classes.join(code)
    assert classes.vote(code, student, "quiz-1", "left") == (True, "left")
    version = classes.state(code, student)["version"]
    assert classes.vote(code, student, "quiz-1", "right") == (False, "left")
    assert classes.state(code, student, version) == {"version": version}, "nothing has changed"
    assert tally(classes.state(code, teacher)) == (1, {"left": 1, "right": 0}, None)


@pytest.mark.parametrize(
    ("question", "choice", "words"),
    [("nope", "left", "unknown question 'nope'; choose from quiz-1, quiz-2, outliers"),
     ("quiz-1", "up", "unknown choice of quiz-1 'up'; choose from left, right"),
     ("quiz-1", "many", "'many'"), ("x" * 900, "left", "'" + "x" * 80 + "'")],
)  # fmt: skip
def test_what_cannot_be_voted_for_is_refused_by_name(classes, question, choice, words):
    code, _ = classes.teach(classes.key)
    with pytest.raises(BadChoice) as refused:
        classes.vote(code, classes.join(code), question, choice)
    assert words in str(refused.value)


def test_a_student_sees_counts_after_voting_or_once_the_teacher_has_revealed_them(classes):
    code, teacher = classes.teach(classes.key)
    ann, bob = classes.join(code), classes.join(code)
    classes.vote(code, ann, "quiz-1", "left")
    counts = {"left": 1, "right": 0}
    assert tally(classes.state(code, ann)) == (1, counts, "left")
    assert tally(classes.state(code, bob)) == (1, None, None), "how many, not how"
    assert tally(classes.state(code, ann), "quiz-2") == (0, None, None)
    assert tally(classes.state(code, teacher)) == (1, counts, None)

    classes.lead(code, teacher, {"step": "outliers", "revealed": True})
    assert tally(classes.state(code, bob)) == (1, None, None), "another step was revealed"
    classes.lead(code, teacher, {"step": "quiz"})
    assert classes.state(code, bob)["revealed"] is False and tally(classes.state(code, bob)) == (1, None, None)
    classes.lead(code, teacher, {"revealed": True})
    assert tally(classes.state(code, bob)) == (1, counts, None)
    classes.lead(code, teacher, {"step": None})
    state = classes.state(code, bob)
    assert (state["step"], state["revealed"], tally(state)) == (None, False, (1, counts, None)), "it was revealed"
    classes.lead(code, teacher, {"step": "quiz", "revealed": False})
    assert tally(classes.state(code, bob)) == (1, None, None)


def test_what_the_teacher_cannot_lead_to_is_refused_by_name(classes):
    code, teacher = classes.teach(classes.key)
    before = classes.state(code, teacher)
    with pytest.raises(BadChoice, match="unknown step 'nope'; choose from welcome, quiz, outliers"):
        classes.lead(code, teacher, {"step": "nope"})
    with pytest.raises(BadChoice, match="choose a step first"):
        classes.lead(code, teacher, {"step": None, "revealed": True})
    assert classes.state(code, teacher) == before == classes.lead(code, teacher, {"step": None, "revealed": False})


def test_two_teachers_have_two_classes_and_neither_reaches_the_other_s(classes):
    (one, ann), (other, bob) = (classes.teach(classes.key) for _ in range(2))
    student = classes.join(one)
    classes.vote(one, student, "quiz-1", "left")
    for stranger in (bob, classes.join(other), "", "x" * 5000, "\ud800"):
        assert not classes.is_member(one, stranger)
        for ask in asked_of(classes, one):
            with pytest.raises(NoToken):
                ask(stranger)
    assert tally(classes.state(other, bob)) == (0, {"left": 0, "right": 0}, None)
    assert tally(classes.state(one, ann)) == (1, {"left": 1, "right": 0}, None)
    assert classes.is_member(one, ann) and classes.is_member(one, student)


def asked_of(classes: Classes, code: str) -> list[Callable[[str], object]]:
    """All that a token may be used for."""
    return [
        lambda token: classes.state(code, token),
        lambda token: classes.vote(code, token, "quiz-1", "left"),
        *asked_of_teachers(classes, code),
    ]


def asked_of_teachers(classes: Classes, code: str) -> list[Callable[[str], object]]:
    return [
        lambda token: classes.lead(code, token, {"step": "quiz"}),
        lambda token: classes.reset(code, token),
        lambda token: classes.export(code, token),
        lambda token: classes.end(code, token),
    ]


def test_a_student_does_not_lead_and_the_teacher_does_not_vote(classes):
    code, teacher = classes.teach(classes.key)
    student = classes.join(code)
    before = classes.state(code, student)
    for ask in asked_of_teachers(classes, code):
        with pytest.raises(NotYours, match="for the teacher"):
            ask(student)
    with pytest.raises(NotYours, match="no vote"):
        classes.vote(code, teacher, "quiz-1", "left")
    assert classes.state(code, student) == before


def test_a_reset_forgets_the_votes_and_hides_what_was_revealed(classes, opened):
    code, teacher = classes.teach(classes.key)
    student = classes.join(code)
    for question in QUESTIONS:
        classes.vote(code, student, question, QUESTIONS[question][1])
    for step in ("outliers", "quiz"):
        classes.lead(code, teacher, {"step": step, "revealed": True})
    state = classes.reset(code, teacher, "quiz-1")
    assert [state["votes"][question]["votes"] for question in QUESTIONS] == [0, 1, 1] and not state["revealed"]
    assert tally(classes.state(code, student)) == (0, None, None)
    assert classes.vote(code, student, "quiz-1", "left") == (True, "left"), "nobody has voted"
    with pytest.raises(BadChoice, match="unknown question 'nope'"):
        classes.reset(code, teacher, "nope")
    classes.reset(code, teacher)
    for again in (lambda: classes, opened):
        state = again().state(code, teacher)
        assert [found["votes"] for found in state["votes"].values()] == [0, 0, 0]
    assert opened().lead(code, teacher, {"step": "outliers"})["revealed"] is False


def test_what_has_ended_is_gone_and_its_code_is_told_apart_from_a_wrong_one(classes, opened, file):
    code, teacher = classes.teach(classes.key)
    student = classes.join(code)
    classes.vote(code, student, "quiz-1", "left")
    classes.end(code, teacher)
    for find in (lambda: classes, opened):
        again = find()
        assert not again.is_class(code) and again.was_class(code)
        with pytest.raises(NoClass, match="has ended"):
            again.state(code, student)
    with pytest.raises(NoClass, match="there is no class ABCDEF"):
        again.join("ABCDEF")
    again.close()
    with sqlite3.connect(file) as db:
        counts = {
            table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("class", "voter", "vote")
        }
    assert set(counts.values()) == {0}


def test_the_version_grows_with_whatever_a_member_sees_and_with_nothing_else(classes, clock):
    code, teacher = classes.teach(classes.key)
    student = classes.join(code)
    versions = [classes.state(code, student)["version"]]

    def told() -> bool:
        """Whether the student was told something new."""
        state = classes.state(code, student, versions[-1])
        assert (len(state) > 1) == (state["version"] > versions[-1])
        versions.append(state["version"])
        return len(state) > 1

    assert not told()
    changes = [
        lambda: classes.vote(code, student, "quiz-1", "left"), lambda: classes.lead(code, teacher, {"step": "quiz"}),
        lambda: classes.lead(code, teacher, {"revealed": True}), lambda: classes.reset(code, teacher, "quiz-1"),
        lambda: classes.join(code),
    ]  # fmt: skip
    for change in changes:
        change()
        assert told() and not told()
    classes.lead(code, teacher, {"step": "quiz"})
    assert not told(), "it was there already"
    clock.take(61)
    assert told(), "somebody has gone"


def test_people_are_the_students_who_asked_within_a_minute(classes, clock):
    code, teacher = classes.teach(classes.key)
    ann, bob = classes.join(code), classes.join(code)
    assert classes.state(code, teacher)["people"] == 2
    clock.take(40)
    classes.state(code, ann)
    clock.take(40)
    assert classes.state(code, teacher)["people"] == 1
    assert classes.state(code, bob)["people"] == 2


def test_a_server_that_starts_again_goes_on(classes, opened):
    code, teacher = classes.teach(classes.key)
    student, key = classes.join(code), classes.key
    classes.vote(code, student, "quiz-1", "left")
    classes.lead(code, teacher, {"step": "quiz", "revealed": True})
    before = classes.state(code, student)
    again = opened()
    after = again.state(code, student)
    assert again.key == key and after.pop("version") > before.pop("version") and after == before
    assert again.vote(code, student, "quiz-1", "right") == (False, "left")
    assert again.lead(code, teacher, {"step": None})["teacher"]


def test_nothing_about_a_person_is_in_the_file_and_no_token(classes, opened, file):
    code, teacher = classes.teach(classes.key)
    student = classes.join(code)
    classes.vote(code, student, "quiz-1", "left")
    written = b"".join(part.read_bytes() for part in file.parent.iterdir())
    assert teacher.encode() not in written and student.encode() not in written and code.encode() in written
    assert {stat.S_IMODE(part.stat().st_mode) for part in file.parent.iterdir()} == {0o600}
    classes.close()
    with sqlite3.connect(file) as db:
        columns = {row[1] for (table,) in tables(db) for row in db.execute(f"PRAGMA table_info({table})")}
    assert columns == {
        "key", "starts", "code", "teacher", "made", "changed", "step", "class", "number", "token", "question", "voter",
        "choice", "at",
    }  # fmt: skip


def tables(db: sqlite3.Connection) -> list:
    return db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'").fetchall()


def test_a_file_that_others_could_read_is_closed_to_them(opened, file):
    opened().close()
    file.chmod(0o644)
    opened()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_class_and_a_server_have_so_much_room(classes, clock, monkeypatch):
    monkeypatch.setattr(rules, "MOST_VOTERS", 2)
    monkeypatch.setattr(rules, "MOST_CLASSES", 2)
    (first, _), (second, teacher) = (classes.teach(classes.key) for _ in range(2))
    for _ in range(2):
        classes.join(first)
    with pytest.raises(Full, match="has 2 students"):
        classes.join(first)
    with pytest.raises(Full, match="has 2 classes"):
        classes.teach(classes.key)
    clock.take(DAY / 2)
    classes.lead(second, teacher, {"step": "quiz"})
    clock.take(DAY / 2 + 1)
    classes.teach(classes.key)
    assert (classes.is_class(first), classes.was_class(first), classes.is_class(second)) == (False, True, True)


def test_classes_that_nobody_uses_for_a_month_are_gone_at_the_next_start(classes, opened, clock):
    (old, _), (used, _) = (classes.teach(classes.key) for _ in range(2))
    clock.take(20 * DAY)
    classes.join(used)
    clock.take(10 * DAY + 1)
    again = opened()
    assert (again.is_class(old), again.was_class(old), again.is_class(used)) == (False, True, True)
    clock.take(31 * DAY)
    again = opened()
    assert not again.was_class(old) and again.was_class(used)


def test_votes_for_what_the_lesson_no_longer_asks_stay_and_are_not_told(file, clock):
    older = Classes(file, QUESTIONS | {"quiz-3": ("left", "right")}, (*STEPS, "lost"), clock)
    code, teacher = older.teach(older.key)
    student = older.join(code)
    older.vote(code, student, "quiz-3", "left")
    older.lead(code, teacher, {"step": "lost", "revealed": True})
    older.close()
    classes = Classes(file, QUESTIONS | {"outliers": ("all", "none")}, STEPS, clock)
    state = classes.state(code, student)
    assert (state["step"], state["revealed"], state["votes"].keys()) == (None, False, QUESTIONS.keys())
    classes.close()


def test_a_question_that_is_of_no_step_is_a_mistake_of_the_lesson(tmp_path):
    with pytest.raises(AssertionError, match="'other' is of no step of welcome, quiz"):
        Classes(tmp_path / "x", {"other": ("a", "b")}, ("welcome", "quiz"))


def test_many_vote_at_once_and_every_vote_is_counted_once(classes, opened):
    code, teacher = classes.teach(classes.key)
    tokens = [classes.join(code) for _ in range(12)]
    told: list[tuple[bool, str]] = []

    def vote(number: int) -> None:
        for token in tokens:
            told.append(classes.vote(code, token, "outliers", QUESTIONS["outliers"][number % 3]))
            classes.state(code, token)

    crew = [threading.Thread(target=vote, args=(number,)) for number in range(6)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert sum(counted for counted, _ in told) == 12 and len(told) == 72
    counts = classes.export(code, teacher)["votes"]["outliers"]
    assert sum(counts.values()) == 12 and opened().export(code, teacher)["votes"]["outliers"] == counts


def test_asking_costs_far_less_than_a_millisecond_and_no_file(classes):
    code, _ = classes.teach(classes.key)
    tokens = [classes.join(code) for _ in range(30)]
    for token in tokens:
        for question, choices in QUESTIONS.items():
            classes.vote(code, token, question, choices[0])
    classes.close()  # a database that is closed answers nothing
    began = time.thread_time()
    for _ in range(20):
        for token in tokens:
            assert len(classes.state(code, token)) > 1
    assert (time.thread_time() - began) / 600 < 0.0005


def test_an_export_is_of_all_questions_with_the_code_and_the_day(classes, clock):
    code, teacher = classes.teach(classes.key)
    for choice in ("few", "few", "many"):
        classes.vote(code, classes.join(code), "outliers", choice)
    none = {"left": 0, "right": 0}
    assert classes.export(code, teacher) == {
        "class": code, "date": "1970-01-01", "students": 3,
        "votes": {"quiz-1": none, "quiz-2": none, "outliers": {"none": 0, "few": 2, "many": 1}},
    }  # fmt: skip


def test_what_could_not_be_written_is_not_acknowledged_and_the_next_one_is(classes, opened):
    code, teacher = classes.teach(classes.key)
    student = classes.join(code)
    db = classes._store._db
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(NotKept, match="the disk is full"):
        for _ in range(500):
            classes.join(code)
    joined = len(classes._classes[code].kept.voters)
    db.execute("PRAGMA max_page_count = 100000")
    assert classes.vote(code, student, "quiz-1", "left") == (True, "left")
    classes.join(code)
    assert opened().export(code, teacher)["students"] == joined + 1


FULL = """
import resource, sys
from pathlib import Path
from llmq.classroom.classes import Classes
from llmq.classroom.store import NotKept
classes = Classes(Path(sys.argv[1]), {"q": ("a", "b")}, ("q",))
code, teacher = classes.teach(classes.key)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
told, refused = 0, ""
try:
    while True:
        classes.vote(code, classes.join(code), "q", "a")
        told += 1
except NotKept as error:
    refused = str(error)
assert classes.state(code, teacher)["votes"]["q"]["votes"] == told
print(code, teacher, told, refused)
"""


def test_a_file_that_may_not_grow_loses_no_vote_that_was_acknowledged(file):
    """The system refuses the write itself, in the middle of a transaction."""
    done = subprocess.run([sys.executable, "-c", FULL, str(file), "100000"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, teacher, told, refused = done.stdout.split(maxsplit=3)
    assert int(told) > 0 and refused.startswith("this was not kept: ") and str(file) not in refused
    again = Classes(file, {"q": ("a", "b")}, ("q",))
    assert again.state(code, teacher)["votes"]["q"]["votes"] == int(told)
    again.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.write_bytes(b"no database at all, but text " * 200), "file is not a database"),
        (lambda file: file.mkdir(), "unable to open database file"),
        (lambda file: made(file, "CREATE TABLE x (y)"), "another program's database"),
        (lambda file: made(file, "PRAGMA user_version = 2"), "version 2, and this program reads version 1"),
        (lambda file: cut(file), "damaged|malformed"),
    ],
)
def test_a_file_that_cannot_be_it_is_one_line_and_stays_as_it_is(opened, file, spoil, words):
    if words[:2] in ("ve", "da"):
        classes = opened()
        code, _ = classes.teach(classes.key)
        classes.join(code)
        classes.close()
    file.parent.mkdir(exist_ok=True)
    spoil(file)
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(UserError, match=words) as refused:
        Classes(file, QUESTIONS, STEPS)
    assert "\n" not in str(refused.value) and str(file) in str(refused.value) and "--class-file" in str(refused.value)
    assert (file.read_bytes() if file.is_file() else None) == before


def made(file, statement: str) -> None:
    with sqlite3.connect(file) as db:
        db.execute(statement)
    db.close()


def cut(file) -> None:
    """Spoil the pages after the first."""
    content = file.read_bytes()
    file.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def test_a_folder_that_cannot_be_written_is_one_line(private_folder):
    private_folder.chmod(0o500)
    with pytest.raises(UserError, match="cannot keep classes in .*denied; choose another --class-file"):
        Classes(private_folder / "more" / "classes.sqlite3", QUESTIONS, STEPS)


SERVE = """
import sys, time
from pathlib import Path
from llmq.classroom.classes import Classes
classes = Classes(Path(sys.argv[1]), {"q": ("a", "b")}, ("q",))
code, teacher = classes.teach(classes.key)
print(code, teacher, classes.join(code), flush=True)
time.sleep(600)
"""


def test_one_process_has_the_file_and_a_killed_one_leaves_nothing_in_the_way(file, monkeypatch):
    monkeypatch.setattr("llmq.classroom.store.BUSY_SECONDS", 0.1)
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        code, teacher, student = process.stdout.readline().split()
        with pytest.raises(UserError, match="another process serves it; choose another --class-file"):
            Classes(file, {"q": ("a", "b")}, ("q",))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    again = Classes(file, {"q": ("a", "b")}, ("q",))
    assert again.state(code, teacher)["teacher"] and again.vote(code, student, "q", "a") == (True, "a")
    again.close()


def test_a_store_that_is_closed_says_so(classes):
    code, _ = classes.teach(classes.key)
    classes.close()
    with pytest.raises(NotKept, match="about to end"):
        classes.join(code)
