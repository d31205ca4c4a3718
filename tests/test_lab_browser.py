"""The Lab tab in a real Chromium: rounding beside the machine's line, bits by mouse and keyboard, widths, axe."""

from __future__ import annotations

import pytest
from browser_support import WINDOWS, new_tab, open_page, resize, themes, unexplained, violations, wait_until_still

from llmq.labs.rounding import HEADERS
from llmq.methods import METHODS

pytestmark = [pytest.mark.browser, pytest.mark.demo]
FINDING = "document.querySelector('#rounding-finding')?.innerText ?? ''"
STATUS = "document.querySelector('#rounding-status .llmq-status').textContent"
SHOWN = """name => [...document.querySelectorAll('#lab-parts [role=tab]')].some(
  tab => tab.textContent.trim() === name && tab.getAttribute('aria-selected') === 'true')"""
PARTS = ("Rounding", "Attention", "Decoding", "Race", "Bits", "Methods")


def open_lab(page, address: str, query: str = "") -> None:
    """The tab with the table of every method on the numbers it begins with."""
    page.goto(f"{address}/?view=lab&{query}")
    page.wait_for_selector("#rounding-table")


def found(page, words: str) -> None:
    page.wait_for_function(f"words => ({FINDING}).includes(words) && ({STATUS}) === ''", arg=words)


def part(page, name: str) -> None:
    parts = page.locator("#lab-parts")
    tab = parts.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        parts.locator(".overflow-menu button").first.click()
        tab = parts.locator(".overflow-dropdown").get_by_text(name)
    tab.click()
    page.wait_for_function(SHOWN, arg=name)


def table(page) -> dict[str, list[str]]:
    """The cells of every row by its first."""
    _, _, shown = page.locator("#rounding-table").inner_text().partition(HEADERS[-1])
    cells = [line.strip() for line in shown.split("\n") if line.strip()]
    return {cells[i]: cells[i + 1 : i + len(HEADERS)] for i in range(0, len(cells), len(HEADERS))}


def choose(page, elem_id: str, text: str) -> None:
    page.locator(f"#{elem_id} input").click()
    page.get_by_role("option", name=text, exact=True).click()


def set_slider(page, elem_id: str, value: str) -> None:
    page.locator(f"#{elem_id} input[type=number]").fill(value)
    page.keyboard.press("Enter")


def test_an_outlier_is_planted_while_a_run_has_the_device(page, address):
    """Numbers of one's own need no device: they are answered beside the line."""
    open_page(page, address, "max_new_tokens=1000&prompt=Tell+a+long+story.")
    page.locator("#generate").click()
    page.wait_for_function("document.querySelector('#compare-view').dataset.state === 'running'")
    page.get_by_role("tab", name="Lab").click()
    found(page, "your numbers")
    before = table(page)
    set_slider(page, "rounding-outlier", "100")
    found(page, "outlier of 100 times the largest")
    after = table(page)
    absmax, row = (METHODS[name].label for name in ("absmax", "vectorwise"))
    assert float(after[absmax][3]) < float(before[absmax][3]) - 30
    assert float(after[absmax][3]) < float(after[row][3])
    assert page.evaluate("document.querySelector('#compare-view').dataset.state") == "running"
    page.get_by_role("tab", name="Compare").click()
    page.locator("#stop").click()


def test_a_layers_weight_is_taken_once_and_every_method_is_worked_out(page, address):
    open_lab(page, address)
    page.get_by_label("A layer's weight").click()
    page.wait_for_function("document.querySelector('#rounding-layer input')?.value === '1.down_proj'")
    page.locator("#rounding-run").click()
    found(page, "1.down_proj, weight (576 × 1,536 numbers)")
    assert len(table(page)) == 12
    page.get_by_role("button", name="How this method works").click()
    for name, words in (("rtn", "/ 15"), ("fp8", "E4M3("), ("nf4", "nearest of 16"), ("zeropoint", "− 128")):
        choose(page, "rounding-method", METHODS[name].label)
        found(page, METHODS[name].label)
        assert words in page.locator("#rounding-sums").inner_text()
        page.wait_for_function(
            "name => document.querySelector('#rounding-explained').textContent.includes(`(${name})`)", arg=name
        )
    page.locator("#rounding-layer input").fill("9.cow")
    page.keyboard.press("Enter")
    page.locator("#rounding-run").click()
    page.wait_for_function(f"/^Not taken: unknown layer '9.cow'/.test({STATUS})")


