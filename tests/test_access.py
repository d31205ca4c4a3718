"""What a visitor may open: decided once, said in the same words, and never with the owner's token."""

from __future__ import annotations

import ast
import re

import gradio as gr
import pytest
from browser_support import ROOT
from hub_stand_in import Hub
from huggingface_hub import constants
from test_handlers import Page
from test_hub import hub, no_other_hub, use  # noqa: F401
from test_layering import SOURCES, parse, within

import app
from llmq.errors import BadChoice, ModelUnavailable, UserError
from llmq.events import Waiting
from llmq.labs.outliers import Inspection
from llmq.machine.door import Machine
from llmq.models.loading import prepare
from llmq.models.presets import PRESETS
from llmq.stored import MOST_BYTES
from llmq.ui.shell.access import ANYBODY, Access, is_open
from llmq.ui.shell.guard import HEADERS
from llmq.ui.shell.guesses import AT_ONCE, EVERY_SECONDS
from llmq.ui.shell.state import KEPT_FINDINGS, MOST_FILE_BYTES
from llmq.ui.tabs.compare_tab import LONGEST_REPLAY, MOST_EVENTS, MOST_TOKENS, CompareTab
from llmq.ui.tabs.fit_tab import answer
from llmq.ui.tabs.outliers_tab import OutliersTab

FIT = ("rtx-4080", "", 2048, 1)
HIDDEN = [
    "/root",
    "/root/.ssh",
    "/nonexistent",
    "~root",
    "..",
    "/etc/passwd",
    "owner/tiny",
    "gpt2",
    "",
    "a" * 70,
    "\x00",
]


@pytest.mark.parametrize(
    ("host", "share", "space", "expected"),
    [
        ("127.0.0.1", False, False, False), ("localhost", False, False, False), ("[::1]", False, False, False),
        ("127.0.0.1", True, False, True), ("127.0.0.1", False, True, True), ("0.0.0.0", False, False, True),
        ("192.168.0.2", False, False, True), ("[::]", False, False, True), ("class.example", False, False, True),
    ],
)  # fmt: skip
def test_a_page_that_others_reach_is_public_unless_the_owner_says_otherwise(host, share, space, expected, monkeypatch):
    assert is_open(host, share=share, hosted=space) == expected
    for name in app.HOSTS:
        monkeypatch.delenv(name, raising=False)
    if space:
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    flags = ["--host", host.strip("[]"), *(["--share"] if share else [])]
    assert app.access_for(app.parse(flags), "demo").public == expected
    assert app.access_for(app.parse([*flags, "--private"]), "demo") == ANYBODY
    assert app.access_for(app.parse([*flags, "--public"]), "demo").public


def test_the_owner_names_what_else_may_be_opened(tiny_folder):
    flags = ["--host", "0.0.0.0", "--allow-models", f"{tiny_folder}, llama-3.1-8b-instruct"]
    access = app.access_for(app.parse([*flags, "--allow-downloads", "1.5"]), "meta/one")
    free = {name for name, preset in PRESETS.items() if not preset.gated}
    assert set(access.models) == free | {"meta/one", str(tiny_folder), "llama-3.1-8b-instruct"}
    assert (access.fetching.most_bytes, access.fetching.token) == (1_500_000_000, False)
    assert access.open_model(str(tiny_folder)).config.hidden_size == 32
    assert app.access_for(app.parse(flags), "demo").fetching.most_bytes == 0
    for wrong in ("much", "-1"):
        with pytest.raises(UserError, match=f"--allow-downloads is '{wrong}'; choose a number over 0 in GB"):
            app.access_for(app.parse([*flags, f"--allow-downloads={wrong}"]), "demo")


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("way", ["open", "describe", "fit"])
def test_every_other_name_gets_the_same_words(name, way):
    access = Access.of_strangers()

    def told(name) -> str:
        if way == "fit":
            return answer(name, *FIT, access)["headline"]
        with pytest.raises(BadChoice) as raised:
            (access.open_model if way == "open" else access.describe_model)(name)
        return str(raised.value)

    name = name.strip()
    assert told(name).replace(repr(name), "") == told("nothing").replace("'nothing'", "")


