"""REPORT's 'Claims to unlearn': under every claim stands a command, and it prints what stands under it."""

from __future__ import annotations

import re
import shlex

import pytest
from test_documents import REPORT
from tiny_runs import light, run_cli

from llmq.bench import tables
from llmq.cli import build_parser

SECTION = re.search(r"\n## 8\. .*?(?=\n## 9\. )", REPORT, re.DOTALL)[0]
FEWEST = 25  # claims that have a command


def checks() -> list[tuple[str, list[str]]]:
    """Every command with the lines that it is said to print."""
    found = []
    for block in re.findall(r"(?:^    .*\n)+", SECTION, re.MULTILINE):
        lines = [line[4:] for line in block.splitlines()]
        end = lines.index('"') + 1 if lines[0].endswith('-c "') else 1
        found.append(("\n".join(lines[:end]).removeprefix("$ "), lines[end:]))
    return found


CHECKS = checks()


def needing(command: str) -> list:
    return [pytest.mark.demo] if re.search(r"'demo'|--model demo", command) else []


def printed(capsys, command: str) -> list[str]:
    """What a command prints, run in this process."""
    words = shlex.split(command)
    assert words[0] == "python"
    if words[1:3] == ["-m", "llmq"]:
        status, out, _ = run_cli(capsys, *words[3:])
        assert status == 0
        return out
    assert words[1] == "-c" and len(words) == 3
    capsys.readouterr()
    exec(words[2], {})
    return capsys.readouterr().out.splitlines()


def stands(line: str, out: list[str]) -> bool:
    """Whether a line is printed, whatever the spaces; '…' stands for anything."""
    pattern = r".*".join(re.escape(part.strip()) for part in " ".join(line.split()).split("…"))
    return any(re.fullmatch(pattern.replace(r"\ ", r"\s+"), " ".join(row.split())) for row in out)


@pytest.mark.parametrize(
    ("command", "lines"), [pytest.param(*check, marks=needing(check[0])) for check in CHECKS], ids=range(len(CHECKS))
)
def test_the_command_prints_what_is_said(command, lines, request, capsys, monkeypatch):
    if needing(command):
        request.getfixturevalue("demo")
    monkeypatch.chdir(tables.ROOT)
    with light():
        out = printed(capsys, command)
    assert lines and [line for line in lines if not stands(line, out)] == [], out


def test_every_claim_has_its_command():
    """But for those about what a paper contains, which are a list."""
    claims = re.split(r"\n(?=\*\*)", SECTION)[1:]
    assert len(claims) >= FEWEST and [claim[:60] for claim in claims if "\n    $ python -" not in claim] == []
    assert all(not lines or "$ " not in "".join(lines) for _, lines in CHECKS)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?:`|\$ )python -m llmq ([^`\n…]+)", REPORT))))
def test_every_command_of_the_report_is_understood(command):
    build_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize(
    "out", [[], ["fp16 13.4 0.0"], ["fp16  13.477 0.000 1.074 and"], ["x fp16 13.477 0.000 1.074"]]
)
def test_another_number_is_not_what_is_said(out):
    assert not stands("fp16 13.477 0.000 1.074", out)
    assert stands("fp16 13.477 … 1.074 …", ["  fp16     13.477   0.000  1.074   0.360  14.910"])
