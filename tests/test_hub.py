"""Downloads against a stand-in hub on this machine: a repository that loads, and every way of being refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from hub_stand_in import PIECE, Hub, commit_of
from huggingface_hub import constants

from llmq.contestant import Contestant
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, ModelUnavailable, UserError
from llmq.events import Loading
from llmq.labs.compare import Comparison
from llmq.machine.door import Machine
from llmq.memory import forecast
from llmq.models import choice
from llmq.models import hub as hub_module
from llmq.models.hub import Download, plan
from llmq.models.loading import folder_of, load_config, load_tokenizer, prepare, resolve, revision_of
from llmq.models.opening import describe_model
from llmq.models.presets import PRESETS
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
    assert revision_of(source) == commit_of(tiny_folder)
    assert load_config(source).hidden_size == 32
    assert load_tokenizer(source)("a")["input_ids"]
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder_of(source).iterdir()} == wanted


def repository(folder: Path, origin: Path, *more: str) -> Path:
    """A copy of `origin`, with files that hold nothing beside it."""
    shutil.copytree(origin, folder)
    for name in more:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no")
    return folder


def sharded(folder: Path) -> Path:
    """The tiny model in three files and an index, with a tokenizer."""
    tiny_llama(torch.float16).save_pretrained(folder, max_shard_size="30kB")
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


def test_only_files_that_llmq_opens_are_downloaded(hub, tiny_folder, tmp_path):
    other = ("pytorch_model.bin", "modeling_evil.py", "README.md", "weights.gguf", "consolidated.safetensors")
    more = ("chat_template.jinja", "original/params.json", "onnx/model.safetensors", "model.fp16.safetensors")
    hub.repositories["owner/more"] = repository(tmp_path / "more", tiny_folder, *other, *more)
    folder = folder_of(fetched("owner/more"))
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert found == {file.name for file in tiny_folder.iterdir()} | {"chat_template.jinja"}
    assert not any(path.endswith(("consolidated.safetensors", "params.json", ".bin")) for _, path in hub.requests)


def test_a_model_in_parts_is_downloaded_by_its_index(hub, tmp_path):
    origin = sharded(tmp_path / "parts")
    shutil.copyfile(origin / "model-00001-of-00003.safetensors", origin / "consolidated.safetensors")
    hub.repositories["owner/parts"] = origin
    found = sorted(file.name for file in folder_of(fetched("owner/parts")).glob("*.safetensors"))
    assert found == [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]


def test_a_download_that_was_cut_off_is_not_taken_for_a_model(hub, tmp_path, monkeypatch):
    hub.repositories["owner/parts"] = sharded(tmp_path / "parts")
    folder = folder_of(fetched("owner/parts"))
    assert plan("owner/parts").cached
    (folder / "model-00002-of-00003.safetensors").unlink()
    lost = (tmp_path / "parts" / "model-00002-of-00003.safetensors").stat().st_size
    assert plan("owner/parts").bytes == lost
    use("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ModelUnavailable, match="not in the local cache"):
        fetched("owner/parts")
    with pytest.raises(ModelUnavailable, match="owner/parts lacks 1 of 3 files: model-00002-of-00003.safetensors"):
        folder_of(resolve("owner/parts"))


@pytest.mark.parametrize("name", ["owner/tiny@v2", "https://huggingface.co/owner/tiny/tree/v2", "owner/tiny@refs/pr/7"])
def test_a_revision_is_that_revision(name, hub, tiny_folder, tmp_path, monkeypatch):
    other = repository(tmp_path / "other", tiny_folder)
    changed = (other / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5')
    (other / "config.json").write_text(changed)
    hub.repositories |= {("owner/tiny", "v2"): other, ("owner/tiny", "refs/pr/7"): other}
    main, source = fetched("owner/tiny"), fetched(name)
    use("http://127.0.0.1:9", monkeypatch)
    assert (revision_of(main), revision_of(source)) == (commit_of(tiny_folder), commit_of(other))
    assert (load_config(main).rms_norm_eps, load_config(source).rms_norm_eps) == (1e-6, 0.5)
    assert source.name == f"owner/tiny@{source.revision}"
    commit = fetched(f"owner/tiny@{commit_of(other)}")  # a commit is one too, and is here already
    assert folder_of(commit) == folder_of(source)


def test_a_revision_that_does_not_exist_is_named(hub):
    with pytest.raises(ModelUnavailable, match="owner/tiny has no revision 'v9' on the hub"):
        fetched("owner/tiny@v9")


def test_bytes_are_counted_from_the_configuration_alone(hub, monkeypatch):
    model, contestants = describe_model("owner/tiny"), [Contestant.parse("fp16")]
    asked = {"tokens": 10, "device_bytes": 1e9}
    result = forecast(model, contestants, **asked)
    assert result["results"][0]["fits"] and result["model_context"] == 128
    files = {path.rpartition("/")[2] for _, path in hub.requests if not path.startswith("/api/")}
    assert files == {"config.json"}
    use("http://127.0.0.1:9", monkeypatch)
    assert forecast(describe_model("owner/tiny"), contestants, **asked) == result
    with pytest.raises(ModelUnavailable, match="no safetensors weights"):
        folder_of(resolve("owner/tiny"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/gated", "is gated"),
        ("owner/gated-files", "is gated"),
        ("owner/nobody", "no repository 'owner/nobody'"),
        ("owner/tiny@nowhere", "no revision 'nowhere'"),
        ("owner/hangs-up", "cannot be reached"),
        ("owner/empty", "has no config.json"),
    ],
)
def test_a_configuration_that_cannot_be_had_says_why_in_one_line(name, words, hub, tmp_path):
    (tmp_path / "empty").mkdir()
    hub.repositories["owner/empty"] = tmp_path / "empty"
    with pytest.raises(ModelUnavailable, match=words) as caught:
        describe_model(name).config  # noqa: B018
    assert "\n" not in str(caught.value)


def test_a_plan_counts_what_is_missing_and_fetches_nothing(hub, tiny_folder, monkeypatch):
    missing = plan("owner/tiny")
    assert missing.bytes == sum(file.stat().st_size for file in tiny_folder.iterdir())
    assert not missing.cached and missing.free_bytes > 0
    assert {command for command, _ in hub.requests} == {"GET"} and len(hub.requests) == 1
    fetched("owner/tiny")
    hub.requests.clear()
    monkeypatch.setattr(hub_module, "_free_bytes", lambda: 1)
    assert plan("owner/tiny") == Download(0, 1, True)
    assert hub.requests == []


def test_the_first_start_fetches_nothing_large(hub, tiny_folder, monkeypatch):
    """The app on a GPU that holds 7 B: the model is chosen once somebody has asked for it."""
    monkeypatch.setattr(choice.telemetry, "free_bytes", lambda device: 80e9)
    hub.repositories[PRESETS[choice.GPU_DEFAULT].hub_id] = tiny_folder
    assert choice.choose_model(None, "cuda:0").model == "demo"
    assert not any("resolve" in path for _, path in hub.requests)
    fetched(choice.choose_model(choice.GPU_DEFAULT, "cuda:0").model)
    assert choice.choose_model(None, "cuda:0").model == choice.GPU_DEFAULT


def test_too_small_a_disk_is_told_before_anything_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "_free_bytes", lambda: 1000)
    with pytest.raises(UserError, match="owner/tiny needs 0.0 GB and 0.0 GB are free.*HF_HOME"):
        fetched("owner/tiny")
    assert not any("resolve" in path for _, path in hub.requests)


def test_a_large_download_says_its_size(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(
        hub_module, "_missing", lambda repo, revision, token=None: {"model.safetensors": 13_476_000_000}
    )
    monkeypatch.setattr(hub_module, "_free_bytes", lambda: 200 * 10**9)
    monkeypatch.setattr(hub_module, "_fetch", lambda *_: gate.wait(20))
    progress = prepare(resolve("owner/tiny"))
    assert next(progress).message.startswith("fetching owner/tiny from the hub, 13.5 GB of 200 GB that are free")
    gate.set()
    list(progress)


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
        fetched("owner/bare")
    (tmp_path / "bare" / "model.Q8_0.gguf").write_text("")
    with pytest.raises(ModelUnavailable, match="owner/bare holds GGUF files"):
        fetched("owner/bare")


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelUnavailable, match="cannot store owner/tiny"):
        fetched("owner/tiny")


def test_a_download_tells_how_long_it_has_been_going(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(hub_module, "_missing", lambda repo, revision, token=None: {})
    monkeypatch.setattr(hub_module, "_fetch", lambda *_: gate.wait(20))
    progress = prepare(resolve("owner/tiny"))
    first = next(progress)
    gate.set()
    assert first.message.startswith("fetching owner/tiny from the hub (") and 0 <= first.fraction <= 1
    list(progress)


def test_a_stop_does_not_wait_for_the_download(monkeypatch):
    """Thirteen gigabytes may take an hour; whoever stops, or closes the page, must not hold the device meanwhile."""
    gate = threading.Event()
    monkeypatch.setattr(hub_module, "_missing", lambda repo, revision, token=None: gate.wait(3))
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
        "hub._missing = lambda repo, revision, token=None: time.sleep(30)\n"
        "progress = loading.prepare(loading.resolve('owner/tiny'))\nnext(progress)\nprogress.close()\nprint('closed')"
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout.readline() == "closed\n"
            assert program.wait(timeout=3) == 0
        finally:
            program.kill()


def downloads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hub-download"]


def begun(name: str, hub: Hub):
    """A download of `name` whose weights are on their way."""
    progress = prepare(resolve(name))
    while not hub.trickled:
        next(progress)
    return progress


@pytest.fixture
def slow_hub(hub, monkeypatch):
    """A hub whose files come in pieces, for minutes where nobody hurries it; the client hears of each."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.slow.set()
    yield hub
    hub.slow.clear()


