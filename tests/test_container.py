"""The container: clean files, whose own commands start a server on a read-only root for a user without a name."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from container_stand_in import ROOT, Container, all_of, last
from gradio_client import Client

from llmq.models.demo import demo_folder

DEPLOY = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def test_hadolint_finds_nothing():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_compose_serves_what_the_image_offers_and_gives_away_nothing_more():
    (service,) = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    assert service["ports"] == [f"${{PORT:-7860}}:{last('EXPOSE')}"]
    assert [volume.partition(":")[2] for volume in service["volumes"]] == all_of("VOLUME")
    assert service["read_only"] and service["tmpfs"] == ["/tmp"] and service["cap_drop"] == ["ALL"]
    assert set(service["build"]["args"]) == {line.partition("=")[0] for line in all_of("ARG")}
    assert not {"privileged", "user", "network_mode"} & service.keys()
    user, group = map(int, last("USER").split(":"))
    assert user > 1000 and group > 1000


@pytest.mark.parametrize(
    ("index", "asked"), [("", []), ("https://x.example/cpu", ["--index-url", "https://x.example/cpu"])]
)
def test_the_one_build_argument_says_where_torch_comes_from(index, asked, tmp_path):
    """A pip that writes down what it is asked stands in for pip."""
    (tmp_path / "pip").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "pip").chmod(0o755)
    (command,) = (line for line in all_of("RUN") if "pip install" in line)
    placed = command.replace("/tmp/torch.txt", f"{tmp_path}/torch.txt")
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH_INDEX": index}
    subprocess.run(["sh", "-ec", placed], cwd=ROOT, env=path, check=True)
    torch, rest = (tmp_path / "asked").read_text().splitlines()
    assert torch.split()[2:] == [*asked, "-r", f"{tmp_path}/torch.txt"]
    assert rest.split()[2:] == ["-r", "requirements.txt"]
    assert all_of("ARG") == ['TORCH_INDEX=""'] and "`TORCH_INDEX` is the one build argument" in DEPLOY


@pytest.fixture
def container(demo):
    """As built from here, in this Python, with the demo model that this machine has."""
    if os.geteuid() or not shutil.which("unshare") or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("only root can make a root that cannot be written")
    if shut := [str(place) for place in Path(sys.prefix).parents if not place.stat().st_mode & 1]:
        pytest.skip(f"nobody but root may enter {shut[0]}, where this Python is")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        container = Container(Path(place), Path(sys.executable).parent, port)
        shutil.copytree(demo_folder(), container.cache / "llmq" / demo_folder().name)
        container.build(without=" install ")
        yield container


@pytest.mark.demo
def test_its_own_commands_start_a_server_that_answers(container):
    with container.running() as app:
        container.wait_until_healthy(app)
        client = Client(f"http://127.0.0.1:{container.port}", verbose=False)
        answer = client.predict("Name three colours.", methods="fp16,llm-int8", max_new_tokens=4, api_name="/compare")
    assert [row["error"] for row in answer["contestants"]] == [None, None]
    owners = {path.stat().st_uid for path in container.cache.rglob("*.so")}
    assert owners == {int(last("USER").partition(":")[0])}, "the library is compiled where it runs, into the cache"
