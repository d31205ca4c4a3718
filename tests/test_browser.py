"""The Compare tab in a real Chromium: generate, stop, replay, share; what is in view; accessibility; hosts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from browser_support import (
    ROOT,
    WINDOWS,
    compare_inputs,
    new_tab,
    open_page,
    open_settings,
    raw_messages,
    status,
    themes,
    unexplained,
    violations,
    wait_until_still,
)
from scripted_server import WORDS, scripted

from llmq.events import Run, Step, TimedEvent

pytestmark = [pytest.mark.browser, pytest.mark.demo]
PARIS = "prompt=Plan+a+3-day+itinerary+in+Paris."
SURE = r"After \d+ equal tokens, FP16 took “.+” at \d+%, int8 · ours “.+”, FP16's \w+ at \d+%"
LARGEST_UPDATE = 1024  # bytes of one streamed update
SAMPLES_AN_UPDATE = 2  # five a second are drawn, and four updates a second are sent
LARGEST_SHIFT = 0.05  # of the layout in a flow; 0.1 is called good


def state(page) -> str:
    return page.locator("#compare-view").get_attribute("data-state")


def wait_for(page, *states: str) -> None:
    page.wait_for_function(
        "states => states.includes(document.querySelector('#compare-view').dataset.state)", arg=list(states)
    )


def wait_for_text(page, index: int = 0, characters: int = 5) -> None:
    page.wait_for_function(
        "([id, least]) => document.querySelector('#compare-view').dataset.state !== 'example' && "
        "(document.querySelector(id)?.textContent || '').length > least",
        arg=[f"#pane-{index}", characters],
    )


def pane(page, index: int) -> str:
    return page.locator(f"#pane-{index}").inner_text()


def generate(page) -> None:
    page.locator("#generate").click()
    wait_for(page, "running", "done")


def finish(page) -> str:
    wait_for(page, "done")
    return status(page)


def press(page, elem_id: str) -> None:
    """Press a button that the page shows in this state."""
    page.locator(f"#{elem_id}").click()


def seen(page, *selectors: str) -> None:
    """Every one of these is wholly in the window."""
    height = page.viewport_size["height"]
    for selector in selectors:
        box = page.locator(selector).first.bounding_box()
        assert box and box["y"] >= 0 and box["y"] + box["height"] <= height, (selector, box, state(page))


def form(page) -> dict:
    value = "id => document.querySelector(`#${id} textarea, #${id} input`)?.value"
    return {name: page.evaluate(value, name) for name in ("prompt", "model", "method-0", "method-1", "method-2")}


def watch_layout(page) -> None:
    """Add up how far things jump that nobody moved (CLS); a click excuses what it moves for half a second."""
    page.evaluate(
        """() => { window.shift = 0; new PerformanceObserver((list) => list.getEntries().forEach((entry) => {
          if (!entry.hadRecentInput) window.shift += entry.value; })).observe({type: 'layout-shift'}); }"""
    )


def watch_plot(page) -> None:
    """Count removals of the plot's node, and mark it, so that a rebuilt one is noticed."""
    page.evaluate(
        """() => {
          const plot = document.querySelector('#result [data-part="plot"]');
          plot.dataset.marked = 'yes'; window.plotRemovals = 0;
          new MutationObserver(list => list.forEach(m => m.removedNodes.forEach(n => {
            if (n === plot || (n.contains && n.contains(plot))) window.plotRemovals += 1;
          }))).observe(document.body, {childList: true, subtree: true});
        }"""
    )


