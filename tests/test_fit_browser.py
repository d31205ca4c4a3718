"""'Does it fit?' in a real Chromium: links, changes at once, keyboard, accessibility, widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser_support import WINDOWS, new_tab, open_page, themes, unexplained, violations, wait_until_still

from llmq.ui.tabs.fit_tab import answer

pytestmark = [pytest.mark.browser, pytest.mark.demo]
LLAMA = "llama-3.1-8b-instruct"
HEADLINE = "document.querySelector('#fit-headline')?.textContent"


def open_fit(page, address: str, query: str = "") -> None:
    page.goto(f"{address}/?view=fit&{query}")
    page.wait_for_selector("#fit-headline")
    page.wait_for_function(f"{HEADLINE} && !/Counting/.test({HEADLINE})")


def wait_for_answer(page, *asked) -> dict:
    """Wait for the answer to a form with these values, and return it."""
    wanted = answer(*asked)
    page.wait_for_function(f"wanted => {HEADLINE} === wanted", arg=wanted["headline"])
    return wanted


def link(page) -> str:
    return page.locator("#fit-link textarea, #fit-link input").first.input_value()


def choose(page, elem_id: str, text: str) -> None:
    """Open a dropdown, take one of its options and leave it."""
    page.locator(f"#{elem_id} input").click()
    page.get_by_role("option", name=text).first.click()
    page.keyboard.press("Tab")


def test_a_link_opens_the_answer_and_the_answer_its_link(page, address, browser):
    open_fit(page, address, f"model={LLAMA}&card=rtx-4090&context=16384&batch=2")
    wanted = wait_for_answer(page, LLAMA, "rtx-4090", "", 16384, 2)
    rows = page.locator("#fit tbody tr")
    assert rows.count() == len(wanted["rows"]) == 4
    for row, shown in zip(wanted["rows"], rows.all(), strict=True):
        said = shown.inner_text()
        assert all(figure in said for figure in (*row["figures"].values(), row["largest"], row["batch"], row["method"]))
        assert ("✓ fits" if row["fits"] else "✕ does not fit") in said
    page.wait_for_function("/batch=2/.test(document.querySelector('#fit-link textarea, #fit-link input').value)")
    for button, kind, begins in (("fit-save", "json", b'{\n "kind": "advice"'), ("fit-draw", "png", b"\x89PNG")):
        with page.expect_download() as started:
            page.locator(f"#{button}").click()
        name, content = started.value.suggested_filename, Path(started.value.path()).read_bytes()
        assert name.startswith(f"llmq-advice-{LLAMA}") and name.endswith(kind) and content.startswith(begins)
        assert kind == "png" or "--batch 2 --device-memory rtx-4090" in json.loads(content)["conditions"]["command"]
    other = new_tab(browser)
    other.goto(link(page))
    wait_for_answer(other, LLAMA, "rtx-4090", "", 16384, 2)
    other.close()
    assert page.hosts == {address.split("/")[2]}


def test_every_change_is_answered_at_once_and_beside_the_queue(page, address):
    """Also while a run has the device."""
    open_page(page, address, "max_new_tokens=1000&prompt=Tell+a+long+story.")
    page.locator("#generate").click()
    page.wait_for_function("document.querySelector('#compare-view').dataset.state === 'running'")
    queued = []
    page.get_by_role("tab", name="Does it fit?").click()
    wait_for_answer(page, LLAMA, "rtx-4080", "", 8192, 1)
    page.on("request", lambda request: queued.append(request.url) if "queue/join" in request.url else None)
    choose(page, "fit-card", "T4 (16 GB)")
    wait_for_answer(page, LLAMA, "t4", "", 8192, 1)
    choose(page, "fit-model", "Llama-2-7B-Chat")
    wait_for_answer(page, "llama-2-7b-chat", "t4", "", 8192, 1)
    page.locator("#fit-context input").fill("1024")
    wait_for_answer(page, "llama-2-7b-chat", "t4", "", 1024, 1)
    page.locator("#fit-batch input").fill("4")
    wait_for_answer(page, "llama-2-7b-chat", "t4", "", 1024, 4)
    assert page.evaluate("document.querySelector('#compare-view').dataset.state") == "running", "it had the device"
    assert queued == []
    page.get_by_role("tab", name="Compare").click()
    page.locator("#stop").click()
    with page.expect_popup() as opened:
        page.locator("#advise").click()
    opened.value.wait_for_selector("#advice table")
    wait_for_answer(opened.value, "demo", "rtx-4080", "", 8192, 1)


def test_a_card_that_is_not_listed_is_an_amount(page, address):
    open_fit(page, address)
    assert not page.locator("#fit-memory").is_visible()
    choose(page, "fit-card", "other")
    wait_for_answer(page, LLAMA, "other", "16 GiB", 8192, 1)
    page.locator("#fit-memory textarea, #fit-memory input").first.fill("10.5GB")
    wait_for_answer(page, LLAMA, "other", "10.5GB", 8192, 1)
    page.wait_for_function("/card=10.5GB&/.test(document.querySelector('#fit-link textarea, #fit-link input').value)")
    assert page.locator("#fit [data-part=note]").inner_text().startswith("The memory given is 9.779 GiB")


def test_what_is_wrong_is_said_in_one_line_as_text(page, address):
    open_fit(page, address, "card=cow")
    wait_for_answer(page, LLAMA, "rtx-4080", "", 8192, 1)
    page.locator("#fit-model input").fill("<img src=x onerror='window.hacked=1'>")
    page.keyboard.press("Tab")
    page.wait_for_function(f"/^Not counted: unknown model .<img/.test({HEADLINE})")
    assert page.locator("#fit img").count() == 0 and page.evaluate("window.hacked") is None
    assert not page.locator("#fit table").is_visible()
    choose(page, "fit-model", "TinyLlama-1.1B-Chat")
    wait_for_answer(page, "tinyllama-1.1b-chat", "rtx-4080", "", 8192, 1)
    assert page.locator("#fit table").is_visible()


@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080)], ids=["laptop", "projector"])
def test_sentence_and_rows_are_in_view(page, address, size):
    page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
    open_fit(page, address)
    page.wait_for_selector("#fit tbody tr")
    for selector in ("#fit-form", "#fit-headline", "#fit table"):
        box = page.locator(selector).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= size[1], (selector, box)


def test_bars_end_where_the_card_does_or_beyond(page, address):
    """FP16's bar crosses the line where the card ends, int8's ends before it; the lines stand on one another."""
    open_fit(page, address)
    wanted = wait_for_answer(page, LLAMA, "rtx-4080", "", 8192, 1)
    page.wait_for_selector("#fit tbody tr")
    found = page.evaluate(
        """() => [...document.querySelectorAll('#fit .llmq-fit-bar')].map(bar => {
          const box = bar.getBoundingClientRect(), last = bar.lastElementChild.getBoundingClientRect();
          const line = parseFloat(getComputedStyle(bar, '::after').left);
          return { bar: (last.right - box.left) / box.width, line: line / box.width, x: box.left + line };
        })"""
    )
    for row, bar in zip(wanted["rows"], found, strict=True):
        assert bar["bar"] == pytest.approx(sum(row["shares"]), abs=0.01)
        assert bar["line"] == pytest.approx(wanted["end"], abs=0.01) and bar["x"] == pytest.approx(found[0]["x"], abs=1)
        assert (bar["bar"] <= wanted["usable"] + 0.01) == row["fits"]


@pytest.mark.parametrize("window", WINDOWS, ids=WINDOWS)
def test_accessible_and_never_wider_than_the_window(browser, address, window, screenshots):
    page = new_tab(browser, **WINDOWS[window])
    width = page.viewport_size["width"]
    open_fit(page, address)
    page.wait_for_selector("#fit tbody tr")
    wait_until_still(page)
    assert unexplained(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    clipped = page.evaluate(
        "() => [...document.querySelectorAll('#fit tbody th, #fit tbody td, #fit p')].filter("
        "node => node.offsetWidth > 1 && node.getBoundingClientRect().right > innerWidth).length"
    )
    assert clipped == 0
    for theme in themes(page):
        page.screenshot(path=screenshots / f"fit-{theme}-{window}.png", full_page=True)
        found = violations(page, theme)
        assert not [(theme, v["id"], v["impact"], [n["html"][:120] for n in v["nodes"]]) for v in found]
    page.close()


def test_the_form_is_walked_by_keyboard_and_every_control_has_a_name(page, address):
    open_fit(page, address)
    page.get_by_role("tab").filter(visible=True).last.focus()
    names = []
    while "fit-batch" not in names and len(names) < 8:
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.closest('[id^=fit-]')?.id"))
    assert list(dict.fromkeys(names)) == ["fit-model", "fit-card", "fit-context", "fit-batch"], "and words explained"
    for name in ("Model", "Card", "Context", "Batch"):
        assert page.locator("#fit-form").get_by_label(name, exact=False).first.is_visible(), name
    assert page.locator("#fit-headline[role=status]").count() == 1
    page.locator("#fit-context input").focus()
    page.keyboard.press("ArrowUp")
    wait_for_answer(page, LLAMA, "rtx-4080", "", 8192 + 1024, 1)
