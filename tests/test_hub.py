"""Downloads against a stand-in hub on this machine: a repository that loads, and every way of being refused."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_stand_in import COMMIT, Hub
from huggingface_hub import constants

from llmq.contestant import Contestant
from llmq.engine.sampling import SamplingSettings
from llmq.errors import ModelUnavailable
from llmq.events import Loading
from llmq.labs.compare import Comparison
from llmq.machine.door import Machine
from llmq.models import hub as hub_module
from llmq.models.choice import hub_has
from llmq.models.loading import folder_of, load_config, load_tokenizer, prepare, resolve, revision_of
from llmq.summary import Summary


@pytest.fixture(autouse=True)
def no_other_hub(tmp_path, monkeypatch):
    """An empty cache, no token, and a hub where nobody answers."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    use("http://127.0.0.1:9", monkeypatch)


def use(address: str, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tiny_folder, monkeypatch):
    repositories = {"owner/tiny": tiny_folder, "owner/gated-files": tiny_folder}
    refusals = {  # 401 without a code is what a token that has expired gets
        "owner/gated": (401, "GatedRepo"),
        "owner/private": (401, "RepoNotFound"),
        "owner/expired": (401, None),
        "owner/broken": (500, None),
    }
    file_refusals = {"owner/gated-files": (403, "GatedRepo"), "owner/gated": (401, "GatedRepo")}
    with Hub(repositories, refusals, file_refusals, broken={"owner/hangs-up"}) as hub:
        use(hub.address, monkeypatch)
        yield hub


def fetched(name: str):
    source = resolve(name)
    list(prepare(source))
    return source


def test_a_repository_is_downloaded_once_and_opens_without_the_hub(hub, tiny_folder, monkeypatch):
    source = fetched("owner/tiny")
    use("http://127.0.0.1:9", monkeypatch)
    assert revision_of(source) == COMMIT
    assert load_config(source).hidden_size == 32
    assert load_tokenizer(source)("a")["input_ids"]
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder_of(source).iterdir()} == wanted


def test_only_files_that_llmq_opens_are_downloaded(hub, tiny_folder, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("pytorch_model.bin", "modeling_evil.py", "README.md", "weights.gguf"):
        (folder / name).write_text("no")
    hub.repositories["owner/more"] = folder
    found = {file.name for file in folder_of(fetched("owner/more")).iterdir()}
    assert found == {file.name for file in tiny_folder.iterdir()}
    assert not any(path.endswith((".bin", ".py", ".gguf")) for _, path in hub.requests)


def test_a_comparison_downloads_first_and_says_so(hub):
    asked = Comparison(
        prompt="Hi",
        model="owner/tiny",
        contestants=(Contestant.parse("fp32"),),
        sampling=SamplingSettings(max_new_tokens=2),
    )
    events = list(Machine().run(asked))
    assert [o.reason for o in Summary(events).outcomes.values()] == ["length"]
    messages = [event.message for event in events if isinstance(event, Loading) and not event.contestant]
    assert all("owner/tiny" in message for message in messages)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/gated", r"owner/gated is gated: accept its licence.*HF_TOKEN.*'demo' needs neither"),
        ("owner/gated-files", r"owner/gated-files is gated: accept its licence.*HF_TOKEN"),
        ("owner/private", r"no repository 'owner/private', or it is private and HF_TOKEN is not set"),
        ("owner/expired", r"HF_TOKEN"),
        ("owner/missing", r"no repository 'owner/missing'"),
        ("owner/broken", r"owner/broken is not in the local cache and the hub cannot be reached"),
        ("owner/hangs-up", r"owner/hangs-up is not in the local cache and the hub cannot be reached"),
    ],
)
def test_every_refusal_says_what_to_do(name, words, hub):
    with pytest.raises(ModelUnavailable, match=words):
        fetched(name)


def test_no_hub_at_all_names_the_model_that_needs_none():
    with pytest.raises(ModelUnavailable, match="owner/tiny is not in the local cache.*'demo' needs no hub"):
        fetched("owner/tiny")


def test_what_is_in_the_cache_needs_no_hub(hub, monkeypatch):
    fetched("owner/tiny")
    use("http://127.0.0.1:9", monkeypatch)
    assert fetched("owner/tiny").location == "owner/tiny"


def test_a_model_never_fetched_is_not_opened():
    with pytest.raises(ModelUnavailable, match="not in the local cache"):
        folder_of(resolve("owner/tiny"))


def test_a_repository_without_weights_is_told_so(hub, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    hub.repositories["owner/bare"] = tmp_path / "bare"
    with pytest.raises(ModelUnavailable, match="owner/bare has no safetensors weights"):
        folder_of(fetched("owner/bare"))


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelUnavailable, match="cannot store owner/tiny"):
        fetched("owner/tiny")


def test_a_download_tells_how_long_it_has_been_going(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(hub_module, "snapshot", lambda repo, *, local_only: gate.wait(20))
    progress = prepare(resolve("owner/tiny"))
    first = next(progress)
    gate.set()
    assert first.message.startswith("fetching owner/tiny from the hub (") and 0 <= first.fraction <= 1
    list(progress)


def test_a_stop_does_not_wait_for_the_download(monkeypatch):
    """Thirteen gigabytes may take an hour; whoever stops, or closes the page, must not hold the device meanwhile."""
    gate = threading.Event()
    monkeypatch.setattr(hub_module, "snapshot", lambda repo, *, local_only: gate.wait(3))
    progress = prepare(resolve("owner/tiny"))
    next(progress)
    started = time.monotonic()
    progress.close()
    elapsed = time.monotonic() - started
    gate.set()
    assert elapsed < 1.5


def test_a_stopped_download_does_not_hold_up_the_end_of_the_program():
    """Ctrl-C at a terminal: the interpreter must not wait at its exit for a thread that is still fetching."""
    code = (
        "import time\nfrom llmq.models import hub, loading\n"
        "hub.snapshot = lambda repo, *, local_only: time.sleep(30)\n"
        "progress = loading.prepare(loading.resolve('owner/tiny'))\nnext(progress)\nprogress.close()\nprint('closed')"
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout.readline() == "closed\n"
            assert program.wait(timeout=3) == 0
        finally:
            program.kill()


@pytest.mark.parametrize(
    ("name", "found"),
    [("owner/tiny", True), ("owner/missing", False), ("owner/gated-files", False), ("owner/hangs-up", False)],
)
def test_the_hub_is_asked_for_one_small_file(name, found, hub):
    assert hub_has(name) is found
    assert hub.requests == [("HEAD", f"/{name}/resolve/main/config.json")]


def test_a_cached_configuration_needs_no_question(hub, monkeypatch):
    fetched("owner/tiny")
    hub.requests.clear()
    assert hub_has("owner/tiny") and hub.requests == []


def test_an_offline_machine_asks_nobody(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_has("owner/tiny") and hub.requests == []