def test_a_newcomer_reads_the_verdict_without_scrolling_or_reading(page, address):
    """Open the page, read one sentence, press the one button, read the answer."""
    page.set_viewport_size({"width": 1280, "height": 720})
    page.goto(address)
    page.wait_for_selector("#generate")
    seen(page, "#header h1", "#header p", "#prompt", "#generate", "#result .llmq-strip")
    assert "16 bit" in page.locator("#header p").inner_text()
    primary = [button for button in page.locator("button.primary, .llmq-primary").all() if button.is_visible()]
    assert [button.get_attribute("id") for button in primary] == ["generate"]
    generate(page)
    finish(page)
    seen(page, "#status")
    assert re.match(r"int8 · ours needs \d+% (less|more) memory and writes", page.locator("#status").inner_text())
    assert page.evaluate("window.scrollY") == 0


@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080)], ids=["laptop", "projector"])
@pytest.mark.parametrize("how", ["live", "replayed"])
def test_the_answer_is_in_view_while_it_comes_and_afterwards(page, address, size, how):
    """Both texts, memory and speed of each, and the verdict; and nothing jumps on the way."""
    page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
    open_page(page, address, f"max_new_tokens=60&{PARIS}")
    watch_layout(page)
    parts = ["#pane-0", "#pane-1", "#result .llmq-strip", "#result .llmq-asked", "#status"]
    if how == "live":
        generate(page)
    else:
        press(page, "replay")
    wait_for_text(page, 0, 30)
    page.wait_for_function("document.querySelector('[data-figure=speed]').textContent")
    wait_until_still(page)
    seen(page, *parts)
    wait_for(page, "done", "replayed")
    page.wait_for_function("/memory/.test(document.querySelector('#status').textContent)")
    wait_until_still(page)
    seen(page, *parts)
    assert page.locator("[data-figure=memory]").inner_text() == "▼ 39%"
    assert page.evaluate("window.shift") < LARGEST_SHIFT
    box = page.locator("#result").bounding_box()
    assert abs(box["x"] - (size[0] - box["x"] - box["width"])) < 20, "the page stands in the middle"


def test_generates_side_by_side_and_keeps_the_plot(page, address):
    open_page(page, address, f"max_new_tokens=320&{PARIS}")
    watch_plot(page)
    generate(page)
    wait_for_text(page)
    assert "less memory" in finish(page)
    assert pane(page, 0).startswith("Planning a 3-day itinerary in Paris")
    assert len(pane(page, 1)) > 20
    page.wait_for_function("Number(document.querySelector('#result [data-points]').dataset.points) > 20")
    assert page.evaluate("window.plotRemovals") == 0
    assert page.evaluate("document.querySelector('#result [data-part=plot]').dataset.marked") == "yes"
    assert re.search(SURE, page.locator("#status").inner_text())
    page.locator("#why summary").click()
    assert "of weights where FP16 holds" in page.locator("#why").inner_text()
    assert page.locator("#pane-0 .llmq-first").count() == page.locator("#pane-1 .llmq-first").count() == 1
    with page.expect_download() as download:
        press(page, "download")
    assert download.value.suggested_filename.endswith(".jsonl")
    assert page.hosts == {address.split("/")[2]}


def test_a_server_is_tried_and_stands_beside_the_methods(page, address):
    """Asked what it has, its model becomes the third method; its key is in no link and no downloaded run."""
    key = "sk-very-secret-7f3a"
    with scripted(models=("small", "large")) as server:
        open_page(page, address, "prompt=Hello&methods=fp16,llm-int8&max_new_tokens=8")
        open_settings(page)
        page.locator("#server button").first.click()
        page.locator("#server-address input, #server-address textarea").fill("nothing")
        press(page, "server-test")
        page.wait_for_function(
            "/unknown kind of server 'nothing'/.test(document.querySelector('#server-said')?.innerText)"
        )
        page.locator("#server-address input, #server-address textarea").fill(server.name(model=""))
        page.locator("#server-key input").fill(key)
        press(page, "server-test")
        page.wait_for_function(f"document.querySelector('#method-2 input').value === {server.name(model='small')!r}")
        assert "small is the third method now" in page.locator("#server-said").inner_text()
        page.locator("#server-model input").click()
        page.get_by_role("option", name="large").click()
        page.wait_for_function(f"document.querySelector('#method-2 input').value === {server.name(model='large')!r}")
        press(page, "generate")
        finish(page)
        assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {key}"}
        assert [body["model"] for body in server.bodies] == ["large"]
    assert pane(page, 2) == "".join(WORDS) and f"openai@http://{server.host}" not in pane(page, 0)
    assert "over HTTP" in page.locator("#result .llmq-pane").nth(2).inner_text()
    with page.expect_download() as started:
        press(page, "download")
    written = Path(started.value.path()).read_text()
    assert "large" in written and key not in written
    link = page.locator("#link textarea, #link input").first.input_value()
    assert key not in link and key not in page.url and "large" in link


