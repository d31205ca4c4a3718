"""What `tables --check` finds wrong beside tables out of date: results that no table shows, captions that leave out how
a result was measured, and figures in the text that no stored result has.

A figure in the text is held to a stored result by a comment in front of it, which nobody sees who reads the page:

    on a CPU (<!-- from cpu-peers: over_fp16 of llm-int8 -->1.42 times, spread 40 %)

`from FILE: KEY of ROW` says that the first number after the comment is KEY of one row of `assets/results/FILE.json`,
rounded to the digits written; `KEY of ROW / ROW` is one row's over another's, and '%' after the number a hundred times
it. ROW is what tells a row from the others: its method, or several of its texts and numbers with commas, as
'fp16,eager,64'. A figure whose rounds spread WIDE or further is followed by 'spread N %'. A comment must not begin a
line: Markdown would take the line for HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from llmq.bench.rounds import spread_of_key
from llmq.formatting import wide

TABLE = re.compile(r"(<!-- table:([\w-]+) -->).*?(<!-- /table -->)", re.DOTALL)
_FIGURE = re.compile(r"<!-- from ([^>]*?) -->([^<]*)")
_CLAIM = re.compile(r"(?P<file>[\w-]+): (?P<key>\w+) of (?P<row>.+?)(?: / (?P<other>.+))?")
_NUMBER = re.compile(r"[−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:\s%)?")


def plain(text: str) -> str:
    """`text` as a reader sees it, without the comments in front of figures."""
    return _FIGURE.sub(lambda m: m[2], text)


def unshown(texts: list[str], names: set[str], sources: Callable[[str], list[str]]) -> Iterator[str]:
    """Stored results that no table of these documents shows."""
    shown = {source for text in texts for found in TABLE.finditer(text) for source in sources(found[2])}
    yield from (f"no table shows {name}.json" for name in sorted(names - shown))


def incomplete_caption(name: str, drawn: str, results: dict[str, dict]) -> Iterator[str]:
    """What headers and caption of a table leave out of how its results were measured."""
    lines = drawn.splitlines()
    said = "\n".join([lines[0], *(line for line in lines if not line.startswith("|"))]) if lines else ""
    numbers = {found.replace(",", "") for found in re.findall(r"(?<![\w.,-])\d[\d,]*(?![\w-]|\.\d)", said)}
    places = {"device_name": drawn, "date": said}
    for source, result in results.items():
        for what, value in _conditions(result):
            if value not in places.get(what, numbers):
                yield f"table {name}: its caption does not say {what} {value} of {source}.json"


def _conditions(result: dict) -> Iterator[tuple[str, str]]:
    """What a caption has to say: the device and the day, and of a bench how many tokens and rounds."""
    found = result["conditions"]
    conditions = result if isinstance(found, str) else found
    if "date" not in conditions:  # a sweep over models, each with its own
        conditions = next(iter(conditions.values()))
    yield "device_name", conditions["device_name"]
    yield "date", conditions["date"][:10]
    if result["kind"] != "load":
        yield from ((n, str(conditions[n])) for n in ("prompt_tokens", "new_tokens", "repeats") if n in conditions)


def wrong_figures(text: str, stored: Callable[[str], dict]) -> Iterator[str]:
    """Marked figures of a document that are not what their file has."""
    for found in _FIGURE.finditer(text):
        begins_line = text[: found.start()].rpartition("\n")[2].strip() == ""
        claim, told = (" ".join(part.split()) for part in found.groups())
        fault = "its comment begins a line" if begins_line else _fault(claim, told, stored)
        if fault:
            yield f"'{told[:40]}' after 'from {claim}': {fault}"


def _fault(claim: str, text: str, stored: Callable[[str], dict]) -> str:
    """Why the figure at the start of `text` does not hold; '' where it does."""
    asked, number = _CLAIM.fullmatch(claim), _NUMBER.search(text)
    if not asked or not number:
        return "write 'from FILE: KEY of ROW' in front of a number"
    try:
        rows = stored(asked["file"])["results"]
        found = [_row(rows, name) for name in (asked["row"], asked["other"]) if name]
        value, *other = (row[asked["key"]] for row in found)
        value = value / other[0] if other else value
        width = max(spread_of_key(row, asked["key"]) or 0.0 for row in found)
    except (OSError, LookupError) as error:
        return f"nothing of that name is stored ({error})"
    if (right := _as_written(number[0], value)) != number[0]:
        return f"stored is {right}"
    said = wide(width)
    return "" if said in text else f"its rounds lie far apart: say '{said}' behind it"


def _row(rows: list[dict], name: str) -> dict:
    """The one row of which all parts of a name are texts or numbers."""
    wanted = set(name.split(","))
    plain_values = (str, int, float)
    found = [row for row in rows if wanted <= {str(v) for v in row.values() if isinstance(v, plain_values)}]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows are {name}")
    return found[0]


def _as_written(number: str, value: float) -> str:
    """`value` with the digits, the sign of per cent and the minus that `number` is written with."""
    unit = number.lstrip("−-0123456789,.")
    digits = len(number.removesuffix(unit).partition(".")[2])
    grouped = "," if "," in number else ""
    return f"{value * (100 if unit else 1):{grouped}.{digits}f}{unit}".replace("-", "−" if "−" in number else "-")
