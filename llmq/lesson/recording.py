"""Making the recordings that the lesson shows, with the demo model on this machine's processor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llmq import face
from llmq.environment import describe
from llmq.errors import UserError
from llmq.files import read_text, write_text
from llmq.lesson.exhibits import reduced
from llmq.lesson.steps import QUIZ, RECORDED_PROMPT

MODEL, METHOD = "demo", "llm-int8"
ASKED = {"model": MODEL, "device": "cpu", "verbose": False}
QUIZ_PROMPTS = (
    "Name three things that are red.",
    "Why is the sky blue?",
    "Tell a short story about a lighthouse keeper.",
    "Give me three tips for sleeping better.",
    "Write a poem about the sea in four lines.",
    "What is a hash table?",
)
QUIZ_TOKENS, COMPARED_TOKENS, READ_TOKENS = 40, 96, 24


def record(folder: Path) -> Iterator[Path]:
    """Ask everything that the lesson shows and write the answers into `folder`; yield each file. Everything comes from
    this machine but the race of the methods, which takes a GPU: `llmq race --save race.json`. Raises UserError where a
    file cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from error
    for name, prompt in zip(QUIZ, QUIZ_PROMPTS, strict=True):
        yield _compared(folder / f"{name}.jsonl", prompt, QUIZ_TOKENS)
    yield _compared(folder / "parting.jsonl", RECORDED_PROMPT, COMPARED_TOKENS)
    asked = {"prompt": RECORDED_PROMPT, "method": METHOD, "new_tokens": READ_TOKENS}
    yield _with_conditions(_saved(face.ask("agreement", **ASKED, **asked), folder / "agreement.json"))
    silenced = face.ask("silencing", **ASKED, prompt=RECORDED_PROMPT, windows=1)
    yield _saved(silenced, folder / "silencing.json")
    watched = face.ask("outliers", **ASKED, prompt=RECORDED_PROMPT, method=METHOD, new_tokens=0).answer
    write_text(folder / "outliers.json", json.dumps(reduced(watched)))
    yield _with_conditions(folder / "outliers.json")


def _compared(path: Path, prompt: str, tokens: int) -> Path:
    asked = {"methods": ["fp16", METHOD], "max_new_tokens": tokens, **ASKED}
    return _saved(face.compare(prompt, **asked), path)


def _with_conditions(path: Path) -> Path:
    """The JSON object of a file with what it was made on, which not every answer says by itself."""
    conditions = describe("cpu", face.open_model(MODEL).source)
    write_text(path, json.dumps(json.loads(read_text(path)) | {"conditions": conditions}, indent=1) + "\n")
    return path


def _saved(finding: face.Finding, path: Path) -> Path:
    finding.save(path)
    return path
