"""Fixtures: a tiny random LLaMA with a byte tokenizer, the demo model, and a fixed seed for every test."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if not os.environ.get("LLMQ_TEST_GPU"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when triton is imported
if os.environ.get("PYTEST_XDIST_WORKER"):  # beside other workers a thread that waits for a preempted one costs 10 times
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from llmq import face  # noqa: E402


def pytest_report_header() -> str:
    import bitsandbytes
    import transformers

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA device"
    versions = f"transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}"
    return f"torch {torch.__version__}, {versions}, {device}"


def pytest_collection_modifyitems(items):
    """The files of the browser first: they take longest, and a worker given one at the end works alone. A file
    keeps its own order."""
    files = {item.path for item in items if "browser" in item.keywords}
    items.sort(key=lambda item: item.path not in files)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure in a browser says what its tabs showed: a state that never came is told by the one that did."""
    report = yield
    if report.failed and call.when == "call" and (browser := item.funcargs.get("browser")):
        for tab in (tab for context in browser.contexts for tab in context.pages):
            with suppress(Exception):  # a tab that crashed shows nothing
                report.sections.append((f"{tab.url:.80} shows", tab.locator("body").inner_text(timeout=5000)[:4000]))
    return report


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def machine_of_its_own():
    """No test finds the models of another one loaded."""
    yield
    face.machine.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def environment_of_its_own():
    """A page started in this process says where all of Gradio keeps files: in a folder that goes with that page, and
    with it would go the files of the next module's tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def tiny_config(**changes):
    """A LLaMA small enough to run thousands of steps in a test."""
    from transformers import LlamaConfig

    shape = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    return LlamaConfig(**(shape | changes))


def tiny_llama(dtype=torch.float32, **changes):
    """A random LLaMA over the byte vocabulary, in eval mode; a fresh model each call, the same weights each time."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**changes)).to(dtype).eval().requires_grad_(False)


def byte_tokenizer():
    """One token a byte, then <s>, </s> and <pad>: every multi-byte character is split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


@pytest.fixture
def private_folder():
    """An empty folder of somebody without rights, whom the test becomes: root may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The tiny LLaMA and its tokenizer as a local model folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama(torch.float16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo():
    """The demo model's source, fetched and converted when this machine has not seen it."""
    from llmq.models.loading import prepare, resolve

    source = resolve("demo")
    for _ in prepare(source):
        pass
    return source


@pytest.fixture
def run(capsys):
    """Run the command line in this process: exit status, lines of standard output, lines of standard error."""
    from tiny_runs import run_cli

    return lambda *arguments: run_cli(capsys, *arguments)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; without one the browser tests are skipped, or fail where they are required. It ends with its
    module: as long as Playwright is there its event loop runs, and no test may start another one."""
    from browser_support import CHROMIUM_FLAGS, chromium_path

    path = chromium_path()
    if path is None:
        message = "NO CHROMIUM FOUND: the page was not tested. Install Debian's chromium, or set CHROMIUM."
        if os.environ.get("LLMQ_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def address(demo):
    """The running app, one for all who ask for no flags: a start takes ten seconds of both cores."""
    from browser_support import running_app

    with running_app() as url:
        yield url


@pytest.fixture
def page(browser, address):
    """An empty tab that remembers which hosts it asked."""
    from browser_support import new_tab

    tab = new_tab(browser, viewport={"width": 1400, "height": 1000})
    tab.hosts = set()
    tab.on("request", lambda request: tab.hosts.add(request.url.split("/")[2]))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    """Where pictures go: LLMQ_SCREENSHOTS (the README's), else a scratch folder."""
    named = os.environ.get("LLMQ_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
