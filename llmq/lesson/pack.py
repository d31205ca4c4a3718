"""The lesson as files that a browser opens by itself: from a web server, from this one, or from a USB stick.

`data.js` holds the steps, the words of all languages and the recorded answers; the rest never changes. Scripts are
plain ones, and the data is a script too, because a browser lets a page from a disk read nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

from llmq.errors import UserError
from llmq.figures.palette import DARK, LIGHT, properties
from llmq.files import read_text, write_text
from llmq.formatting import plain_json
from llmq.lesson.exhibits import exhibits
from llmq.lesson.steps import STEPS, Step

HERE = Path(__file__).parent
FRONT = HERE / "front"
SCRIPTS = ("nodes", "words", "drawings", "numbers", "matrices", "texts", "bars", "classroom", "card", "lesson")
LANGUAGES = ("en", "fr")
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}


def words() -> dict[str, dict[str, str]]:
    """Every word of the lesson by its name: one text for each language."""
    return json.loads(read_text(HERE / "words.json"))


def lesson() -> dict:
    """Everything that the lesson shows, as plain values: `languages`, `words` and `steps`."""
    steps = [_told(step) | asdict(exhibits()[step.name]) for step in STEPS]
    return plain_json({"languages": LANGUAGES, "words": words(), "steps": steps})


def _told(step: Step) -> dict:
    """What a step is, without its words and its exhibit."""
    questions = {name: list(choices) for name, choices in step.questions.items()}
    return {"name": step.name, "lit": step.lit, "questions": questions, "live": asdict(step.live)}


@cache
def files() -> dict[str, bytes]:
    """The files of the lesson by name."""
    colours = (
        f":root {{ {properties(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {properties(DARK)} }} }}\n"
    )
    data = json.dumps(lesson(), ensure_ascii=True, allow_nan=False).replace("</", "<\\/")
    code = "\n".join(read_text(FRONT / f"{name}.js") for name in SCRIPTS)
    texts = {
        "index.html": read_text(FRONT / "index.html"),
        "lesson.css": colours + read_text(FRONT / "lesson.css"),
        "lesson.js": f'"use strict";\n(() => {{\n{code}\n}})();\n',
        "data.js": f'"use strict";\nwindow.LLMQ_LESSON = {data};\n',
        "live.js": read_text(FRONT / "live.js"),
    }
    return {name: text.encode() for name, text in texts.items()}


def write(folder: Path) -> list[Path]:
    """Write the lesson into `folder`, which is made where it is missing. Raises UserError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from error
    written = [folder / name for name in files() if name != "live.js"]
    for path in written:
        write_text(path, files()[path.name].decode())
    return written
