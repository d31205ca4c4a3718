"""A real server: transformers' own, with the demo model, beside FP16 here."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from socket import create_server
from urllib.error import URLError
from urllib.request import urlopen

import pytest

import llmq
from llmq.labs.server import ServerLab
from llmq.models.loading import folder_of
from llmq.servers.served import Served

pytestmark = pytest.mark.demo
START_SECONDS = 240
PROMPT = "Name three colours."


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory):
    """The name of a server that is ready."""
    pytest.importorskip("openai")
    with closing(create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    asked = [str(folder_of(demo)), "--port", str(port), "--device", "cpu", "--dtype", "float16"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as said, subprocess.Popen([*command, *asked], stdout=said, stderr=said) as process:
        try:
            ends = time.monotonic() + START_SECONDS
            while not answers(port):
                assert process.poll() is None and time.monotonic() < ends, log.read_text()
                time.sleep(0.2)
            yield f"transformers@http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


@pytest.mark.parametrize("sent", ["messages", "text"])
def test_it_writes_the_same_greedy_tokens_as_fp16_here(server, sent):
    """Through transformers here, too: the same arithmetic."""
    found = llmq.compare(PROMPT, ["fp16", server], max_new_tokens=24, engine="hf", sent=sent).to_json()
    own, served = found["contestants"]
    assert served["error"] is None and served["token_ids"] == own["token_ids"] and len(own["token_ids"]) == 24
    assert served["text"] == own["text"] and served["prompt_tokens"] == own["prompt_tokens"]
    assert found["agreement"] == {"first_divergence": None, "matching_prefix_tokens": 24}
    assert served["decode_tokens_per_second"] > 0 and served["prefill_seconds"] > 0 and served["engine"] == "http"
    assert served["weight_bytes"] is served["peak_bytes"] is None


def test_its_text_is_what_fp16_here_would_have_written(server):
    """It tells no log-probabilities, so choices are what is held against each other."""
    asked = ServerLab(server=Served.parse(server), prompt=PROMPT, tokens=24)
    *_, found = llmq.face.machine().run(asked)
    fp16, int8 = found.rows
    assert fp16["top1_agreement"] == 1.0 and fp16["first_difference"] is None and fp16["kl_lower_bound"] is None
    assert int8["tokens"] == 24


def test_a_model_that_it_does_not_have_is_said(server):
    name = f"{server}#no/such-model"
    found = llmq.compare(PROMPT, [name], max_new_tokens=4).to_json()["contestants"][0]
    assert "answers 400" in found["error"] and "no/such-model" in found["error"]
