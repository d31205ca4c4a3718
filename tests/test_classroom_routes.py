"""A class over HTTP, on the real server: the interface that the lesson's page relies on."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from test_api import served
from test_guard import state

import app
from llmq.classroom.classes import Classes
from llmq.classroom.store import Store
from llmq.errors import UserError
from llmq.lesson.exhibits import right_choices
from llmq.ui import launch
from llmq.ui.shell import classroom, teaching
from llmq.ui.shell.classroom import CODES_AT_ONCE, MOST_BYTES, student_link
from llmq.ui.shell.guesses import AT_ONCE

KEY = "a teacher's key of this test"
QUESTIONS = {"quiz-1": ("left", "right"), "quiz-2": ("left", "right"), "outliers": ("random", "same")}
STEPS = ("quiz", "outliers")
PLACE = "/lesson/class"
ADDRESSES = itertools.count(1)


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Iterator[Classes]:
    found = Classes(tmp_path_factory.mktemp("class") / "classes.sqlite3", QUESTIONS, STEPS, key=KEY)
    yield found
    found.close()


@pytest.fixture(scope="module")
def server(classes) -> Iterator[str]:
    with served(state(classes=classes)) as address:
        yield address


@contextmanager
def somebody(server: str) -> Iterator[httpx.Client]:
    """Who comes from an address of its own."""
    transport = httpx.HTTPTransport(local_address=f"127.0.7.{next(ADDRESSES)}")
    with httpx.Client(base_url=server, transport=transport, timeout=60) as client:
        yield client


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with somebody(server) as client:
        yield client


class Member:
    """Somebody with a token of a class."""

    def __init__(self, client: httpx.Client, code: str, token: str):
        self.client, self.code, self.token = client, code, token

    def ask(self, way: str, path: str = "", **options) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}"} | options.pop("headers", {})
        return self.client.request(way, f"{PLACE}/{self.code}{path}", headers=headers, **options)

    def post(self, path: str, **body) -> httpx.Response:
        return self.ask("POST", path, json=body)

    def state(self, seen: object = "") -> dict:
        answer = self.ask("GET", params={"seen": seen} if seen != "" else {})
        assert answer.status_code == 200, answer.text
        return answer.json()


def teach(client: httpx.Client) -> Member:
    answer = client.post(f"{PLACE}/teach", json={"key": KEY})
    assert answer.status_code == 200 and answer.json().keys() == {"class", "token"}, answer.text
    return Member(client, answer.json()["class"], answer.json()["token"])


def join(teacher: Member) -> Member:
    answer = teacher.client.post(f"{PLACE}/{teacher.code}/join", json={})
    assert answer.status_code == 200 and answer.json().keys() == {"token"}, answer.text
    return Member(teacher.client, teacher.code, answer.json()["token"])


@pytest.fixture
def teacher(client) -> Member:
    return teach(client)


@pytest.fixture
def student(teacher) -> Member:
    return join(teacher)


def refused(answer: httpx.Response, status: int, words: str) -> None:
    assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
    assert re.search(words, answer.json()["error"]) and "\n" not in answer.json()["error"]
    assert answer.headers["cache-control"] == "no-store"


def test_a_class_from_its_first_page_to_its_end(client, teacher, student):
    assert client.get(PLACE).json() == {"classes": True}
    first = student.state()
    assert first | {"version": 0} == {
        "version": 0, "step": None, "revealed": False, "people": 1, "teacher": False,
        "votes": {q: {"votes": 0, "counts": None, "yours": None, "chance": [0, 0]} for q in QUESTIONS},
    }  # fmt: skip
    assert student.state(first["version"]) == {"version": first["version"]}
    assert student.post("/vote", question="quiz-1", choice="left").json() == {"counted": True, "choice": "left"}
    assert student.post("/vote", question="quiz-1", choice="right").json() == {"counted": False, "choice": "left"}
    told = student.state(first["version"])
    voted = {"votes": 1, "counts": {"left": 1, "right": 0}, "yours": "left", "chance": [0, 1]}
    assert told["version"] > first["version"] and told["votes"]["quiz-1"] == voted
    other = join(teacher)
    assert other.state()["votes"]["quiz-1"] == voted | {"counts": None, "yours": None}
    led = teacher.post("/lead", step="quiz", revealed=True).json()
    assert (led["step"], led["revealed"], led["teacher"], led["people"]) == ("quiz", True, True, 2)
    assert other.state()["votes"]["quiz-1"] == voted | {"yours": None}
    assert teacher.post("/lead", step="outliers").json()["revealed"] is False
    assert teacher.post("/reset", question="quiz-1").json()["votes"]["quiz-1"]["votes"] == 0
    assert teacher.post("/reset", question=None).status_code == 200
    assert teacher.post("/end").json() == {}
    refused(student.ask("GET"), 404, "has ended")


def test_an_export_is_a_file_of_every_choice(teacher, student):
    student.post("/vote", question="outliers", choice="same")
    answer = teacher.ask("GET", "/export")
    assert answer.headers["content-type"].startswith("text/csv") and answer.headers["cache-control"] == "no-store"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    date = rows[0]["date"]
    assert answer.headers["content-disposition"] == f'attachment; filename="class-{teacher.code}-{date}.csv"'
    counts = {"quiz-1": (0, 0), "quiz-2": (0, 0), "outliers": (0, 1)}
    steps, right = {"quiz-1": "1", "quiz-2": "1", "outliers": "8"}, right_choices()
    told = {True: "yes", False: "no"}
    assert [tuple(row.values()) for row in rows] == [
        (steps[question], question, choice, told[choice == right[question]], str(votes), teacher.code, date)
        for question, found in counts.items() for choice, votes in zip(QUESTIONS[question], found, strict=True)
    ]  # fmt: skip
    plain = teacher.ask("GET", "/export", params={"format": "json"})
    assert plain.json()["votes"]["outliers"] == {"random": 0, "same": 1} and plain.json()["students"] == 1
    refused(student.ask("GET", "/export"), 403, "for the teacher")
    refused(teacher.ask("GET", "/export", params={"format": "xml"}), 400, "'xml'; choose csv or json")


def test_a_teacher_and_a_student_have_each_their_own(teacher, student):
    for path, body in (("/lead", {"step": "quiz"}), ("/reset", {"question": None}), ("/end", {})):
        refused(student.post(path, **body), 403, "for the teacher")
    refused(teacher.post("/vote", question="quiz-1", choice="left"), 403, "no vote")


def test_two_classes_of_one_server_know_nothing_of_each_other(client, teacher, student):
    stranger = teach(client)
    asked = [
        ("GET", "", None), ("GET", "/export", None), ("POST", "/lead", {"step": "quiz"}), ("POST", "/end", {}),
        ("POST", "/reset", {"question": None}), ("POST", "/vote", {"question": "quiz-1", "choice": "left"}),
    ]  # fmt: skip
    for token in (stranger.token, "", "x", student.token[:-1], "ü" * 20):
        for way, path, body in asked:
            headers = {"Authorization": f"Bearer {token}".strip().encode()}
            refused(
                teacher.ask(way, path, headers=headers, **({"json": body} if body is not None else {})), 401, "join"
            )
    for scheme in ("Basic", ""):
        refused(teacher.ask("GET", headers={"Authorization": f"{scheme} {teacher.token}".strip()}), 401, "join")
    assert client.get(f"{PLACE}/{teacher.code}", params={"token": teacher.token}).status_code == 401
    assert client.get(f"{PLACE}/{teacher.code}", headers={"Cookie": f"token={teacher.token}"}).status_code == 401
    assert teacher.state()["votes"]["quiz-1"]["votes"] == 0 == stranger.state()["people"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/vote", {"question": "nope", "choice": "left"}, "unknown question 'nope'; choose from quiz-1"),
        ("/vote", {"question": "quiz-1", "choice": "up"}, "unknown choice of quiz-1 'up'; choose from left, right"),
        ("/vote", {"question": "quiz-1"}, "choice is missing"), ("/vote", {}, "question is missing"),
        ("/vote", {"question": 5, "choice": "left"}, "question is 5; give text"),
        ("/vote", {"question": "quiz-1", "choice": ["left"]}, "give text"),
        ("/vote", {"question": "quiz-1", "choice": "left", "voter": 1}, "unknown name 'voter'; give question, choice"),
        ("/join", {"name": "Ann"}, "unknown name 'name'"),
    ],
)  # fmt: skip
def test_what_a_student_sends_wrongly_is_a_sentence(student, path, body, words):
    refused(student.post(path, **body), 400, words)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/lead", {"step": "nope"}, "unknown step 'nope'; choose from quiz, outliers"),
        ("/lead", {"step": 1}, "step is 1; give text or null"), ("/lead", {"step": ["quiz"]}, "give text or null"),
        ("/lead", {"revealed": 1}, "revealed is 1; give true or false"),
        ("/lead", {"revealed": None}, "give true or false"), ("/lead", {"revealed": True}, "choose a step first"),
        ("/reset", {}, "question is missing"), ("/reset", {"question": "nope"}, "unknown question"),
    ],
)  # fmt: skip
def test_what_a_teacher_sends_wrongly_is_a_sentence_and_changes_nothing(teacher, path, body, words):
    before = teacher.state()
    refused(teacher.post(path, **body), 400, words)
    assert teacher.state() == before


@pytest.mark.parametrize("raw", [b"{", b"null", b"[]", b"5", b"\xff\xfe", b'{"question": NaN}', b"[" * 1900, b'"x"'])
def test_what_is_no_json_object_is_a_sentence(student, raw):
    refused(student.ask("POST", "/vote", content=raw), 400, "no JSON|no object")


def test_a_long_body_is_refused_however_it_comes(student, client):
    for raw in (b" " * (MOST_BYTES + 1), iter([b" " * 1500] * 2)):
        refused(student.ask("POST", "/vote", content=raw), 413, "more than 2000 bytes")
    refused(client.post(f"{PLACE}/teach", content=b'{"key": "' + b"x" * 10_000 + b'"}'), 413, "2000 bytes")
    assert student.post("/vote", question="quiz-2", choice="left").json()["counted"]


@pytest.mark.parametrize("seen", ["x", "-1", "1.5", "9" * 30, "²"])
def test_a_version_that_is_none_is_a_sentence(student, seen):
    refused(student.ask("GET", params={"seen": seen}), 400, "give the version")


def test_a_code_may_be_typed_small_and_no_other_address_answers(teacher):
    assert teacher.client.post(f"{PLACE}/{teacher.code.lower()}/join", json={}).status_code == 200
    refused(teacher.ask("GET", "/nothing"), 404, "no such address")
    refused(teacher.ask("POST", "/a/b/c"), 404, "no such address")
    refused(teacher.client.get(f"{PLACE}/"), 404, "no such address")
    assert teacher.ask("GET", "/vote").status_code in (404, 405)


def test_a_foreign_page_cannot_ask_in_a_members_name(teacher):
    answer = teacher.ask("POST", "/end", json={}, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403 and "its own address" in answer.json()["error"]
    assert teacher.state()["teacher"]


def test_who_guesses_the_key_is_slowed_and_a_class_behind_the_same_address_is_not(client, teacher, student):
    wrong = [client.post(f"{PLACE}/teach", json={"key": f"guess {number}"}) for number in range(AT_ONCE + 5)]
    statuses = [answer.status_code for answer in wrong]
    assert statuses[:AT_ONCE] == [401] * AT_ONCE and statuses[-1] == 429 and "retry-after" in wrong[-1].headers
    assert client.post(f"{PLACE}/teach", json={"key": KEY}).status_code == 429, "or the right one could be told"
    others = [join(teacher) for _ in range(30)]
    for _ in range(3):
        assert {other.ask("GET").status_code for other in others} == {200}
    assert {other.post("/vote", question="quiz-1", choice="left").status_code for other in others} == {200}
    with somebody(str(client.base_url)) as elsewhere:
        assert elsewhere.post(f"{PLACE}/teach", json={"key": KEY}).status_code == 200


def test_who_guesses_codes_is_slowed_and_members_and_old_tabs_are_not(server, classes):
    with somebody(server) as client:
        teacher, old = teach(client), teach(client)
        student, tab = join(teacher), join(old)
        old.post("/end")
        for _ in range(CODES_AT_ONCE + 5):
            refused(tab.ask("GET"), 404, "has ended")
        wrong = [client.post(f"{PLACE}/AAAAAA/join", json={}).status_code for _ in range(CODES_AT_ONCE + 20)]
        assert wrong[:CODES_AT_ONCE] == [404] * CODES_AT_ONCE and 429 in wrong
        told = []
        for _ in range(5):  # one more is let in every half second
            codes = ("AAAAAA", teacher.code)
            told.append([client.get(f"{PLACE}/{code}/qr.svg", params={"at": server}).status_code for code in codes])
        assert [429, 429] in told, "a right code cannot be told from a wrong one"
        assert student.state() and teacher.state() and student.post("/vote", question="quiz-1", choice="left")


def test_a_code_that_nobody_has_is_404(client):
    for path in ("AAAAAA", "nope", "x" * 300, "%00", "..%2f.."):
        refused(client.post(f"{PLACE}/{path}/join", json={}), 404, "no class|no such address")


def test_a_qr_code_is_drawn_for_a_class_that_is_there(teacher, client):
    at = "https://school.example/llmq/"
    answer = client.get(f"{PLACE}/{teacher.code}/qr.svg", params={"at": at})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    drawn = ET.fromstring(answer.content)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg" and "#fff" in answer.text and "<script" not in answer.text
    segno = pytest.importorskip("segno")
    code = segno.make_qr(f"{at}lesson/?class={teacher.code}", error="m")
    size = code.symbol_size(border=4)[0]
    assert drawn.attrib["viewBox"] == f"0 0 {size} {size}"
    assert student_link(at, "K7MPQ2") == student_link(at[:-1], "K7MPQ2") == f"{at}lesson/?class=K7MPQ2"


@pytest.mark.parametrize(
    "at",
    ["", "x", "ftp://a/", "javascript:alert(1)", "https://", "https:///x", "http://a b/", "http://a/?x", "http://a/#x",
     "http://a:x/", "http://[::1/", "http://me:pass@a/", 'http://a/"', "https://a/" + "x" * 200, "http://a/\n"],
)  # fmt: skip
def test_what_is_no_address_has_no_qr_code(teacher, client, at):
    refused(client.get(f"{PLACE}/{teacher.code}/qr.svg", params={"at": at}), 400, "give the address of the page")


def test_a_disk_that_is_full_is_a_sentence_and_no_vote(teacher, student, classes):
    db = classes._store._db
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    try:
        answers = [teacher.client.post(f"{PLACE}/{teacher.code}/join", json={}) for _ in range(300)]
    finally:
        db.execute("PRAGMA max_page_count = 1000000")
    failed = [answer for answer in answers if answer.status_code != 200]
    assert failed and {answer.status_code for answer in failed} == {507}
    refused(failed[0], 507, "not kept: the disk is full")
    assert student.post("/vote", question="quiz-1", choice="left").json()["counted"]


def test_whoever_asks_does_not_wait_for_a_slow_disk(teacher, student, classes, monkeypatch):
    begun, over = threading.Event(), threading.Event()
    write = Store.add_vote

    def slow(store: Store, *given) -> None:
        begun.set()
        over.wait(60)
        write(store, *given)

    monkeypatch.setattr(Store, "add_vote", slow)
    voting = threading.Thread(target=lambda: httpx.post(
        f"{teacher.client.base_url}{PLACE}/{student.code}/vote", json={"question": "quiz-1", "choice": "left"},
        headers={"Authorization": f"Bearer {student.token}"}, timeout=60,
    ))  # fmt: skip
    voting.start()
    assert begun.wait(60)
    assert student.state()["votes"]["quiz-1"]["votes"] == 0, "it is not acknowledged yet, and not counted"
    over.set()
    voting.join()
    assert student.state()["votes"]["quiz-1"]["votes"] == 1


def test_with_a_password_nobody_gets_to_a_class_without_it(classes):
    with served(state(classes=classes), auth=("class", "secret")) as address, httpx.Client(base_url=address) as client:
        asked = [
            ("GET", PLACE), ("POST", f"{PLACE}/teach"), ("POST", f"{PLACE}/AAAAAA/join"), ("GET", f"{PLACE}/AAAAAA"),
            ("GET", f"{PLACE}/AAAAAA/qr.svg"), ("GET", f"{PLACE}/AAAAAA/export"), ("GET", f"{PLACE}/x/y"),
        ]  # fmt: skip
        for way, path in asked:
            refused(client.request(way, path), 401, "log in first")
        for name in ("access-token-x", "access-token"):
            refused(client.get(PLACE, headers={"Cookie": f"{name}=x"}), 401, "log in first")
        assert client.post("/login", data={"username": "class", "password": "secret"}).status_code == 200
        assert client.get(PLACE).json() == {"classes": True}
        teacher = teach(client)
        assert join(teacher).state()["people"] == 1
        client.cookies.clear()
        refused(teacher.ask("GET"), 401, "log in first")


def test_a_server_without_classes_says_so():
    with served(state()) as address:
        answer = httpx.get(f"{address}{PLACE}")
        assert answer.status_code == 404 and answer.json()["classes"] is False and "--class" in answer.json()["error"]
        assert httpx.post(f"{address}{PLACE}/teach", json={"key": KEY}).status_code == 404


def test_below_a_proxys_path_a_class_answers_as_ever(classes, monkeypatch):
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/llmq")
    with served(state(classes=classes)) as address:
        assert httpx.get(f"{address}{PLACE}").json() == {"classes": True}


def test_the_terminal_names_every_address_of_the_teacher(classes, monkeypatch):
    for name in ("GRADIO_ROOT_PATH", "SPACE_HOST"):
        monkeypatch.delenv(name, raising=False)
    link = "/lesson/#teach=a%20teacher%27s%20key%20of%20this%20test"
    told = teaching.announce(classes, "127.0.0.1", "http://127.0.0.1:7860", None)
    assert f"http://127.0.0.1:7860{link}\n" in told and "--host 0.0.0.0" in told and "QR code" in told
    monkeypatch.setenv("GRADIO_ROOT_PATH", "https://school.example/llmq")
    told = teaching.announce(classes, "0.0.0.0", "http://localhost:7861/", "https://x.gradio.live")
    for start in (r"http://[\w.]+:7861", "https://school.example/llmq", "https://x.gradio.live"):
        assert re.search(re.escape(link).join((f"    {start}", "\n")), told)
    assert "--host" not in told


def test_a_server_with_classes_prints_the_link_once_it_listens(classes, capsys, monkeypatch):
    told = []

    def listen(page, state) -> None:
        told.append((page.local_url, httpx.get(f"{page.local_url}lesson/class").json(), capsys.readouterr().out))
        page.close()

    monkeypatch.setattr(launch, "serve_until_told", listen)
    host, port = app.free_address("127.0.0.1", "0")
    launch.launch(state(classes=classes), host=host, port=port)
    ((address, answer, printed),) = told
    assert answer == {"classes": True} and f"    {address}lesson/#teach=a%20teacher" in printed
    launch.launch(state(), host=host, port=port, block=False).close()
    assert "teach" not in capsys.readouterr().out


def test_the_flags_and_variables_of_a_class(tmp_path, monkeypatch):
    assert app.parse([]).classes is False and app.parse(["--class"]).classes is True
    for said, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("LLMQ_CLASS", said)
        assert app.parse([]).classes is expected
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path))
    monkeypatch.setenv("LLMQ_CLASS_KEY", KEY)
    opened = teaching.open_classes(None)
    assert (tmp_path / "classes.sqlite3").exists() and opened.key == KEY
    opened.close()
    monkeypatch.setenv("LLMQ_CLASS_KEY", "short")
    with pytest.raises(UserError, match="choose 12 at least"):
        teaching.open_classes(str(tmp_path / "other"))


def test_a_file_that_another_server_has_is_a_line_before_anything_is_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llmq.classroom.store.BUSY_SECONDS", 0.1)
    monkeypatch.setattr(app, "fetch", lambda state: pytest.fail("nothing is to be fetched"))
    file = tmp_path / "classes.sqlite3"
    first = Classes(file, QUESTIONS, STEPS)
    assert app.main(["--model", "demo", "--device", "cpu", "--port", "0", "--class-file", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another process serves it; choose another --class-file" in line
    first.close()


def test_an_answer_is_json_that_any_program_reads(teacher):
    assert json.loads(teacher.ask("GET").text)["votes"].keys() == QUESTIONS.keys()
    assert classroom.PLACE == PLACE
