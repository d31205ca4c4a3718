"""Save an answer, open a saved one: two quiet buttons, and a file that is written only when somebody wants it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import gradio as gr

from llmq.errors import UserError
from llmq.labs import load_answer, save_answer
from llmq.ui.parts.notices import notice
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import QUIET

LARGEST_ANSWER = 32_000_000  # bytes
log = logging.getLogger(__name__)


class Keeping:
    """The buttons of a part that shows answers of `kinds`. Its `key` holds under which name the answer is kept."""

    def __init__(self, state: AppState, *kinds: str):
        self.state, self.kinds = state, kinds

    def build(self, name: str, what: str) -> None:
        self.name = name
        with gr.Row(elem_classes=["llmq-keeping"]):
            self.save = gr.Button(f"Save {what}", size="sm", elem_id=f"{name}-save", interactive=False, min_width=120)
            self.open = gr.UploadButton(
                "Open a saved one", file_types=[".json"], type="filepath", size="sm", elem_id=f"{name}-open",
                min_width=140,
            )  # fmt: skip
            self.file = gr.DownloadButton("The file", elem_id=f"{name}-file", visible="hidden")
        self.key = gr.State(None)

    def wire(self, opened: Callable[[str], dict], outputs: list) -> None:
        """`opened(file)`: what the part shows of a saved answer, in `outputs`."""
        written = self.save.click(self._write, self.key, self.file, **QUIET)
        written.success(None, None, None, js=download(self.name), **QUIET)
        self.open.upload(opened, self.open, outputs, **QUIET)
        self.key.change(lambda key: gr.Button(interactive=bool(key)), self.key, self.save, **QUIET)

    def kept(self, answer) -> dict:
        """What to show when there is a new answer to save."""
        return {self.key: self.state.keep(answer)}

    def answer_in(self, upload: str):
        """The answer in a file that somebody uploaded. Raises UserError that names no place on this machine."""
        path = Path(upload)
        if path.stat().st_size > LARGEST_ANSWER:
            raise UserError(f"{path.name} is larger than {LARGEST_ANSWER // 1_000_000} MB")
        try:
            answer = load_answer(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), path.name)) from error
        if answer.kind not in self.kinds:
            raise UserError(
                f"{path.name} holds an answer of the kind {answer.kind!r}; open one of {self.kinds[0]!r} here"
            )
        return answer

    def _write(self, key: str | None) -> gr.DownloadButton:
        answer = self.state.kept(key)
        if answer is None:
            raise notice("This is no longer kept on the server; measure it again.")
        path = self.state.download_path(f"llmq-{answer.kind}-{key}-{datetime.now():%Y%m%d-%H%M%S}.json")
        try:
            save_answer(answer, path)
        except UserError as error:
            log.error("an answer is not saved: %s", error)
            raise notice("This cannot be downloaded: the server could not save it.") from None
        return gr.DownloadButton(value=str(path))


def download(name: str) -> str:
    """The script that downloads the file of a part, a moment after it has its address."""
    return f"() => setTimeout(() => document.querySelector('#{name}-file')?.click(), 100)"