def test_a_second_generate_changes_nothing_of_a_run(page, address):
    """There is no button for it while one runs, and a click that comes all the same is lost whole."""
    open_page(page, address, "max_new_tokens=60&prompt=Count+to+ten.&methods=fp16,llm-int8")
    generate(page)
    wait_for_text(page)
    assert not page.locator("#generate").is_visible() and not page.locator("#prompt").is_visible()
    assert page.locator("#stop").is_visible()
    page.evaluate("document.querySelector('#generate').click()")
    finish(page)
    assert page.locator("#result [data-part=prompt]").inner_text().strip('“”"') == "Count to ten."
    assert page.locator("#result .llmq-pane").count() == 2


def test_a_replay_shows_and_fills_in_what_it_answers(page, address):
    open_page(page, address, "prompt=What+is+the+capital+of+Italy?&methods=fp16,llm-int8@3,bf16")
    assert form(page)["method-2"] == "BF16"
    press(page, "replay")
    wait_for(page, "replaying")
    page.wait_for_function("/Plan/.test(document.querySelector('#link textarea, #link input').value)")
    assert page.locator("#result [data-part=banner]").inner_text().startswith("Recording, made on ")
    assert "Plan a 3-day itinerary in Paris." in page.locator("#result [data-part=prompt]").inner_text()
    assert not page.locator("#prompt").is_visible(), "read-only: the form is away while it plays"
    press(page, "stop")
    wait_for(page, "replayed")
    assert status(page).startswith("Recording stopped.")
    kept = pane(page, 0)
    wait_until_still(page)
    assert pane(page, 0) == kept
    press(page, "change")
    assert form(page) == {
        "prompt": "Plan a 3-day itinerary in Paris.", "model": "SmolLM2-135M (demo)", "method-0": "FP16",
        "method-1": "int8 · ours", "method-2": "none",
    }  # fmt: skip
    assert "Plan+a+3-day" in page.locator("#link textarea, #link input").first.input_value()


@pytest.mark.parametrize("size", [(1280, 720), (400, 800), (320, 640)], ids=["laptop", "phone", "small phone"])
def test_the_strip_stays_in_view_above_what_is_read(browser, address, size):
    """Memory, speed and common words of a long answer, and the way to why; what gets the focus is not below it."""
    page = new_tab(browser, viewport=dict(zip(("width", "height"), size, strict=True)))
    open_page(page, address)
    press(page, "replay")
    page.locator("[data-part=skip]").click()
    page.wait_for_function("/memory/.test(document.querySelector('#status').textContent)")
    wait_until_still(page)
    watch_layout(page)
    strip = page.locator("#result .llmq-strip")
    before = strip.bounding_box()
    for part in ("#pane-0", "#pane-1", "#result .llmq-plot"):
        page.locator(part).focus() if "pane" in part else page.locator("#result .llmq-figures summary").focus()
        page.evaluate("part => document.querySelector(part).scrollIntoView()", part)
        wait_until_still(page)
        here, below = strip.bounding_box(), page.locator(part).bounding_box()
        assert here["height"] == before["height"] < size[1] / 5 and here["y"] >= 0, (part, here)
        assert below["y"] >= here["y"] + here["height"], (part, here, below)
        seen(page, "[data-figure=memory]", "[data-figure=speed]", "[data-figure=same]", "[data-part=show-why]")
    assert here["y"] == 0, "the page was scrolled by more than the strip's own place"
    covered = "document.elementFromPoint(innerWidth / 2, 5).closest('.llmq-strip')?.dataset.part"
    assert page.evaluate(covered) == "strip", "nothing shows through"
    page.locator("[data-part=show-why]").click()
    seen(page, "#why summary")
    assert page.locator("#why [data-part=details] p").first.is_visible()
    assert page.evaluate("window.shift") < LARGEST_SHIFT
    page.close()


