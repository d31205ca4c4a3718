"""The lesson: its words in every language, its right answers out of recordings, and its files."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
from tiny_runs import run_cli

from llmq.events import Run
from llmq.labs import load_answer
from llmq.lesson import pack
from llmq.lesson.exhibits import RECORDED, exhibits
from llmq.lesson.recording import QUIZ_PROMPTS
from llmq.lesson.steps import QUIZ, STEPS, questions

NAMED = re.compile(r"\{(\w+)(?:\|(\S+?))?\}")
FRONT = "".join((pack.FRONT / f"{name}.js").read_text() for name in (*pack.SCRIPTS, "live"))


def test_every_word_is_there_in_every_language_with_the_same_numbers():
    for key, texts in pack.words().items():
        assert set(texts) == set(pack.LANGUAGES), key
        assert all(text.strip() and text == text.strip() for text in texts.values()), key
        first, *others = (sorted(NAMED.findall(text)) for text in texts.values())
        assert all(other == first for other in others), key


def test_a_language_is_no_copy_of_another():
    """Numbers and names may be the same; sentences may not."""
    for key, texts in pack.words().items():
        if len(texts["en"].split()) > 3:
            assert texts["en"] != texts["fr"], key


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_step_has_its_words_and_its_numbers(step):
    words, values = pack.words(), exhibits()[step.name].values
    for part in ("title", "tell", "ask", "answer", "first", "second", "try"):
        for name, _ in NAMED.findall(words[f"{step.name}.{part}"]["en"]):
            assert name in values or name in ("right", "pair"), (step.name, part, name)
    for choices in step.questions.values():
        for choice in choices:
            named = {name for name, _ in NAMED.findall(words[f"{step.name}.choice.{choice}"]["en"])}
            assert named <= set(values)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_question_has_one_right_answer_among_its_choices(step):
    right = exhibits()[step.name].right
    assert set(right) == set(step.questions)
    assert all(right[question] in choices for question, choices in step.questions.items())


def test_scripts_name_no_word_that_is_missing():
    words = pack.words()
    named = set(re.findall(r'say\("([\w.-]+)"', FRONT)) | set(
        re.findall(r'say\([^()"]*\? "([\w.]+)" : "[\w.]+"', FRONT)
    )
    assert len(named) > 40 and not [key for key in named if key not in words]


def test_the_words_for_people_are_used():
    """Every word is in a script by its whole name, or as one of a step's or of a list's."""
    built = re.compile(
        r"^(?:[\w-]+\.(?:title|tell|ask|answer|try|first|second|format|choice\.[\w-]+))$|^(?:ui\.col|time\.stage)\."
    )
    unused = [
        key for key in pack.words()
        if f'"{key}"' not in FRONT and not built.match(key) and not re.search(rf"`{key.split('.')[0]}\.\$\{{", FRONT)
    ]  # fmt: skip
    assert not unused


def test_every_recording_opens_and_says_what_it_was_made_on():
    for name, prompt in zip(QUIZ, QUIZ_PROMPTS, strict=True):
        run = Run.load(RECORDED / f"{name}.jsonl")
        assert run.settings["prompt"] == prompt and run.settings["sampling"]["temperature"] == 0
    for path in sorted(RECORDED.glob("*.json")):
        made = json.loads(path.read_text())["conditions"]
        assert made["date"] and made["device_name"] and "dirty" not in made["commit"], path
        if path.stem != "outliers":
            assert load_answer(path).kind == path.stem
    assert all("date" in exhibit.asked for name, exhibit in exhibits().items() if name in ("quiz", "silence", "race"))


def test_what_the_words_say_in_passing_is_so():
    """Sentences that are true of these recordings and need not be of the next ones."""
    values = {name: exhibit.values for name, exhibit in exhibits().items()}
    assert values["parting"]["tie"] and values["silence"]["after"] > 1000 > 100 > values["silence"]["before"]
    assert values["silence"]["random"] < 1.1 * values["silence"]["before"]
    assert values["time"]["own"] > 1 > values["time"]["library"]
    assert values["time"]["launches"] > values["time"]["dense_launches"]
    assert values["absmax"]["codes"] < values["absmax"]["quiet_codes"]


def test_what_the_words_say_of_the_race_is_so():
    kl = {row["method"]: row["kl"] for row in exhibits()["race"].data["rows"]}
    assert kl["absmax"] > kl["awq"] and kl["llm-int8"] > kl["int8-weight-only"]
    assert set(kl) | {"bnb-int8", "bnb-int8@0", "fp16"} == {
        key.removeprefix("method.") for key in pack.words() if key.startswith("method.")
    }


def test_scales_by_row_save_no_row_of_the_loud_column():
    """The table that the step shows says what its answer says: every row's error stays near that of one scale."""
    data = exhibits()["vectorwise"].data
    matrix = np.array(data["matrix"])
    matrix[:, data["column"]] *= data["loud"]
    quiet = np.delete(np.arange(matrix.shape[1]), data["column"])

    def errors(scale):
        return np.abs(np.round(matrix / scale) * scale - matrix)[:, quiet].mean(axis=1)

    one, rows = errors(np.abs(matrix).max() / 127), errors(np.abs(matrix).max(axis=1, keepdims=True) / 127)
    exact = errors(np.abs(matrix[:, quiet]).max() / 127)
    assert (rows > 0.5 * one).all() and (rows > 20 * exact).all()
    assert exhibits()["vectorwise"].pair[1] == pytest.approx(rows.mean())


