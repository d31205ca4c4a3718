"""The CPU library under the compilers' sanitizers: a C program around it, no Python in the process."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from llmq.kernels.cpu.build import FOLDER, SOURCES, native_flag

DRIVER = Path(__file__).with_name("cpu_driver.c")
WAYS = {
    "plain": ["-O2", native_flag()],
    "without vector instructions": ["-O2", "-march=x86-64" if platform.machine() == "x86_64" else "-march=armv8-a"],
    "address and undefined": ["-O1", "-g", native_flag(), "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", native_flag(), "-fsanitize=thread"],
}


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
@pytest.mark.parametrize("way", WAYS)
def test_random_models_of_ugly_shapes(way, tmp_path):
    program, sources = tmp_path / "driver", [str(FOLDER / name) for name in SOURCES]
    command = ["gcc", "-std=gnu11", "-w", "-pthread", *WAYS[way], "-o", str(program), str(DRIVER), *sources, "-lm"]
    subprocess.run(command, check=True)
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert ran.stdout.count("ok ") == 105 and "WRONG" not in ran.stdout


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("gcc"), reason="no gcc for x86-64")
def test_the_instructions_of_newer_processors_are_used_where_they_are(tmp_path):
    for processor, instruction in (
        ("x86-64-v3", "vpmaddubsw"),
        ("icelake-server", "vpdpbusd"),
        ("alderlake", "vpdpbusd"),
    ):
        made = tmp_path / f"{processor}.s"
        source = str(FOLDER / "matrix.c")
        subprocess.run(["gcc", "-std=gnu11", "-O3", f"-march={processor}", "-S", "-o", str(made), source], check=True)
        assert instruction in made.read_text()
