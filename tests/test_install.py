"""`pip install .`: everything the package reads goes along, and the `llmq` command works from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tiny_runs import CONTESTANT_KEYS, compare_options

import llmq
from llmq.methods import METHODS

ROOT = Path(__file__).parents[1]


def files_of(package: Path) -> set[Path]:
    """Also those behind a link: results are stored beside the package, and travel in it."""
    found = {Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names}
    return {file.relative_to(package) for file in found if file.suffix != ".pyc"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which a copy of this checkout is installed; a build leaves files in what it builds from. It lies
    in somebody else's repository."""
    folder = tmp_path_factory.mktemp("install")
    shutil.copytree(ROOT / "llmq", folder / "source" / "llmq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", folder / "site"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, folder / "source"], check=True, timeout=300)
    git = ["git", "-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run([*git, "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "Theirs"], cwd=folder, check=True)
    return folder / "site"


@pytest.fixture
def away(installed, tmp_path):
    """Run a program in an empty folder where llmq is only installed."""

    def started(*words):
        return subprocess.run(
            [str(word) for word in words], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={k: v for k, v in os.environ.items() if k != "LLMQ_COMMIT"} | {"PYTHONPATH": str(installed)},
        )  # fmt: skip

    return started


def test_every_file_of_the_package_goes_along(installed):
    own = files_of(ROOT / "llmq")
    kinds = {".c", ".h", ".js", ".css", ".html", ".py", ".txt", ".md", ".json", ".jsonl"}
    assert kinds == {file.suffix for file in own}
    assert files_of(installed / "llmq") == own and Path("results", "gpu-7b-lean.json") in own
    assert Path("lesson", "recorded", "quiz-1.jsonl") in own
    assert {path.name for path in installed.iterdir()} == {"bin", "llmq", f"llmq-{llmq.__version__}.dist-info"}


def test_version_and_requirements_are_said_once(installed):
    found = Distribution.at(installed / f"llmq-{llmq.__version__}.dist-info")
    assert found.version == llmq.__version__ and found.metadata["Requires-Python"] == ">=3.11"
    wanted = {*map(Requirement, (ROOT / "requirements.txt").read_text().split())}
    extras = sorted((more for more in map(Requirement, found.requires) if more.marker), key=lambda one: one.name)
    extra, tasks, ray = extras
    assert {*map(Requirement, found.requires)} - {*extras} == wanted and len(wanted) > 5
    assert (ray.name, str(ray.marker)) == ("ray", 'extra == "ray"')
    assert (tasks.name, str(tasks.marker)) == ("lm-eval", 'extra == "tasks"')
    (gradio,) = (requirement for requirement in wanted if requirement.name == "gradio")
    assert (extra.name, extra.extras, extra.specifier) == ("gradio", {"mcp"}, gradio.specifier)


def test_transformers_is_of_the_versions_that_were_tested():
    """Before 5.22 byte-level tokenizers lost their spaces; 5.40 is to drop the name under which a cache is passed."""
    wanted = map(Requirement, (ROOT / "requirements.txt").read_text().split())
    (versions,) = (requirement.specifier for requirement in wanted if requirement.name == "transformers")
    assert list(versions.filter(["5.17.0", "5.21.0", "5.22.0", "5.39.1", "5.40.0"])) == ["5.22.0", "5.39.1"]


def test_the_command_runs_from_another_folder(installed, away, tiny_folder):
    done = away(installed / "bin" / "llmq", *compare_options(tiny_folder, "--methods", "fp16,llm-int8", "--json"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["method"] for row in found["contestants"]] == ["fp16", "llm-int8"]
    assert all(row.keys() >= CONTESTANT_KEYS and row["error"] is None for row in found["contestants"])
    assert found["environment"]["commit"] is None, "the repository around an installed package is not its own"


def test_the_commands_exit_status_says_what_happened(installed, away):
    done = away(installed / "bin" / "llmq", "compare", "Hi", "--methods", "int3")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert all(word in done.stderr for word in ("'int3'", *METHODS))
