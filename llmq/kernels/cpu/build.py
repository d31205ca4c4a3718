"""The library, compiled on first use by the system's C compiler and kept in the cache for this source and processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

from filelock import FileLock

from llmq.cache import cache_folder, sweep, workplace

FOLDER = Path(__file__).parent
SOURCES = ("pool.c", "matrix.c", "llama.c")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
COMPILERS = ("cc", "gcc", "clang")
WORK = ".build-"
LONGEST_BUILD = 120  # seconds


class NoLibrary(Exception):
    """There is none for this machine; the message says why in a few words."""


def library_path() -> Path:
    """Return the compiled library, made now if it is not in the cache or not as it was made. Raises NoLibrary."""
    path = cache_folder() / "cpu" / f"llmq-{_key()}.so"
    if _is_whole(path):  # also in a cache that may only be read
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LONGEST_BUILD):
            if not _is_whole(path):
                _build(path)
    except (OSError, TimeoutError) as error:
        raise NoLibrary(f"{path.parent} cannot be written ({error})") from error
    return path


@cache
def opened_library() -> ctypes.CDLL:
    """Return the library, compiled if need be. Raises NoLibrary."""
    try:
        return ctypes.CDLL(str(library_path()))
    except OSError as error:
        raise NoLibrary(f"the compiled library cannot be opened ({error})") from error


@cache
def why_not_native() -> str:
    """Tell why the CPU loop cannot run here; '' where it can. Compiles the library the first time."""
    try:
        opened_library()
    except NoLibrary as reason:
        return str(reason)
    return ""


def native_flag() -> str:
    """Return the flag that makes a compiler use every instruction of this processor."""
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def _key() -> str:
    """Changes with the source, the way of compiling and the processor; where there is no compiler, a library that was
    compiled with the first of COMPILERS will do."""
    try:
        compiler = compiler_command()
    except NoLibrary:
        compiler = COMPILERS[:1]
    digest = hashlib.sha256(" ".join((*compiler, *FLAGS, native_flag(), _processor())).encode())
    for path in sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return platform.machine() + " ".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _is_whole(path: Path) -> bool:
    """Whether the file is what the compiler wrote: a damaged library would end the process, not raise."""
    try:
        return _sum_of(path) == path.with_suffix(".sha256").read_text()
    except OSError:
        return False


def _sum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _build(path: Path) -> None:
    compiler = compiler_command()
    sweep(path.parent, WORK)
    with workplace(path.parent, WORK) as work:
        made = work / "made.so"
        command = [*compiler, *FLAGS, native_flag(), "-o", str(made), *(str(FOLDER / name) for name in SOURCES), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_BUILD)
        except subprocess.CalledProcessError as error:
            raise NoLibrary(f"{compiler[0]} could not compile llmq's library: {_first_error(error.stderr)}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoLibrary(f"{compiler[0]} could not be run ({error})") from error
        path.with_suffix(".sha256").write_text(_sum_of(made))
        os.replace(made, path)


def compiler_command() -> tuple[str, ...]:
    """Return `CC` with its arguments, else the first of COMPILERS that is here. Raises NoLibrary."""
    commands = [shlex.split(os.environ["CC"])] if os.environ.get("CC", "").strip() else [[name] for name in COMPILERS]
    if found := next((command for command in commands if shutil.which(command[0])), None):
        return tuple(found)
    raise NoLibrary(f"no C compiler was found ({', '.join(command[0] for command in commands)})")


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it gave no reason")