def test_a_stopped_download_ends(slow_hub):
    progress = begun("owner/tiny", slow_hub)
    (thread,) = downloads()
    progress.close()
    thread.join(20)
    assert not thread.is_alive() and slow_hub.slow.is_set()


def test_whoever_asks_for_a_download_that_goes_on_waits_for_it(slow_hub):
    first, second = begun("owner/tiny", slow_hub), prepare(resolve("owner/tiny"))
    while not next(second).message.startswith("fetching owner/tiny"):
        pass
    first.close()
    slow_hub.slow.clear()
    list(second)
    asked = [path for command, path in slow_hub.requests if command == "GET" and path.endswith(".safetensors")]
    assert len(asked) == 1 and folder_of(resolve("owner/tiny")).is_dir()


def test_a_download_that_was_stopped_is_begun_again(slow_hub):
    begun("owner/tiny", slow_hub).close()
    slow_hub.slow.clear()
    assert folder_of(fetched("owner/tiny")).is_dir()


def test_an_offline_machine_asks_nobody(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="hub cannot be reached"):
        plan("owner/tiny")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("https://huggingface.co/owner/name", ("owner/name", None)),
        ("https://huggingface.co/owner/name/", ("owner/name", None)),
        ("http://www.huggingface.co/owner/name?library=x#files", ("owner/name", None)),
        ("huggingface.co/owner/name/tree/v1.0", ("owner/name", "v1.0")),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F3", ("owner/name", "refs/pr/3")),
        ("https://hf.co/owner/name/commit/0123abc", ("owner/name", "0123abc")),
        ("https://huggingface.co/owner/name.git", ("owner/name", None)),
        ("git@hf.co:owner/name.git", ("owner/name", None)),
        ("ssh://git@hf.co/owner/name", ("owner/name", None)),
    ],
)
def test_every_way_to_name_a_repository_is_understood(name, address):
    source = resolve(name)
    assert (source.kind, source.location, source.revision) == ("hub", *address)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/name:Q8_0", "'owner/name:Q8_0' is GGUF, rounded already: choose the repository or folder"),
        ("hf.co/owner/name:Q8_0", "is GGUF"),
        ("missing/model.gguf", "is GGUF"),
        ("https://huggingface.co/owner/name/blob/main/config.json", "is no model on the hub: choose owner/name"),
        ("https://huggingface.co/owner/name/tree/main/onnx", "is no model on the hub"),
        ("https://huggingface.co/owner", "is no model on the hub"),
        ("https://huggingface.co", "is no model on the hub"),
        ("https://huggingface.co/datasets/owner/name", "is no model on the hub"),
        ("https://huggingface.co/spaces/owner/name", "is no model on the hub"),
        ("https://github.com/owner/name", "is no model on the hub.*or fetch it and name the folder it is in"),
        ("git@github.com:owner/name.git", "is no model on the hub"),
        ("s3://bucket/model", "is no model on the hub"),
        ("owner/name@", "unknown model"),
        ("demo@v1", "unknown model"),
    ],
)
def test_what_is_understood_and_not_opened_says_why(name, words):
    with pytest.raises(BadChoice, match=words):
        resolve(name)


def test_a_file_is_not_opened(tiny_folder, tmp_path):
    with pytest.raises(BadChoice, match=rf"is a file, and a model has several: give the folder .{tiny_folder}"):
        resolve(str(tiny_folder / "model.safetensors"))
    (tmp_path / "model.Q8_0.gguf").write_text("")
    with pytest.raises(BadChoice, match="is GGUF"):
        resolve(str(tmp_path / "model.Q8_0.gguf"))
