"""No markup from anywhere lives on the page, and its policy keeps nothing of ours out: a real Chromium, every view."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote_plus

import pytest
from browser_support import ROOT, new_tab, running_app
from test_browser import finish, generate, open_page, press, wait_for
from test_handlers import report
from test_outliers_browser import open_outliers, part

from llmq.labs import save_answer
from llmq.labs.outliers import ReportAnswer

pytestmark = [pytest.mark.browser]
MARKUP = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script><svg onload='window.hacked=1'></svg>"
    "<a href='javascript:window.hacked=1'>a</a> [b](javascript:window.hacked=1) ![c](https://evil.example/c.png)"
)
EVIL = quote_plus(MARKUP)
WATCH = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
"""
INJECTED = "img[src='x'], [onerror], [onload], a[href^='javascript:'], img[src*='evil'], script:not([src])[data-evil]"


@pytest.fixture(scope="module")
def address(tiny_folder):
    """A public server."""
    with running_app("--host", "0.0.0.0", "--model", str(tiny_folder), "--methods", "fp16,bnb-int8") as url:
        yield url


@pytest.fixture
def page(browser):
    """A tab that remembers every host it asked and every breach of the page's policy."""
    tab = new_tab(browser, viewport={"width": 1400, "height": 1000})
    tab.add_init_script(WATCH)
    tab.asked = set()
    tab.on("request", lambda request: tab.asked.add(request.url.split("/")[2] if "//" in request.url else "data"))
    yield tab
    tab.close()


def assert_dead(page, address: str) -> None:
    """Nothing was injected, nothing ran, nobody else was asked, nothing of ours was kept out."""
    assert page.evaluate("window.hacked") is None
    assert page.locator(INJECTED).count() == 0, page.locator(INJECTED).first.evaluate("e => e.outerHTML")
    assert page.evaluate("window.violations") == []
    assert page.asked - {"data"} == {address.split("//")[1]}


def upload(page, button: str, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator(f"#{button}").click()
    chooser.value.set_files(path)


def evil(value):
    """JSON with markup in every text, keys and names that mean something spared."""
    if isinstance(value, dict):
        return {
            key: entry if key in ("format", "event", "kind", "reason") else evil(entry) for key, entry in value.items()
        }
    return [*map(evil, value)] if isinstance(value, list) else f"{value}{MARKUP}" if isinstance(value, str) else value


def renamed(line: str) -> str:
    """The line of a recording with markup in everything, the names of contestants as keys among it."""
    row = evil(json.loads(line))
    for name in ("ledger", "predicted_bytes"):
        if name in row:
            row[name] = {f"{key}{MARKUP}": entry for key, entry in row[name].items()}
    return json.dumps(row)


def test_a_link_a_prompt_and_a_model_are_text(page, address):
    names = ("prompt", "model", "methods", "schedule", "max_new_tokens", "seed", "threshold", "view", "part", "method")
    page.goto(f"{address}/?{'&'.join(f'{name}={EVIL}' for name in names)}")
    page.wait_for_selector("#generate")
    page.wait_for_function("/onerror/.test(document.querySelector('#prompt textarea').value)")
    page.locator("#generate").click()
    page.wait_for_function("/^Not started: unknown model .<img/.test(document.querySelector('#status').textContent)")
    assert_dead(page, address)


def test_a_run_with_its_plot_and_its_download_is_kept_out_of_nothing(page, address, tmp_path):
    open_page(page, address, f"max_new_tokens=8&methods=fp16,bnb-int8&prompt={quote_plus(MARKUP[:60])}")
    generate(page)
    finish(page)
    with page.expect_download() as download:
        press(page, "download")
    download.value.save_as(tmp_path / "run.jsonl")
    assert "onerror" in (tmp_path / "run.jsonl").read_text()
    press(page, "replay")
    page.locator("[data-part=skip]").click()
    wait_for(page, "replayed")
    assert page.locator("#result .js-plotly-plot").count() >= 1
    assert_dead(page, address)


def test_a_recording_is_text(page, address, tmp_path):
    lines = (ROOT / "assets" / "runs" / "demo-paris-cpu-lean.jsonl").read_text(encoding="utf-8").split("\n")
    (tmp_path / f"{MARKUP[:30].replace('/', '')}.jsonl").write_text("\n".join(renamed(line) for line in lines if line))
    open_page(page, address)
    upload(page, "upload", next(tmp_path.iterdir()))
    page.wait_for_function("/window.hacked/.test(document.querySelector('#result').textContent)")
    page.locator("[data-part=skip]").click()
    wait_for(page, "replayed")
    page.locator("#why summary").click()
    assert_dead(page, address)


def test_what_is_wrong_with_a_fit_is_text(page, address):
    page.goto(f"{address}/?view=fit&model={EVIL}&card={EVIL}")
    page.wait_for_function(
        "/^Not counted: unknown model .<img/.test(document.querySelector('#fit-headline')?.textContent)"
    )
    assert_dead(page, address)
    page.goto(f"{address}/?view=fit&model=llama-2-7b-chat")
    page.wait_for_function("/Llama-2-7B/.test(document.querySelector('#fit-headline')?.textContent)")
    assert_dead(page, address)


def test_what_is_watched_or_opened_is_text_in_every_part(page, address, tmp_path):
    open_outliers(page, address, f"prompt={quote_plus(MARKUP[:40])}")
    page.locator("#watch").click()
    page.wait_for_selector("#outlier-map .js-plotly-plot .hm")
    assert_dead(page, address)
    stored = tmp_path / "watched.json"
    save_answer(ReportAnswer(report(), threshold=6.0, prompt="p"), stored)
    stored.write_text(json.dumps(evil_report(json.loads(stored.read_text()))))
    upload(page, "report-open", stored)
    page.wait_for_function("/window.hacked/.test(document.querySelector('#outlier-status').textContent)")
    for title in ("Sent to 16 bit", "The paper's figures", "Agreement and cause", "What if"):
        part(page, title)
        page.wait_for_timeout(300)
    assert_dead(page, address)


def evil_report(stored: dict) -> dict:
    """Markup in the texts of a report, its arrays and the names of its layers' kinds spared."""

    def walk(value, key=""):
        if key in ("arrays", "kind", "dtype", "data"):
            return value
        if isinstance(value, dict):
            return {name: walk(entry, name) for name, entry in value.items()}
        if isinstance(value, list):
            return [walk(entry, key) for entry in value]
        return (
            f"{value}{MARKUP}" if isinstance(value, str) and key in ("model", "prompt", "tokens", "device") else value
        )

    return walk(stored)


def test_a_labs_answer_is_text(page, address, tmp_path):
    answer = json.loads((ROOT / "assets" / "lesson" / "silencing.json").read_text())
    stored = tmp_path / "answer.json"
    stored.write_text(json.dumps(evil(answer)))
    open_outliers(page, address, "part=what-if")
    upload(page, "silencing-open", stored)
    page.wait_for_function("/window.hacked/.test(document.querySelector('#silencing-status').textContent)")
    page.wait_for_selector("#silencing-table")
    assert_dead(page, address)