def test_a_word_of_the_result_is_explained_by_mouse_keyboard_and_touch(browser, address):
    page = new_tab(browser, has_touch=True, viewport={"width": 1280, "height": 720})
    open_page(page, address, "max_new_tokens=2&prompt=int8+token+outlier")
    generate(page)
    finish(page)
    terms = page.locator("#result [data-part=shown] .llmq-term")
    shown = page.locator("#llmq-says:visible")
    words = " ".join(terms.all_text_contents())
    for word in ("Memory", "speed", "FP16", "int8", "outlier", "Peak memory", "First token", "coverage"):
        assert word in words
    assert page.locator("#result q .llmq-term, #result .llmq-text .llmq-term").count() == 0, "not in anybody's text"
    terms.nth(1).hover()
    assert shown.inner_text().startswith("Tokens per second")
    page.mouse.move(0, 0)
    page.locator("#why summary").focus()
    while not page.evaluate("document.activeElement.matches('.llmq-term')"):
        page.keyboard.press("Tab")
    assert "learnt" in shown.inner_text()
    page.keyboard.press("Escape")
    assert shown.count() == 0
    page.locator(".llmq-arithmetic .llmq-term", has_text="outlier").tap()
    assert "many times larger" in shown.inner_text()
    page.close()


def test_the_form_outlives_a_reload_and_makes_no_history(page, address):
    open_page(page, address, "__theme=dark&autorun=0")
    opened, entries = page.url, page.evaluate("history.length")
    press(page, "replay")
    page.locator("[data-part=skip]").click()
    wait_for(page, "replayed")
    page.wait_for_function("/Plan/.test(document.querySelector('#link textarea, #link input').value)")
    assert page.url == opened, "a recording's settings are not the visitor's"
    press(page, "change")
    page.locator("#prompt textarea").fill("Où & quoi?")
    open_settings(page)
    page.locator("#threshold input[type=number]").fill("3.5")
    page.keyboard.press("Tab")
    page.wait_for_function("/threshold=3.5/.test(location.search)")
    asked = form(page)
    page.reload()
    page.wait_for_function("document.querySelector('#prompt textarea')?.value === 'Où & quoi?'")
    page.wait_for_function("/threshold=3.5/.test(document.querySelector('#link textarea, #link input')?.value)")
    assert form(page) == asked and page.evaluate("history.length") == entries
    assert "__theme=dark" in page.url
    page.locator("#prompt textarea").click()
    page.locator("#prompt textarea").fill("word " * 1500)
    page.wait_for_function("!/prompt=/.test(location.search)")


def test_an_example_stands_at_its_end_after_a_refusal(page, address):
    page.goto(address)
    page.wait_for_function("document.querySelector('#compare-view')?.dataset.state === 'example'")
    for _ in range(2):
        page.locator("#prompt textarea").fill("  ")
        page.locator("#generate").click()
        page.wait_for_function("/^Not started/.test(document.querySelector('#status').textContent)")
        page.wait_for_function("document.querySelector('#pane-0 .llmq-first')")
        assert page.locator("#result .llmq-pane[data-state=finished]").count() == 2