def test_a_visitor_gets_no_random_weights_and_no_endless_answer():
    access = Access.of_strangers()
    with pytest.raises(BadChoice, match="no random weights"):
        access.open_model("llama-2-7b-chat", random_weights=True)
    with pytest.raises(BadChoice, match="4096; choose a whole number from 1 to 1024"):
        access.check_tokens(4096)
    assert access.describe_model("llama-3.1-8b-instruct").shape, "its shape may be counted"


def test_the_page_offers_what_it_opens(tiny_folder):
    for access in (ANYBODY, Access.of_strangers((str(tiny_folder),))):
        page = Page()
        page.state.access = access
        for tab in (CompareTab(page.state), OutliersTab(page.state)):
            with gr.Blocks():
                tab.build()
            assert [name for _, name in tab.model.choices] == list(access.models or PRESETS)


def test_a_sweep_asks_for_its_names_before_anything_is_measured():
    machine = Machine()
    machine.open = Access.of_strangers().open_model
    seen = []
    with pytest.raises(BadChoice, match="unknown model '/root'"):
        for item in machine.run(Inspection(sweep="demo,/root")):
            seen.append(type(item))
    assert set(seen) == {Waiting}


@pytest.mark.parametrize(
    ("room", "words"), [(0, "not on this server, which fetches nothing"), (1000, "at most for vis")]
)
def test_a_visitor_fetches_no_more_than_is_allowed(hub, tiny_folder, room, words):  # noqa: F811
    model = Access.of_strangers(("owner/tiny",), room).open_model("owner/tiny")
    with pytest.raises(ModelUnavailable, match=words):
        list(model.prepare())
    asked = [path for _, path in hub.requests]
    assert not any("resolve" in path and "config.json" not in path for path in asked), "no file of the model"
    assert not asked or room, "where nothing may be fetched nobody is asked"


def test_a_visitor_s_model_comes_without_the_owner_s_token(tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    with Hub({"owner/tiny": tiny_folder}) as hub:  # noqa: F811
        use(hub.address, monkeypatch)
        model = Access.of_strangers(("owner/tiny",), 10**9).open_model("owner/tiny")
        list(model.prepare())
        assert len(hub.requests) > 3 and set(hub.tokens) == {None}
        assert list(Access.of_strangers(("owner/tiny",)).open_model("owner/tiny").prepare()) == [], "it is here now"
        list(prepare(ANYBODY.open_model("owner/tiny").source))
        assert "Bearer hf_owner" in hub.tokens, "the owner's own questions carry it"
    assert constants.ENDPOINT == hub.address


def test_the_page_opens_models_through_what_it_may_open_only():
    found = set()
    for name in SOURCES:
        if within(name, ("llmq.ui",)) and name != "llmq.ui.shell.access":
            imported = (node for node in ast.walk(parse(name)) if isinstance(node, ast.ImportFrom))
            names = {(node.module, alias.name) for node in imported for alias in node.names}
            found |= {(name, other) for module, other in names if (module or "").startswith("llmq.models")}
    opening = {"open_model", "describe_model", "resolve", "prepare", "opening", "loading", "hub"}
    assert {pair for pair in found if pair[1] in opening} == set()


def test_the_document_says_what_is_so():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    stranger = Access.of_strangers()
    for number in (ANYBODY.most_tokens, stranger.most_tokens, MOST_EVENTS, MOST_TOKENS):
        assert f"{number:,}" in text
    for size in (ANYBODY.upload_bytes, stranger.upload_bytes):
        assert f"{size // 1_000_000} MB" in text
    assert f"{MOST_BYTES >> 20} MiB" in text and f"{MOST_FILE_BYTES // 10**9} GB at most, the oldest" in text
    assert f"Outliers tab stay in memory, {KEPT_FINDINGS} at most" in text and all(name in text for name in HEADERS)
    flags = set(re.findall(r"--[a-z][a-z-]+", text))
    assert flags >= {
        "--share",
        "--private",
        "--public",
        "--allow-models",
        "--allow-servers",
        "--allow-downloads",
        "--auth",
    }
    values = dict.fromkeys(("--allow-models", "--allow-frames", "--model"), "demo")
    values |= {"--allow-servers": "gpu.example:8000", "--allow-downloads": "3", "--auth": "a:b", "--host": "::1"}
    for flag in flags:
        app.parse([flag, *([values[flag]] if flag in values else [])])
    assert AT_ONCE == 10 and EVERY_SECONDS == 2.0 and LONGEST_REPLAY == 3600
    assert "docs/security.md" in (ROOT / "README.md").read_text(encoding="utf-8")