def test_quiz_pairs_differ_and_the_sides_are_mixed():
    pairs = exhibits()["quiz"].data["pairs"]
    assert all(pair["texts"][0] != pair["texts"][1] for pair in pairs)
    assert set(exhibits()["quiz"].right.values()) == {"left", "right"}
    for pair, (name, right) in zip(pairs, exhibits()["quiz"].right.items(), strict=True):
        run = Run.load(RECORDED / f"{name}.jsonl")
        written = "".join(
            timed.event.text for timed in run.events if getattr(timed.event, "contestant", "") == "llm-int8"
            and type(timed.event).__name__ in ("Step", "Finished")
        )  # fmt: skip
        assert pair["texts"][("left", "right").index(right)] == written


def test_the_map_of_outliers_says_what_its_numbers_say():
    found = json.loads((RECORDED / "outliers.json").read_text())
    peaks = np.frombuffer(base64.b64decode(found["sixteenths"]), "<u2").reshape(found["reads"], found["width"]) / 16
    over = peaks >= found["threshold"]
    assert int(over.any(axis=0).sum()) == found["loud_channels"]
    assert len(set(peaks.argmax(axis=1).tolist())) == found["strongest"]
    assert peaks.max(axis=0).argmax() == found["channel"] and abs(peaks.max() - found["largest"]) < 1 / 16
    assert len(found["names"]) == len(set(map(tuple, found["names"]))) == found["reads"]


def test_files_are_the_same_bytes_every_time_and_ask_nobody():
    first = dict(pack.files())
    pack.files.cache_clear()
    exhibits.cache_clear()
    assert pack.files() == first
    whole = b"".join(first.values()).decode()
    assert sum(map(len, first.values())) < 400_000
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", whole)
    assert "innerHTML" not in whole and "insertAdjacentHTML" not in whole and "document.write" not in whole


def test_the_command_lists_writes_and_refuses(tmp_path, capsys):
    status, out, _ = run_cli(capsys, "lesson", "--json")
    assert status == 0 and [row["step"] for row in json.loads(out[-1])["steps"]] == [step.name for step in STEPS]
    status, out, _ = run_cli(capsys, "lesson", "--static", str(tmp_path / "a" / "lesson"))
    assert status == 0 and {"index.html", "data.js", "lesson.js", "lesson.css"} == {
        path.name for path in (tmp_path / "a" / "lesson").iterdir()
    }
    (tmp_path / "file").write_text("")
    status, _, error = run_cli(capsys, "lesson", "--static", str(tmp_path / "file"))
    assert status == 2 and len(error) == 1 and "file" in error[0]


def test_questions_are_those_of_the_steps():
    assert list(questions())[: len(QUIZ)] == list(QUIZ)
    assert len(questions()) == len(STEPS) - 1 + len(QUIZ)
