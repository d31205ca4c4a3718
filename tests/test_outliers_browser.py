"""The Outliers tab as a story in a real Chromium: what is in view, what a click opens, what is kept and opens again."""

from __future__ import annotations

from functools import cache

import pytest
from browser_support import new_tab, open_page, status, wait_until_still
from test_browser import LARGEST_SHIFT, seen, watch_layout
from test_observatory_browser import drawn, part, wait_for_status, wait_for_watched

from llmq import face
from llmq.ui.parts.story import kept_in_16_bit

pytestmark = [pytest.mark.browser, pytest.mark.demo]
OPEN = "view=outliers&prompt=Plan+a+3-day+itinerary+in+Paris."


def open_outliers(page, address: str, query: str = "") -> None:
    open_page(page, address, f"{OPEN}&{query}", ready="#outlier-link")  # the status belongs to the watched parts alone


@cache
def kept_here() -> str:
    """What bitsandbytes keeps in 16 bit: the processor's sums decide about numbers beside the threshold."""
    asked = {"prompt": "Plan a 3-day itinerary in Paris.", "method": "bnb-int8", "new_tokens": 0, "device": "cpu"}
    report = face.ask("outliers", verbose=False, **asked).answer.report
    face.free()
    return kept_in_16_bit(report, 6.0)


def state(page) -> str:
    return page.locator("#outliers-view").get_attribute("data-state")


def watch(page, tokens: int = 2) -> None:
    page.locator("#outlier-new-tokens input[type=number]").fill(str(tokens))
    page.keyboard.press("Enter")
    page.locator("#watch").click()
    wait_for_watched(page, f"{tokens} generated tokens watched")
    page.wait_for_selector("#outlier-map .js-plotly-plot .hm")


def click_at(page, elem_id: str, x: str, y: str) -> None:
    """A real click on the plot, at the place of these values; `x` and `y`: axes and values, as 'xaxis2:3'."""
    place = page.evaluate(
        """([id, x, y]) => {
          const plot = document.querySelector(`#${id} .js-plotly-plot`);
          plot.scrollIntoView({ block: 'center' });
          const box = plot.getBoundingClientRect();
          const at = (spec) => {
            const [name, value] = spec.split(':');
            const axis = plot._fullLayout[name];
            return axis._offset + axis.d2p(axis.type === 'category' ? value : Number(value));
          };
          return [box.x + at(x), box.y + at(y)];
        }""",
        [elem_id, x, y],
    )
    page.mouse.move(place[0] - 1, place[1])
    page.mouse.move(*place)
    page.wait_for_timeout(300)
    page.mouse.click(*place)


@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080)], ids=["laptop", "projector"])
def test_sentence_map_and_the_strongest_channel_are_on_the_first_screen(page, address, size):
    """The form folds into a line, nothing jumps on the way, and the threshold is beside the map."""
    page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
    open_outliers(page, address)
    page.locator("#watch").wait_for()
    watch_layout(page)
    page.locator("#watch").click()
    page.wait_for_function("document.querySelector('#outliers-view').dataset.state === 'running'")
    assert page.locator("#outlier-stop").is_visible() and not page.locator("#watch").is_visible()
    wait_for_watched(page, "8 generated tokens watched")
    page.wait_for_selector("#outlier-map .js-plotly-plot .hm")
    wait_until_still(page)
    assert page.evaluate("window.scrollY") == 0
    seen(page, "#outlier-status .llmq-asked", "#outlier-status .llmq-headline", "#outlier-map", "#outlier-threshold",
         "#kind", "#phase", "#silence-card [data-part=lead]", "#silence")  # fmt: skip
    said = status(page, "outlier-status").replace("\xa0", " ")
    assert said.startswith("3 of the 576 channels that run through the model reach 6. The largest number is 31.6")
    assert kept_here() in said
    assert "507" in page.locator("#silence-card [data-part=lead]").inner_text()
    assert not page.locator("#outlier-prompt").is_visible()
    primary = [button for button in page.locator("button.primary, .llmq-primary").all() if button.is_visible()]
    assert [button.get_attribute("id") for button in primary] == ["watch-again"]
    assert page.evaluate("window.shift") < LARGEST_SHIFT


def test_before_anything_ran_a_recording_shows_what_a_channel_carries(page, address):
    open_outliers(page, address)
    card = page.locator("#silence-card")
    card.get_by_text("8,716", exact=True).wait_for()
    assert "Recording: SmolLM2-135M (demo)" in card.inner_text() and "Without channel 507" in card.inner_text()
    assert not page.locator("#outlier-map").is_visible() and not page.locator("#outlier-threshold").is_visible()


def test_a_run_that_is_stopped_or_refused_opens_the_form_again(page, address):
    open_outliers(page, address)
    page.locator("#outlier-prompt textarea").fill("word " * 1500)
    page.locator("#watch").click()
    page.locator("#outlier-stop").click()
    page.wait_for_function("/^Stopped/.test(document.querySelector('#outlier-status').innerText.split('\\n').at(-1)) ||"
                           "/Stopped early/.test(document.querySelector('#outlier-status').innerText)")  # fmt: skip
    if page.locator("#outlier-change").is_visible():
        page.locator("#outlier-change").click()
    page.locator("#outlier-prompt textarea").fill("  ")
    page.locator("#watch").click()
    page.wait_for_function("/^Not run: the prompt is empty/.test("
                           "document.querySelector('#outlier-status .llmq-status').textContent)")  # fmt: skip
    assert page.locator("#watch").is_visible()


