"""The Dockerfile's own commands without Docker: folders elsewhere, a read-only root, a user without a name.

`python tests/container_stand_in.py` (as root, `.ci/container`) makes a Python of its own, runs every RUN but that of
the system's packages, then CMD as the image would, and the health check. TORCH_INDEX is the build's argument.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
INSTRUCTIONS = [tuple(line.split(" ", 1)) for line in LINES if line and not line.startswith("#")]
START_SECONDS = 300
# A mount namespace: nothing can be written but the two folders, and a Python below a closed home is reached.
NAMESPACE = """
set -e
mount --make-rprivate /
mount --bind "$CACHE" "$CACHE"
mount -t tmpfs tmpfs "$SCRATCH"
chmod 1777 "$SCRATCH"
if [ -n "$CLOSED" ]; then
  mkdir "$SCRATCH/python" && mount --bind "$BASE" "$SCRATCH/python"
  mount -t tmpfs -o mode=755 tmpfs "$CLOSED" && mkdir -p "$BASE" && mount --bind "$SCRATCH/python" "$BASE"
fi
mount -o remount,ro,bind /
exec setpriv --reuid "$USERS" --regid "$GROUPS_" --clear-groups --no-new-privs --bounding-set=-all "$@"
"""


def all_of(word: str) -> list[str]:
    return [rest for instruction, rest in INSTRUCTIONS if instruction == word]


def last(word: str) -> str:
    return all_of(word)[-1]


class Container:
    """What an image would hold, below `place`: /app, /cache, and a Python whose programs are in `programs`."""

    def __init__(self, place: Path, programs: Path, port: int = 7860):
        self.app, self.cache, self.scratch, self.programs = (place / "app", place / "cache", place / "tmp", programs)
        self.port = port
        ignored = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()]
        shutil.copytree(ROOT, self.app, ignore=shutil.ignore_patterns(*ignored))
        for folder in (self.cache, self.scratch):
            folder.mkdir(exist_ok=True)
        place.chmod(0o755)

    def placed(self, text: str) -> str:
        """Text of the Dockerfile with its folders and its port where they are here."""
        here = {"/cache": str(self.cache), "/tmp": str(self.scratch), "7860": str(self.port)}
        return re.sub(r"(?<![\w.])/cache\b|(?<![\w.])/tmp\b|\b7860\b", lambda found: here[found[0]], text)

    @property
    def environment(self) -> dict[str, str]:
        said = dict(part.split("=", 1) for line in all_of("ENV") for part in shlex.split(self.placed(line)))
        system = {"PATH": f"{self.programs}:/usr/bin:/bin", "TMPDIR": str(self.scratch)}
        return system | said | {"GRADIO_SERVER_NAME": "127.0.0.1"}

    def build(self, *, without: str) -> None:
        """Run every RUN in which the word `without` does not stand, as whoever builds."""
        index = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "TORCH_INDEX"))}
        for command in all_of("RUN"):
            if without not in command:
                call = ["sh", "-ec", self.placed(command)]
                subprocess.run(call, cwd=self.app, env=self.environment | index, check=True)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen]:
        """CMD, on a root that cannot be written, as a user of that number and no name."""
        user, group = last("USER").split(":")
        base = Path(sys.base_prefix)
        closed = next((str(p) for p in reversed(base.parents) if not p.stat().st_mode & 1), "")
        folders = {"CACHE": str(self.cache), "SCRATCH": str(self.scratch), "CLOSED": closed, "BASE": str(base)}
        command = json.loads(self.placed(last("CMD")))
        exact = ["env", "-i", *(f"{name}={value}" for name, value in self.environment.items()), *command]
        call = ["unshare", "--mount", "sh", "-c", NAMESPACE, "sh", *exact]
        app = subprocess.Popen(call, cwd=self.app, env=os.environ | folders | {"USERS": user, "GROUPS_": group})
        try:
            yield app
        finally:
            app.terminate()
            app.wait(60)

    def wait_until_healthy(self, app: subprocess.Popen) -> None:
        """Run the health check until it is content."""
        check = json.loads(self.placed(last("HEALTHCHECK").partition("CMD ")[2]))
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(check, env=self.environment, capture_output=True).returncode:
            assert app.poll() is None, f"the server ended with {app.returncode}"
            assert time.monotonic() < deadline, "the server never was healthy"
            time.sleep(0.5)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        venv = Path(name) / "venv"
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        container = Container(Path(name), venv / "bin", port=7749)
        container.build(without="apt-get")
        with container.running() as app:
            container.wait_until_healthy(app)
        print("healthy")


if __name__ == "__main__":
    main()