def test_what_is_typed_wrongly_is_said_in_one_line_as_text(page, address):
    open_lab(page, address)
    page.locator("#rounding-numbers textarea").fill("1 <img src=x onerror='window.hacked=1'>")
    page.wait_for_function(f"/^Not rounded: '<img' is no number/.test({STATUS})")
    assert page.locator("#lab-view img").count() == 0 and page.evaluate("window.hacked") is None
    page.locator("#rounding-numbers textarea").fill("1 2 3")
    found(page, "your numbers (1 × 3 numbers)")


@pytest.mark.parametrize("window", ["1400", "400"])
def test_a_link_opens_its_part(browser, address, window):
    page = new_tab(browser, **WINDOWS[window])
    page.goto(f"{address}/?view=lab&part=race&contestants=fp8,nonsense&tokens=1024")
    page.wait_for_selector("#race-run", state="visible")
    page.wait_for_function("document.querySelector('#race-tokens input')?.value === '1024'")  # the other is left out
    assert unexplained(page) == []
    page.close()


def test_bits_turn_over_by_mouse_and_by_keyboard(page, address):
    open_lab(page, address)
    part(page, "Bits")
    boxes, said = page.locator("#bits .llmq-bit"), page.locator("#bits pre")
    assert boxes.count() == 16 and said.inner_text().endswith("= 1")
    boxes.first.click()
    assert said.inner_text().endswith("= −1") and boxes.first.get_attribute("aria-pressed") == "true"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "bit 14, exponent"
    assert said.inner_text().endswith("no finite number: −∞")
    page.get_by_label("FP8 E4M3").check()
    page.get_by_role("button", name="largest").click()
    assert boxes.count() == 8 and said.inner_text().endswith("= 448")
    page.get_by_role("button", name="Code + 1").click()
    assert said.inner_text().endswith("not a number")
    page.get_by_label("int8, a zero-point").check()
    page.locator("#bits [data-part=scale]").fill("0.005098")
    page.locator("#bits [data-part=zero]").fill("-30")
    for _ in range(9):
        page.get_by_role("button", name="Code + 1").click()
    assert said.inner_text().endswith("(9 − (−30)) × 0.005098 = 0.198822")


@pytest.fixture(scope="module")
def lab(browser, address):
    """The tab with its first answer, for all windows."""
    page = new_tab(browser, **WINDOWS["400"])
    open_lab(page, address)
    page.wait_for_selector("#rounding-errors .js-plotly-plot .hm")
    yield page
    page.close()


@pytest.mark.parametrize("window", WINDOWS, ids=WINDOWS)
def test_every_part_is_accessible_and_fits(lab, window, screenshots):
    page = lab
    resize(page, window)
    width = page.viewport_size["width"]
    for name in PARTS:
        part(page, name)
        wait_until_still(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert unexplained(page) == []
        levels = page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].filter(h => h.offsetWidth).map(h => Number(h.tagName[1]))"
        )
        assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), (name, levels)
        for theme in themes(page):
            page.screenshot(path=screenshots / f"lab-{name.lower()}-{theme}-{window}.png", full_page=True)
            found = violations(page, theme, "html" if name == PARTS[0] else "#lab-parts")
            assert not [(name, theme, v["id"], [n["html"][:160] for n in v["nodes"]]) for v in found]
    part(page, "Bits")
    sizes = page.evaluate(
        "() => [...document.querySelectorAll('#bits button')].filter(b => b.offsetWidth).map("
        "b => Math.min(b.offsetWidth, b.offsetHeight))"
    )
    assert min(sizes) >= 40 and min(sizes[:8]) >= 44, sizes
