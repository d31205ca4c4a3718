"""The Outliers tab's parts in a real Chromium: scrubber, a token's cause, the amplifier; what travels stays small."""

from __future__ import annotations

import json

import pytest
from browser_support import (
    PATIENCE,
    WINDOWS,
    new_tab,
    open_page,
    raw_messages,
    resize,
    status,
    themes,
    unexplained,
    violations,
    wait_until_still,
)
from colours import rgb

from llmq.figures.palette import DARK, LIGHT
from llmq.methods import METHODS

pytestmark = [pytest.mark.browser, pytest.mark.demo]
LARGEST_VIEW = 300_000  # bytes of one view on its way to the browser
SHOWN = """name => [...document.querySelectorAll('#observatory [role=tab]')].some(
  tab => tab.textContent.trim() === name && tab.getAttribute('aria-selected') === 'true')"""
PROMPT = "Plan a 3-day itinerary in Paris."


@pytest.fixture
def observatory(page, address):
    """The tab with a prompt of 41 tokens watched, and four generated ones."""
    open_page(page, address)
    page.get_by_role("tab", name="Outliers").click()
    page.locator("#outlier-new-tokens input[type=number]").fill("4")
    page.keyboard.press("Enter")
    return page


def part(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def drawn(page, elem_id: str) -> dict:
    """The figure that plotly really holds: names, xs and the title."""
    page.wait_for_selector(f"#{elem_id} .js-plotly-plot .main-svg")
    return page.evaluate(
        f"""() => {{ const plot = document.querySelector('#{elem_id} .js-plotly-plot');
        return {{ title: document.querySelector('#{elem_id} [data-part=title]').textContent,
                  series: Object.fromEntries(plot.data.map(t => [t.name ?? '', [...t.x].map((x, i) => [x, t.y[i]])])),
                  height: plot.offsetHeight }}; }}"""
    )


def wait_for_status(page, elem_id: str, words: str) -> None:
    page.wait_for_function(
        "([id, words]) => document.querySelector(`#${id} .llmq-status`).textContent.includes(words)",
        arg=[elem_id, words],
    )


def wait_for_watched(page, words: str) -> None:
    page.wait_for_function(
        "words => document.querySelector('#outlier-status [data-part=note]').textContent.includes(words)", arg=words
    )


def test_scrubber_shows_each_token_and_layers_agree_with_hooks(observatory, screenshots):
    page = observatory
    page.locator("#watch").click()
    wait_for_watched(page, "4 generated tokens watched")
    part(page, "Sent to 16 bit")
    prompt = drawn(page, "moment-figure")
    assert "the prompt" in prompt["title"]
    own, hooks = (
        prompt["series"]["kept in 16 bit by the layer"],
        prompt["series"]["reaches the threshold, as we saw it"],
    )
    assert sorted(own) == sorted(hooks) and len(own) > 100
    page.locator("#moment input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "/generated token 2/.test(document.querySelector('#moment-figure [data-part=title]').textContent)"
    )
    token = drawn(page, "moment-figure")
    own, hooks = token["series"]["kept in 16 bit by the layer"], token["series"]["reaches the threshold, as we saw it"]
    assert sorted(own) == sorted(hooks) and 0 < len(own) < 200
    assert token["height"] > 400, "the figure keeps its height when its value changes"
    assert "All 1,050 layer calls" in page.locator("#moment-agreement").inner_text()
    page.screenshot(path=screenshots / "observatory-moments.png", full_page=True)
    part(page, "The paper's figures")
    assert "24,912" in page.locator("#massive").inner_text().replace(".0", "")
    assert "outlier feature" in page.locator("#emergence").inner_text()
    drawn(page, "features-figure"), drawn(page, "peaks-figure")
    page.screenshot(path=screenshots / "observatory-figures.png", full_page=True)
    for palette in (DARK, LIGHT):
        page.evaluate("document.body.classList.toggle('dark')")
        page.wait_for_function(
            "ink => [...document.querySelectorAll('#peaks-figure .xtitle, #outlier-map .xtitle')]"
            ".every(axis => getComputedStyle(axis).fill === ink)",
            arg=rgb(palette["ink"]),
        )
        first = "document.querySelector('#outlier-map .js-plotly-plot').data[0].colorscale[0][1]"
        assert page.evaluate(first) == palette["under-0"]


def test_a_click_on_a_token_finds_its_cause_and_stop_keeps_it(observatory, screenshots):
    page = observatory
    part(page, "Agreement and cause")
    page.locator("#reading-tokens input[type=number]").fill("6")
    page.keyboard.press("Enter")
    page.locator("#read").click()
    wait_for_status(page, "reading-status", "first choice")
    tokens = page.locator("#reading button.llmq-token")
    assert tokens.count() == 41 + 6 - 1
    tokens.nth(20).hover()
    assert page.locator("#reading .llmq-guesses li").count() == 10
    diverging = page.locator("#reading button.llmq-other")
    assert diverging.count() >= 1, "bnb-int8 has another first choice somewhere in the chat template's tokens"
    diverging.first.click()
    page.wait_for_function(
        "/in 16 bit it predicts/.test(document.querySelector('#cause-status .llmq-status').textContent)"
    )
    page.locator("#cause-status [data-part=stop]").click()
    wait_for_status(page, "cause-status", "Stopped early")
    assert "yes" in page.locator("#patches").inner_text()
    layers = drawn(page, "layer-errors")["series"]["SQNR of the output"]
    assert [layer for layer, _ in layers] == list(range(30)) and all(0 < db < 60 for _, db in layers)
    page.screenshot(path=screenshots / "observatory-cause.png", full_page=True)


def test_the_amplifier_breaks_absmax_and_not_the_decomposition(observatory, screenshots):
    page = observatory
    part(page, "What if")
    for factor in ("1", "64"):
        page.locator("#amplifying-factors input[type=number]").fill(factor)
        page.keyboard.press("Enter")
        page.locator("#amplifying-run").click()
        page.wait_for_function(
            "f => (document.querySelector('#amplifying-table')?.innerText ?? '').split('\\n')"
            ".filter(cell => cell === f).length >= 4",
            arg=factor,
            timeout=5 * PATIENCE,  # four methods read a text twice
        )
        wait_for_status(page, "amplifying-status", "Measured on")
    series = drawn(page, "amplifying-figure")["series"]
    change = {name: points[-1][1] / points[0][1] for name, points in series.items()}
    assert change["FP16"] == pytest.approx(1, abs=1e-3)
    assert change["int8 · ours"] < 1.05 and change[METHODS["absmax"].label] > 5
    page.screenshot(path=screenshots / "observatory-amplified.png", full_page=True)


@pytest.mark.parametrize(("button", "inputs"), [
    ("read", [PROMPT, "", "continuation", "demo", "bnb-int8", 6.0, 8]),
    ("ablation-run", ["demo", "", [], "english"]),
])  # fmt: skip
def test_what_travels_for_a_view_is_small(address, button, inputs):
    sizes = [size for size, _ in raw_messages(address, button, inputs)]
    assert max(sizes) < LARGEST_VIEW and len(sizes) > 3


@pytest.mark.parametrize("bad", [-1, 21])
def test_a_threshold_off_the_slider_is_refused_by_its_value(address, bad):
    *_, (_, last) = raw_messages(address, "watch", [PROMPT, "demo", "bnb-int8", bad, 2])
    assert not last["success"] and f"Value {bad}" in json.dumps(last)


@pytest.fixture(scope="module")
def watched(browser, address):
    """A page that has watched a prompt, for all windows: to watch takes longer than to look."""
    page = new_tab(browser, **WINDOWS["400"])
    open_page(page, address)
    page.get_by_role("tab", name="Outliers").click()
    page.locator("#watch").click()
    wait_for_watched(page, "watched in")
    page.wait_for_selector("#token-map .js-plotly-plot .hm")
    yield page
    page.close()


@pytest.mark.parametrize("window", WINDOWS, ids=WINDOWS)
def test_every_part_is_accessible_and_fits(watched, window, screenshots):
    page, found = watched, []
    resize(page, window)
    width = page.viewport_size["width"]
    for name in ("Activations", "Sent to 16 bit", "The paper's figures", "Agreement and cause", "What if"):
        chosen = page.locator("#observatory").get_by_role("tab", name=name)
        if not chosen.is_visible():
            page.locator("#observatory .overflow-menu button").first.click()
            chosen = page.locator("#observatory .overflow-dropdown").get_by_text(name)
        chosen.click()
        page.wait_for_function(SHOWN, arg=name)
        wait_until_still(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert unexplained(page) == []
        levels = page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].filter(h => h.offsetWidth).map(h => Number(h.tagName[1]))"
        )
        assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), (name, levels)
        primary = [button for button in page.locator("button.primary, .llmq-primary").all() if button.is_visible()]
        assert len(primary) <= 1, (name, [button.inner_text() for button in primary])
        for theme in themes(page):
            found += violations(page, theme, "html" if name == "Activations" else "#observatory")
            page.screenshot(path=screenshots / f"part-{name.split()[0].lower()}-{theme}-{window}.png", full_page=True)
    serious = [
        (v["id"], [n["html"][:160] for n in v["nodes"]]) for v in found if v["impact"] in ("critical", "serious")
    ]
    assert not serious
    assert "channels that run through the model reach" in status(page, "outlier-status")
