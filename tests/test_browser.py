"""The page in a real Chromium: generate, stop, replay, move the threshold, read the heatmap; accessibility; hosts."""

from __future__ import annotations

import json
import re

import pytest
from browser_support import compare_inputs, new_tab, open_page, raw_messages, status, wait_until_still

pytestmark = [pytest.mark.browser, pytest.mark.demo]
SETTLED = re.compile(r"^(Finished|Stopped|Not |Ended|Recording.*(Finished|Stopped))")
LARGEST_UPDATE = 2048  # bytes of one streamed update
SAMPLES_AN_UPDATE = 2  # five a second are drawn, and four updates a second are sent


def wait_until_settled(page) -> str:
    page.wait_for_function(
        f"new RegExp({SETTLED.pattern!r}).test(document.querySelector('#status .llmq-status').textContent)"
    )
    return status(page)


def pane(page, index: int) -> str:
    return page.locator(f"#pane-{index} textarea").input_value()


def generate(page) -> None:
    page.locator("#status .llmq-status").evaluate("node => node.textContent = 'asked'")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("document.querySelector('#status .llmq-status').textContent !== 'asked'")


def watch_plot(page) -> None:
    """Count removals of the plot's node, and mark it, so that a rebuilt one is noticed."""
    page.evaluate(
        """() => {
          const plot = document.querySelector('#live-panel [data-part="plot"]');
          plot.dataset.marked = 'yes'; window.plotRemovals = 0;
          new MutationObserver(list => list.forEach(m => m.removedNodes.forEach(n => {
            if (n === plot || (n.contains && n.contains(plot))) window.plotRemovals += 1;
          }))).observe(document.body, {childList: true, subtree: true});
        }"""
    )


def test_generates_side_by_side_and_keeps_the_plot(page, address, screenshots):
    open_page(page, address, "max_new_tokens=160&prompt=Plan+a+3-day+itinerary+in+Paris.")
    watch_plot(page)
    generate(page)
    page.wait_for_function("document.querySelector('#pane-0 textarea').value.length > 5")
    assert wait_until_settled(page) == "Finished."
    assert pane(page, 0).startswith("Planning a 3-day itinerary in Paris")
    assert len(pane(page, 1)) > 20
    page.wait_for_function("Number(document.querySelector('#live-panel [data-points]').dataset.points) > 20")
    assert page.evaluate("window.plotRemovals") == 0
    assert page.evaluate("document.querySelector('#live-panel [data-part=plot]').dataset.marked") == "yes"
    assert "less memory" in page.locator("#verdict").inner_text()
    assert page.locator("#token-diff .llmq-diff-pane").count() == 2
    assert page.locator("#link input, #link textarea").input_value().startswith(f"{address}/?model=demo&methods=fp16")
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename.endswith(".jsonl")
    page.screenshot(path=screenshots / "compare-light.png", full_page=True)
    assert page.hosts == {address.split("/")[2]}


def test_stop_twice_keeps_the_text_and_frees_the_device(page, address):
    open_page(page, address, "max_new_tokens=400&prompt=Tell+a+long+story.")
    generate(page)
    page.wait_for_function("document.querySelector('#pane-0 textarea').value.length > 5")
    page.locator("#stop").click()
    page.locator("#stop").click()
    assert wait_until_settled(page) == "Stopped."
    kept = pane(page, 0)
    assert len(kept) > 5
    wait_until_still(page)
    assert pane(page, 0) == kept
    page.locator("#prompt textarea").fill("Say hello.")
    page.locator("#max-new-tokens input[type=number]").fill("3")
    page.keyboard.press("Tab")
    generate(page)
    assert wait_until_settled(page) == "Finished."


def test_second_visitor_waits_in_line(page, address, browser):
    other = new_tab(browser)
    open_page(page, address, "max_new_tokens=500&prompt=Tell+a+story.")
    open_page(other, address, "max_new_tokens=2&prompt=Hello")
    generate(page)
    page.wait_for_function("document.querySelector('#pane-0 textarea').value.length > 5")
    other.get_by_role("button", name="Generate").click()
    other.wait_for_function("/^Waiting: 1 run is/.test(document.querySelector('#status .llmq-status').textContent)")
    assert pane(other, 0) == ""
    page.locator("#stop").click()
    assert wait_until_settled(page) == "Stopped."
    assert wait_until_settled(other) == "Finished."
    other.close()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("   ", "Not started: the prompt is empty"), ("word " * 20_000, "Not started: the prompt is")],
    ids=["blank", "100,000 characters"],
)
def test_bad_prompts_get_a_message(page, address, prompt, expected):
    open_page(page, address)
    page.locator("#prompt textarea").fill(prompt)
    generate(page)
    assert wait_until_settled(page).startswith(expected)


