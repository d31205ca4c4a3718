"""Making the recordings that the lesson shows, with the demo model on this machine's processor."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from llmq import face
from llmq.environment import describe
from llmq.errors import UserError
from llmq.files import read_text, write_text
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
SIXTEENTHS = 16  # largest activations are kept in sixteenths, rounded down: a threshold in sixteenths is met or not
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


def reduced(answer) -> dict:
    """What the lesson keeps of a watched run: the largest |x| of every channel in what is read behind a norm, in
    sixteenths rounded down, and how many columns reach the threshold."""
    import numpy as np

    from llmq.inspect.emergence import stream_inputs

    report, threshold = answer.report, answer.threshold
    read = {(module.layer, module.kind): module for module in report.modules if module.layer is not None}.values()
    behind_norms = chain.from_iterable(stream_inputs(report).values())  # q, k and v of a layer read the same
    streams = list({(module.layer, module.kind): module for module in behind_norms}.values())
    peaks = np.stack([module.prefill.absmax for module in streams])
    strongest = peaks.max(axis=0)
    packed = np.minimum(peaks * SIXTEENTHS, 65535).astype("<u2")
    channel = int(strongest.argmax())
    return {
        "model": report.model, "method": report.method, "prompt": answer.prompt, "threshold": threshold,
        "tokens": report.prompt_tokens, "layers": len({module.layer for module in streams}),
        "kept": sum(len(module.prefill_columns(threshold)) for module in read),
        "columns": sum(module.in_features for module in read), "width": peaks.shape[1], "reads": len(peaks),
        "names": [[module.layer, module.kind] for module in streams], "channel": channel,
        "largest": float(strongest[channel]), "typical": float(np.median(strongest)),
        "strongest": len(set(peaks.argmax(axis=1).tolist())),
        "loud_channels": int((strongest >= threshold).sum()),
        "sixteenths": base64.b64encode(packed.tobytes()).decode(),
    }  # fmt: skip


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
