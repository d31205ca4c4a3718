"""The part of the Compare form that names a server: its address, its key, a look at what it has."""

from __future__ import annotations

import html
from contextlib import closing

import gradio as gr

from llmq.errors import UserError
from llmq.servers.protocol import Refused
from llmq.servers.reach import Reach
from llmq.servers.served import Served
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import QUIET

ABOUT = (
    "A server of the OpenAI protocol can be compared, too: vLLM, SGLang, llama.cpp, TGI, Ollama, `transformers serve`. "
    "Its times are measured here, over HTTP, with its queue. The key stays in this page: no link, file or log has it."
)
SHOWN = 50  # models of a server to choose from


class ServerForm:
    """Builds its controls inside an open form. What is chosen becomes the value of `target`, a method's field."""

    def __init__(self, state: AppState):
        self.state = state

    def build(self) -> None:
        with gr.Accordion("Compare with a server", open=False, elem_id="server"):
            gr.Markdown(self._about())
            with gr.Row(equal_height=True):
                self.address = gr.Textbox(
                    label="Server", placeholder="vllm@http://localhost:8000/v1", elem_id="server-address", scale=3,
                    min_width=240, max_lines=1,
                )  # fmt: skip
                self.key = gr.Textbox(
                    label="Key", type="password", placeholder="none", elem_id="server-key", scale=1, min_width=140,
                    max_lines=1,
                )  # fmt: skip
                self.test = gr.Button("Test", elem_id="server-test", scale=0, min_width=110)
            self.said = gr.HTML(elem_id="server-said", visible=False)
            with gr.Row():
                self.model = gr.Dropdown(
                    label="Its model", info="Chosen, it is the third method.", elem_id="server-model", visible=False
                )

    def _about(self) -> str:
        hosts = self.state.access.reach.hosts
        if hosts is None:
            return ABOUT
        named = f"This page asks {', '.join(sorted(hosts))}." if hosts else "This page asks no servers."
        return f"{ABOUT} {named}"

    def wire(self, target: gr.Dropdown) -> None:
        self.target = target
        self.test.click(self._test, [self.address, self.key], [self.said, self.model, target], **QUIET)
        self.model.input(self._chosen, [self.address, self.model], target, **QUIET)

    def keys(self, address: str, key: str) -> dict[str, str]:
        """The key for the host of the address; none where there is no key. Raises UserError for an address that is
        none."""
        return {Served.parse(address).host: key.strip()} if key and key.strip() else {}

    def _test(self, address: str, key: str) -> dict:
        """What the server offers, or in one line why that is not known."""
        try:
            served = Served.parse(address or "")
            models = offered(served, self.state.access.reach.with_keys(self.keys(address, key)))
        except UserError as error:
            return {self.said: _line(f"Not known: {error}."), self.model: gr.Dropdown(visible=False)}
        chosen = served.model or models[0]
        choices = list(dict.fromkeys((chosen, *models[:SHOWN])))
        return {
            self.said: _line(f"It answers, and {chosen} is the third method now."),
            self.model: gr.Dropdown(choices, value=chosen, visible=True),
            self.target: self._chosen(address, chosen),
        }

    def _chosen(self, address: str, model: str) -> str:
        """The name of the server with this model."""
        served = Served.parse(address)
        return Served(served.dialect, served.url, model).label


def _line(text: str) -> gr.HTML:
    """A line that is read out when it comes; whatever a server says in it is text."""
    return gr.HTML(f'<p role="status">{html.escape(text)}</p>', visible=True)


def offered(served: Served, reach: Reach) -> tuple[str, ...]:
    """The models of a server. Raises UserError where it does not say."""
    from llmq.servers.connection import Connection

    with closing(Connection(served, reach)) as connection:
        try:
            found = connection.models()
        except Refused as error:
            raise UserError(f"{error}; type the name of its model after a #") from None
    if not found and not served.model:
        raise UserError(f"the server at {served.host} lists no models; type the name of one after a #")
    return found