def test_markup_is_text_everywhere(page, address):
    open_page(page, address, "max_new_tokens=2")
    page.locator("#prompt textarea").fill("<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>")
    generate(page)
    assert wait_until_settled(page) == "Finished."
    page.locator("#model input").fill("<img src=x onerror='window.hacked=1'>")
    page.keyboard.press("Tab")
    generate(page)
    assert wait_until_settled(page).startswith('Not started: unknown model "<img src=x')
    assert page.locator("[data-testid=toast-text] img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_replays_a_recorded_run_labelled_as_such(page, address):
    open_page(page, address)
    watch_plot(page)
    page.locator("#replay").click()
    page.wait_for_function("/^Recording/.test(document.querySelector('#status .llmq-status').textContent)")
    page.wait_for_function("document.querySelector('#pane-0 textarea').value.length > 40")
    assert wait_until_settled(page).startswith("Recording:")
    assert page.evaluate("window.plotRemovals") == 0


def test_outliers_heatmap_and_threshold(page, address, screenshots):
    open_page(page, address)
    page.get_by_role("tab", name="Outliers").click()
    page.locator("#watch").click()
    page.wait_for_function("/watched in/.test(document.querySelector('#outlier-status .llmq-status').textContent)")
    assert "211 linear layers" in status(page, "outlier-status")
    page.wait_for_selector("#outlier-map .js-plotly-plot .hm")
    page.wait_for_selector("#token-map .js-plotly-plot .hm")
    heatmap = "document.querySelector('#outlier-map .js-plotly-plot').data[0]"
    assert page.evaluate(f"{heatmap}.customdata.shape ?? {heatmap}.customdata.length")
    assert "3,062" in page.locator("#outlier-channels").inner_text()
    page.screenshot(path=screenshots / "outliers-light.png", full_page=True)
    before = page.locator("#outlier-shares").inner_text()
    page.locator("#outlier-threshold input[type=number]").fill("12")
    page.keyboard.press("Enter")
    page.wait_for_function("old => document.querySelector('#outlier-shares').innerText !== old", arg=before)
    title = "document.querySelector('#outlier-map [data-part=title]').textContent"
    page.get_by_role("radio", name="decode").click()
    page.wait_for_function(f"/decode/.test({title})")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_accessible_and_never_wider_than_the_window(browser, address, theme, width, screenshots):
    from axe_playwright_python.sync_playwright import Axe

    page = new_tab(browser, viewport={"width": width, "height": 900})
    open_page(page, address, f"__theme={theme}&max_new_tokens=6")
    generate(page)
    wait_until_settled(page)
    wait_until_still(page)
    found = Axe().run(page).response["violations"]
    page.screenshot(path=screenshots / f"compare-{theme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("tab", name="Outliers").click()
    page.wait_for_selector("#watch")
    wait_until_still(page)
    found += Axe().run(page).response["violations"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    serious = [
        (v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found if v["impact"] in ("critical", "serious")
    ]
    assert not serious
    page.close()


def test_keyboard_alone_runs_a_comparison(page, address):
    open_page(page, address, "max_new_tokens=2")
    page.locator("#prompt textarea").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    page.locator("#status .llmq-status").evaluate("node => node.textContent = 'asked'")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#status .llmq-status').textContent !== 'asked'")
    assert wait_until_settled(page) == "Finished."


def weight(size: int, message: dict) -> int:
    """Bytes of an update at its pace: where the engine is held up, samples of memory gather for the next one."""
    *_, live = message["output"]["data"]
    samples = [len(json.dumps(change)) for change in live if change[1][0] == "samples"]
    return size - sum(samples) + SAMPLES_AN_UPDATE * max(samples, default=0)


def test_an_update_weighs_under_two_kilobytes(address):
    opening, *updates = (
        (size, message)
        for size, message in raw_messages(address, "page_compare", compare_inputs("Tell a story.", tokens=24))
        if message["msg"] == "process_generating"
    )
    assert len(updates) > 10 and opening[0] < LARGEST_UPDATE
    assert max(weight(*update) for update in updates) < LARGEST_UPDATE


def test_nan_and_out_of_range_through_the_api(address):
    for inputs, word in [
        (compare_inputs("x", temperature=99), "99"),
        (compare_inputs("x", temperature="NaN"), "NaN"),
        (compare_inputs("x", tokens=-5), "-5"),
        (compare_inputs("x", tokens=2.5), "2.5"),
        (compare_inputs("x", methods=("fp16", "int9", "none")), "int9"),
    ]:
        *_, (_, last) = raw_messages(address, "page_compare", inputs)
        assert last["msg"] == "process_completed" and last["success"] is False
        assert word in last["output"]["error"]
    *_, (_, last) = raw_messages(address, "page_compare", compare_inputs("x", tokens=2))
    assert last["success"] is True