def test_a_recording_is_replaying_from_the_click_on(page, address):
    page.emulate_media(reduced_motion="no-preference")
    open_page(page, address)
    page.route("**/queue/join*", lambda route: None)  # the server does not answer
    states = page.evaluate(
        """async () => {
            const view = document.querySelector("#compare-view"), seen = [];
            const moment = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
            const drawn = new Promise((done) => new MutationObserver(done).observe(
                document.querySelector("#pane-0"), { childList: true, characterData: true, subtree: true }));
            await Promise.race([drawn, moment(5000)]); // where a page took long to open, the example is over
            await moment(100); // by now the next frame of the example waits for its drawing
            new MutationObserver(() => seen.push(view.dataset.state)).observe(view, { attributes: true });
            document.querySelector("#replay").click();
            await moment(1500);
            return seen;
        }"""
    )
    assert set(states) == {"replaying"}, "a frame of the example was drawn over it"
    press(page, "stop")
    wait_for(page, "replayed")


def test_a_replay_can_be_skipped_to_its_end(page, address):
    open_page(page, address)
    watch_plot(page)
    press(page, "replay")
    page.locator("[data-part=skip]").click()
    wait_for(page, "replayed")
    page.wait_for_function("/memory/.test(document.querySelector('#status').textContent)")
    assert page.evaluate("window.plotRemovals") == 0


def test_stop_keeps_the_text_and_frees_the_device(page, address):
    open_page(page, address, "max_new_tokens=400&prompt=Tell+a+long+story.")
    generate(page)
    wait_for_text(page)
    press(page, "stop")
    assert finish(page).startswith("Stopped.")
    kept = pane(page, 0)
    assert len(kept) > 5
    wait_until_still(page)
    assert pane(page, 0) == kept
    press(page, "change")
    page.locator("#prompt textarea").fill("Say hello.")
    generate(page)
    wait_for_text(page)
    press(page, "stop")
    finish(page)


def test_second_visitor_waits_in_line(page, address, browser):
    other = new_tab(browser)
    open_page(page, address, "max_new_tokens=1024&prompt=Tell+a+story.")
    open_page(other, address, "max_new_tokens=2&prompt=Hello")
    generate(page)
    wait_for_text(page)
    other.locator("#generate").click()
    other.wait_for_function("/^Waiting: 1 run is/.test(document.querySelector('#status').textContent)")
    assert pane(other, 0) == ""
    press(page, "stop")
    assert finish(page).startswith("Stopped.")
    assert "less memory" in finish(other)
    other.close()


def test_a_long_prompt_is_seen_to_be_read(page, address):
    open_page(page, address, "max_new_tokens=2")
    page.locator("#prompt textarea").fill("word " * 1500)
    page.wait_for_function("/too many for a link/.test(document.querySelector('#link textarea, #link input').value)")
    page.locator("#generate").click()
    page.wait_for_function(
        "/reads the prompt: 1,5\\d\\d tokens, [1-9]\\d*%/.test(document.querySelector('#status').textContent)"
    )
    assert 0 < float(page.locator("#result [data-part=bar]").get_attribute("value")) <= 1
    assert page.locator("#status").get_attribute("aria-live") == "off", "a count is seen, not heard"
    press(page, "stop")
    finish(page)
    assert page.locator("#status").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("   ", "Not started: the prompt is empty"), ("word " * 20_000, "Not started: the prompt is")],
    ids=["blank", "100,000 characters"],
)
def test_bad_prompts_get_a_message_and_no_notice(page, address, prompt, expected):
    open_page(page, address)
    page.locator("#prompt textarea").fill(prompt)
    for _ in range(2):  # a browser is not told of a value that it has
        page.locator("#generate").click()
        page.wait_for_function("words => document.querySelector('#status').textContent.startsWith(words)", arg=expected)
        assert page.locator("[data-testid=toast-body]").count() == 0
        page.locator("#generate").wait_for()