def test_a_click_joins_the_views(page, address):
    open_outliers(page, address)
    watch(page, 4)
    click_at(page, "outlier-map", "xaxis:300", "yaxis:20")
    page.wait_for_function("document.querySelector('#layer input[type=number]').value === '20'")
    page.wait_for_function("/layer 20/.test(document.querySelector('#token-map [data-part=title]').textContent)")
    part(page, "Sent to 16 bit")
    drawn(page, "moment-figure")
    click_at(page, "moment-figure", "xaxis2:3", "yaxis2:5")
    page.wait_for_function("document.querySelector('#moment input[type=number]').value === '3'")
    page.wait_for_function(
        "/generated token 3/.test(document.querySelector('#moment-figure [data-part=title]').textContent)"
    )


def test_one_channel_is_silenced_beside_the_map_by_the_labs_own_section(page, address):
    open_outliers(page, address)
    page.locator("#silence").click()
    page.locator("#silence-stop").wait_for()
    page.wait_for_function("/^Measured on/.test(document.querySelector('#silence-card [data-part=doing]').textContent)")
    card = page.locator("#silence-card").inner_text()
    assert (
        "35.8" in card
        and "→ 8,7" in card
        and "Recording" not in card
        and "Without channel 507 perplexity goes from" in card
    )
    part(page, "What if")
    assert "Without channel 507 perplexity goes from" in page.locator("#silencing-finding").inner_text()


def test_what_was_watched_is_saved_and_opens_on_another_page(page, address, browser, tmp_path):
    open_outliers(page, address)
    assert page.locator("#report-save").is_disabled()
    watch(page)
    with page.expect_download() as download:
        page.locator("#report-save").click()
    assert download.value.suggested_filename.startswith("llmq-outliers-")
    path = tmp_path / "watched.json"
    download.value.save_as(path)
    other = new_tab(browser)
    open_page(
        other, address, "view=outliers&prompt=Something+else", ready="#outlier-link"
    )  # the status belongs to the watched parts alone
    with other.expect_file_chooser() as chooser:
        other.locator("#report-open").click()
    chooser.value.set_files(path)
    wait_for_watched(other, "2 generated tokens watched")
    assert (
        state(other) == "opened" and other.locator("#outlier-status [data-part=banner]").inner_text() == "A saved run"
    )
    assert "Plan a 3-day itinerary in Paris." in other.locator("#outlier-status [data-part=prompt]").inner_text()
    other.wait_for_selector("#outlier-map .js-plotly-plot .hm")
    heatmap = "document.querySelector('#outlier-map .js-plotly-plot')"
    values = f"JSON.stringify([...{heatmap}.calcdata[0][0].z.flat()])"
    assert other.evaluate(values) == page.evaluate(values)
    assert status(other, "outlier-status") == status(page, "outlier-status")
    part(other, "Agreement and cause")
    with other.expect_file_chooser() as chooser:
        other.locator("#agreement-open").click()
    chooser.value.set_files(path)
    wait_for_status(other, "reading-status", "Not opened: watched.json holds an answer of the kind 'outliers'")
    other.close()


@pytest.mark.parametrize("width", [1280, 320])
@pytest.mark.parametrize("name", ["moments", "figures", "agreement", "what-if"])
def test_a_link_opens_its_part_as_the_form_was(page, address, name, width):
    page.set_viewport_size({"width": width, "height": 720})
    open_outliers(page, address, f"part={name}&method=llm-int8&threshold=4.5")
    page.wait_for_selector(f"#part-{name}")  # visible; its tab may stand in a menu without a name
    page.wait_for_function(
        "name => new RegExp(`part=${name}&.*method=llm-int8&threshold=4.5`).test("
        "document.querySelector('#outlier-link textarea, #outlier-link input')?.value)",
        arg=name,
    )


def test_a_link_chooses_the_input_and_a_watched_run_leaves_it(page, address):
    open_outliers(page, address, "part=activations&kind=gate%2Fup")
    chosen = "document.querySelector('#kind input:checked')?.value === 'gate/up'"
    page.wait_for_function(chosen)
    page.wait_for_function(
        "/kind=gate%2Fup/.test(document.querySelector('#outlier-link textarea, #outlier-link input')?.value)"
    )
    watch(page)
    page.wait_for_selector("#outlier-map .js-plotly-plot .hm")
    assert page.evaluate(chosen)


def test_what_if_shows_what_it_depends_on(page, address):
    open_outliers(page, address, "part=what-if")
    page.wait_for_selector("#silencing-run")
    assert page.locator("#outlier-prompt").is_visible() and page.locator("#outlier-model").is_visible()
    for elem_id in ("watch", "outlier-method", "outlier-new-tokens", "outlier-threshold"):
        assert not page.locator(f"#{elem_id}").is_visible()
    assert "play no part here" in page.locator("#outliers-view").inner_text()


def test_a_word_is_explained_to_whoever_comes_by_keyboard(page, address):
    open_outliers(page, address)
    word = page.locator("#outliers-view .llmq-term", has_text="Prefill").first
    word.wait_for()
    says = page.locator("#llmq-says")
    assert not says.is_visible()
    word.focus()
    assert "reads the whole prompt at once" in says.inner_text() and says.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
