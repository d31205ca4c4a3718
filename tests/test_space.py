"""This folder is a Space as it stands: its card, what it installs, and a start with a GPU that is lent for a call."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import yaml
from browser_support import ROOT, compare_inputs, new_tab, open_page, press_stop, raw_messages, running_app
from huggingface_hub import SpaceCardData, SpaceHardware
from packaging.requirements import Requirement
from space_stand_in import environment, lending_host

from llmq.models.choice import HOSTED_DEFAULT
from llmq.models.presets import PRESETS

ZERO_GPU_TORCH = ("2.8.0", "2.9.1", "2.10.0", "2.11.0")  # the versions that a ZeroGPU Space may have
ZERO_GPU_PYTHON = ("3.10", "3.12")
SOON = 20.0  # seconds a busy machine may need for what takes less than one
CARD = yaml.safe_load((ROOT / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def requirements(file: str) -> dict[str, Requirement]:
    return {line.name: line for line in map(Requirement, (ROOT / file).read_text().split())}


def test_the_card_says_all_that_a_space_needs():
    wanted = {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "license"}
    wanted |= {"short_description", "thumbnail", "suggested_hardware", "models", "preload_from_hub", "tags"}
    assert wanted - CARD.keys() == set()
    assert (CARD["sdk"], len(CARD["short_description"]) <= 60) == ("gradio", True)
    assert (ROOT / CARD["app_file"]).is_file() and (ROOT / CARD["thumbnail"]).is_file()
    assert CARD["suggested_hardware"] in {hardware.value for hardware in SpaceHardware}
    assert SpaceCardData(**CARD).to_dict() == CARD


def test_the_card_and_the_requirements_agree():
    assert CARD["sdk_version"] in requirements("requirements.txt")["gradio"].specifier
    assert CARD["python_version"] in ZERO_GPU_PYTHON


def test_torch_is_one_that_a_lent_gpu_runs_with():
    """A Space installs pre-requirements.txt first; what is there then need only satisfy requirements.txt."""
    before, after = (requirements(file)["torch"].specifier for file in ("pre-requirements.txt", "requirements.txt"))
    everywhere = [*ZERO_GPU_TORCH, "2.11.1", "2.12.0", "2.13.0"]
    assert set(before.filter(everywhere)) == set(ZERO_GPU_TORCH)
    assert max(before.filter(everywhere), key=everywhere.index) in after


def test_the_model_that_a_space_opens_with_is_small_free_and_fetched_when_it_is_built():
    preset = PRESETS[HOSTED_DEFAULT]
    assert not preset.gated and preset.hub_id in CARD["models"]
    (repo, files), *more = (line.split() for line in CARD["preload_from_hub"])
    assert repo == preset.hub_id and more == []
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files.split(","))


@pytest.fixture(scope="module")
def host():
    with lending_host() as host:
        yield host


@pytest.fixture(scope="module")
def space(host, demo):
    pytest.importorskip("spaces")
    with running_app(program=ROOT / "tests" / "space_stand_in.py", env=environment(host)) as address:
        yield address


def click_generate(space, session: str, tokens: int) -> Iterator[str]:
    """Everything the page is told of one run of two methods, as it comes."""
    inputs = compare_inputs("Tell a long story.", methods=("fp16", "llm-int8", "none"), tokens=tokens)
    return (json.dumps(message) for _, message in raw_messages(space, "generate", inputs, session))


@pytest.mark.demo
def test_a_space_starts_runs_stops_and_runs_again(space, host):
    assert host.times("/startup-report") == 1, "the host looked for what it is to lend its GPU to"
    said = click_generate(space, "first", tokens=1024)
    assert any("tok/s" in message for message in said) and host.times("/release") == 0
    asked = time.monotonic()
    press_stop(space, "first")
    assert host.wait_for("/release", 1, SOON), "the fork goes on"
    print(f"from Stop to the end of the fork: {time.monotonic() - asked:.2f} s")
    assert "Stopped." in list(said)[-1]

    last = list(click_generate(space, "second", tokens=8))[-1]
    assert "Stopped." not in last and "Finished: token limit" in last
    assert host.wait_for("/release", 2, SOON)
    assert [loan["durationSeconds"] for loan in host.queries("/schedule")] == ["120", "29"]
    assert {release["fail"] for release in host.queries("/release")} == {"false"}


@pytest.mark.demo
@pytest.mark.browser
def test_stop_on_a_spaces_page_ends_the_fork_and_keeps_the_text(space, host, browser):
    before, page = host.times("/release"), new_tab(browser)
    open_page(page, space, "max_new_tokens=1024&prompt=Tell+a+long+story.")
    page.locator("#generate").click()
    page.wait_for_function(
        "document.querySelector('#compare-view').dataset.state === 'running' "
        "&& (document.querySelector('#pane-0')?.textContent || '').length > 20"
    )
    page.locator("#stop").click()
    assert host.wait_for("/release", before + 1, SOON), "the fork goes on"
    page.wait_for_function("/^Stopped\\./.test(document.querySelector('#status').textContent)")
    assert len(page.locator("#pane-0").inner_text()) > 20
    page.close()