def test_a_run_that_the_server_never_began_opens_the_form_again(page, address):
    open_page(page, address)
    page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "Queue is full."}))
    page.locator("#generate").click()
    page.wait_for_function("/^Interrupted/.test(document.querySelector('#status').textContent)")
    page.locator("#generate").wait_for()
    page.unroute("**/queue/join*")


def test_markup_is_text_everywhere(page, address):
    open_page(page, address, "max_new_tokens=2")
    page.locator("#prompt textarea").fill("<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>")
    generate(page)
    assert "less memory" in finish(page)
    press(page, "change")
    page.locator("#model input").fill("<img src=x onerror='window.hacked=1'>")
    page.keyboard.press("Tab")
    page.locator("#generate").click()
    page.wait_for_function(
        "/^Not started: unknown model .<img src=x/.test(document.querySelector('#status').textContent)"
    )
    assert page.locator("#result img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_wrong_upload_is_refused_without_a_place_on_the_server(page, address, tmp_path):
    open_page(page, address)
    (tmp_path / "junk.jsonl").write_text("no run")
    with page.expect_file_chooser() as chooser:
        press(page, "upload")
    chooser.value.set_files(tmp_path / "junk.jsonl")
    page.wait_for_function("/^Not replayed: junk.jsonl, line 1/.test(document.querySelector('#status').textContent)")
    assert "/" not in status(page)


def test_a_text_that_runs_from_right_to_left_does_so(page, address, tmp_path):
    """Arabic, two tokens a letter: no sign stands inside a word."""
    run = Run.load(ROOT / "assets" / "runs" / "demo-paris-cpu-lean.jsonl")
    letters = ("", "ا", "", "ك", "", "ت", "", "ب")
    for number, timed in enumerate(run.events):
        if isinstance(timed.event, Step):
            text = letters[timed.event.index % len(letters)]
            run.events[number] = TimedEvent(timed.at, replace(timed.event, text=text))
    open_page(page, address)
    with page.expect_file_chooser() as chooser:
        press(page, "upload")
    chooser.value.set_files(run.save(tmp_path / "arabic.jsonl"))
    page.locator("[data-part=skip]").click()
    wait_for(page, "replayed")
    page.wait_for_function("/memory/.test(document.querySelector('#status').textContent)")
    assert page.evaluate("getComputedStyle(document.querySelector('#pane-0')).direction") == "rtl"
    assert "∅" not in pane(page, 0) and "اكتب" in pane(page, 0)
    press(page, "change")
    page.locator("#prompt textarea").fill("اكتب جملة قصيرة عن باريس")
    style = "getComputedStyle(document.querySelector('#prompt textarea'))"
    assert page.evaluate(f"[{style}.unicodeBidi, {style}.textAlign]") == ["plaintext", "start"]


def test_a_link_opens_the_form_as_it_was_before_anything_ran(page, address, browser):
    open_page(page, address)
    page.locator("#prompt textarea").fill("Où & quoi?")
    open_settings(page)
    page.locator("#threshold input[type=number]").fill("3.5")
    page.keyboard.press("Tab")
    link = page.locator("#link textarea, #link input").first
    page.wait_for_function("/threshold=3.5/.test(document.querySelector('#link textarea, #link input').value)")
    other = new_tab(browser)
    other.goto(link.input_value())
    other.wait_for_function("value => document.querySelector('#link textarea, #link input')?.value === value",
                            arg=link.input_value())  # fmt: skip
    assert form(other) == form(page)
    other.goto(f"{address}/?methods=fp16,llm-int8@3&{PARIS}&seed=1")
    other.wait_for_function("/threshold=3&/.test(document.querySelector('#link textarea, #link input')?.value)")
    assert form(other)["method-1"] == "int8 · ours", "the threshold is the slider's, not the method's"
    other.close()


def test_the_settings_of_a_method_are_fields_and_the_name_says_them(page, address):
    from playwright.sync_api import expect

    open_page(page, address, "methods=gptq@bits%3D3,llm-int8")
    open_settings(page)
    group, left, right = (page.locator(id) for id in ("#method-settings-0-group", "#method-0 input", "#method-1 input"))
    assert (page.locator("#method-settings-0-bits").input_value(), group.input_value()) == ("3", "128")
    group.fill("64")
    group.press("Tab")
    page.locator("#method-settings-0-act_order").uncheck()
    expect(left).to_have_value("gptq@bits=3:group=64:act_order=off")
    page.locator("#method-settings-1-outlier_weights").select_option("16")
    expect(right).to_have_value("llm-int8@outlier_weights=16")
    page.wait_for_function("document.querySelector('#link textarea, #link input').value.includes('outlier_weights')")
    group.fill("-5")
    group.press("Tab")
    expect(left).to_have_value("gptq@bits=3:group=64:act_order=off")
    left.fill("rtn@bits=8")
    left.press("Enter")
    expect(page.locator("#method-settings fieldset").first).to_have_attribute("data-method", "rtn")
    assert page.locator("#method-settings-0-bits").input_value() == "8"


def test_an_address_can_run_and_open_a_view(page, address):
    page.goto(f"{address}/?autorun=1&max_new_tokens=3&prompt=Hello&embed=1")
    page.wait_for_selector("#compare-view")
    wait_for(page, "done")
    assert not page.locator("#header").is_visible()
    page.goto(f"{address}/?view=outliers")
    page.wait_for_selector("#watch")


def test_the_prompt_follows_from_tab_to_tab(page, address):
    open_page(page, address)
    page.locator("#prompt textarea").fill("Name three colours.")
    page.get_by_role("tab", name="Outliers").click()
    page.wait_for_function("document.querySelector('#outlier-prompt textarea')?.value === 'Name three colours.'")
    page.locator("#outlier-prompt textarea").fill("Name two.")
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_function("document.querySelector('#prompt textarea')?.value === 'Name two.'")


def test_it_is_said_how_sure_each_model_was_where_they_part(page, address):
    """A first token that is a coin toss makes another text; that is said, or it looks like a broken program."""
    open_page(page, address)
    page.locator("#recording input").click()
    page.get_by_role("option", name="on NVIDIA H100").click()
    press(page, "replay")
    page.locator("[data-part=skip]").click()
    page.wait_for_function(
        "/At the first token, FP16 took “Planning” at 15%/.test(document.querySelector('#status').textContent)"
    )
    page.locator("#why summary").click()
    assert "gave its own choice 12%: little decided it" in page.locator("#why").inner_text()


def test_outliers_heatmap_and_threshold(page, address, screenshots):
    open_page(page, address)
    page.get_by_role("tab", name="Outliers").click()
    page.locator("#watch").click()
    page.wait_for_function("/watched in/.test(document.querySelector('#outlier-status [data-part=note]').textContent)")
    assert "211 linear layers" in page.locator("#outlier-status").inner_text()
    page.wait_for_selector("#outlier-map .js-plotly-plot .hm")
    page.wait_for_selector("#token-map .js-plotly-plot .hm")
    heatmap = "document.querySelector('#outlier-map .js-plotly-plot').data[0]"
    assert page.evaluate(f"{heatmap}.customdata.shape ?? {heatmap}.customdata.length")
    page.locator("#outlier-tables > button").click()
    page.wait_for_function("/3,062/.test(document.querySelector('#outlier-channels')?.innerText)")
    page.screenshot(path=screenshots / "outliers-light.png", full_page=True)
    before = page.locator("#outlier-shares").inner_text()
    page.locator("#outlier-threshold input[type=number]").fill("12")
    page.keyboard.press("Enter")
    page.wait_for_function("old => document.querySelector('#outlier-shares').innerText !== old", arg=before)
    title = "document.querySelector('#outlier-map [data-part=title]').textContent"
    page.wait_for_function(
        "/ reache?s? 12\\./.test(document.querySelector('#outlier-status .llmq-status').textContent)"
    )
    page.get_by_role("radio", name="writing").click()
    page.wait_for_function(f"/decode/.test({title})")


@pytest.mark.parametrize("window", WINDOWS, ids=WINDOWS)
def test_accessible_and_never_wider_than_the_window(browser, address, window, screenshots):
    page = new_tab(browser, **WINDOWS[window])
    width, found = page.viewport_size["width"], []
    open_page(page, address, "max_new_tokens=6")
    generate(page)
    finish(page)
    wait_until_still(page)
    assert unexplained(page) == []
    for theme in themes(page):
        found += violations(page, theme)
        page.screenshot(path=screenshots / f"compare-{theme}-{window}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("tab", name="Outliers").click()
    page.wait_for_selector("#watch")
    for theme in themes(page):
        found += violations(page, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    serious = [
        (v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found if v["impact"] in ("critical", "serious")
    ]
    assert not serious
    page.close()


def test_generate_is_within_eight_tab_stops_and_all_of_them_are_seen(page, address):
    open_page(page, address, "max_new_tokens=2")
    page.keyboard.press("Tab")
    stops = []
    while len(stops) < 8:
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.closest('[id]')?.id"))
        assert page.evaluate("document.activeElement.getBoundingClientRect().width") > 0, stops
        if stops[-1] == "generate":
            break
        page.keyboard.press("Tab")
    assert stops[-1] == "generate", stops
    page.keyboard.press("Enter")
    assert "less memory" in finish(page)


def test_a_text_can_be_reached_named_and_scrolled_by_keyboard(page, address):
    open_page(page, address, "max_new_tokens=200&prompt=Tell+a+story.")
    generate(page)
    finish(page)
    text = page.get_by_role("region", name="What FP16 wrote")
    text.focus()
    text.evaluate("node => { node.scrollTop = 0; }")
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('#pane-0').scrollTop > 20")
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3')].filter(h => h.offsetWidth).map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), levels
    assert page.locator("#status[role=status]").count() == 1, "the verdict is announced"


def test_who_wants_no_motion_gets_the_recording_at_once(browser, address):
    page = new_tab(browser, reduced_motion="reduce")
    page.goto(address)
    page.wait_for_function("document.querySelector('#status')?.textContent.includes('less memory')")
    page.close()


def weight(size: int, message: dict) -> int:
    """Bytes of an update at its pace: where the engine is held up, samples of memory gather for the next one."""
    (live,) = message["output"]["data"]
    samples = [len(json.dumps(change)) for change in live if change[1] and change[1][0] == "samples"]
    return size - sum(samples) + SAMPLES_AN_UPDATE * max(samples, default=0)


def test_an_update_weighs_under_a_kilobyte(address):
    opening, *updates, last = (
        (size, message)
        for size, message in raw_messages(address, "generate", compare_inputs("Tell a story.", tokens=96))
        if message["msg"] == "process_generating"
    )
    assert len(updates) > 10 and opening[0] < 2048
    assert max(weight(*update) for update in updates) < 2 * LARGEST_UPDATE, "also where a method begins or ends"
    writing = [update for update in updates if "state_text" not in json.dumps(update[1])]
    assert len(writing) > 5 and max(weight(*update) for update in writing) < LARGEST_UPDATE


def test_nan_and_out_of_range_are_refused_in_words(address):
    for inputs, word in [
        (compare_inputs("x", temperature=99), "99"),
        (compare_inputs("x", temperature="NaN"), "NaN"),
        (compare_inputs("x", tokens=-5), "-5"),
        (compare_inputs("x", tokens=2.5), "2.5"),
        (compare_inputs("x", methods=("fp16", "int9", "none")), "int9"),
    ]:
        said = [message for _, message in raw_messages(address, "generate", inputs)]
        assert word in json.dumps([message["output"] for message in said if "output" in message])
        assert said[-1]["msg"] == "process_completed"
