"""Make the README's moving picture from a running page: python tests/take_film.py ADDRESS [FILE].

A prompt is typed, both methods write, a token where they differ is clicked, the activations are watched. What moves is
shown at its own pace, and waiting is cut: so many seconds are told by the page, not by the film.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

from browser_support import CHROMIUM_FLAGS, ROOT, chromium_path, new_tab, open_page, wait_until_still
from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

WINDOW = {"width": 960, "height": 640}
QUALITY = 60  # of WebP: the text is read, and the whole stays under 2 MB
PACE, LONGEST, HOLD = 0.1, 0.6, 2.5  # seconds: between pictures, of a picture while something moves, of a result
MOST_SECONDS = 600  # until a model that shares the machine has answered
PROMPT = "Plan a 3-day itinerary in Paris."
POINTER = """() => { const dot = document.createElement('div'); dot.id = 'pointer'; document.body.append(dot);
  Object.assign(dot.style, {position: 'fixed', left: '-50px', width: '22px', height: '22px', translate: '-50% -50%',
    borderRadius: '50%', background: '#d55e0088', border: '2px solid #d55e00', zIndex: 99, pointerEvents: 'none'}); }"""
POINT = "([x, y]) => Object.assign(document.querySelector('#pointer').style, {left: `${x}px`, top: `${y}px`})"


class Film:
    """Pictures of a page, each with the seconds it stands."""

    def __init__(self, page: Page):
        self.page, self.pictures, self.seconds = page, [], []

    def shoot(self, seconds: float) -> None:
        """Add what the window shows; what it showed already stands longer."""
        picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        if self.pictures and picture == self.pictures[-1]:
            self.seconds[-1] += seconds
        else:
            self.pictures.append(picture)
            self.seconds.append(seconds)

    def until(self, condition: str) -> None:
        """Shoot what moves until a condition of the page holds."""
        last = time.monotonic()
        while not self.page.evaluate(condition):
            self.page.wait_for_timeout(1000 * PACE)
            now = time.monotonic()
            self.shoot(min(now - last, LONGEST))
            last = now

    def click(self, place: Locator) -> None:
        place.scroll_into_view_if_needed()
        box = place.bounding_box()
        self.page.evaluate(POINT, [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])
        self.shoot(0.8)
        place.click()

    def show(self, selector: str, seconds: float = HOLD) -> None:
        """Bring a part of the page to the window's top, and stay."""
        self.page.evaluate("() => document.querySelector('#pointer').style.left = '-50px'")
        self.page.locator(selector).evaluate(
            "part => window.scrollTo(0, part.getBoundingClientRect().top + scrollY - 16)"
        )
        wait_until_still(self.page)
        self.shoot(seconds)

    def save(self, path: Path) -> None:
        first, *others = self.pictures
        milliseconds = [round(1000 * seconds) for seconds in self.seconds]
        first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0, quality=QUALITY, method=6)


def compare(film: Film) -> None:
    page = film.page
    page.locator("#prompt textarea").fill("")
    film.shoot(0.8)
    for start in range(0, len(PROMPT), 4):
        page.locator("#prompt textarea").press_sequentially(PROMPT[start : start + 4])
        film.shoot(PACE)
    film.click(page.locator("#generate"))
    page.evaluate(POINT, [-50, 0])
    page.wait_for_function("document.querySelector('#pane-0')?.textContent")
    film.until("document.querySelector('#compare-view').dataset.state === 'done'")
    page.wait_for_timeout(1000)  # the sentence is drawn
    film.shoot(2 * HOLD)


def agreement(film: Film) -> None:
    page = film.page
    film.click(page.get_by_role("tab", name="Outliers"))
    film.click(page.get_by_role("tab", name="Agreement and cause"))
    film.click(page.locator("#outlier-method input"))
    page.get_by_role("option", name="int8 · ours", exact=True).click()
    page.locator("#patch input").uncheck()
    film.click(page.locator("#read"))
    page.wait_for_function("/first choice/.test(document.querySelector('#reading-status .llmq-status').textContent)")
    film.show("#reading-status")
    film.click(page.locator("#reading .llmq-first ~ button.llmq-other").first)
    film.shoot(HOLD)
    page.wait_for_selector("#layer-errors .js-plotly-plot .main-svg")
    film.show("#cause-title")


def activations(film: Film) -> None:
    page = film.page
    page.evaluate("window.scrollTo(0, 0)")
    film.click(page.get_by_role("tab", name="Activations"))
    film.click(page.locator("#watch"))
    page.wait_for_function("/watched/.test(document.querySelector('#outlier-status [data-part=note]').textContent)")
    page.wait_for_selector("#outlier-map .js-plotly-plot .hm")
    film.show("#outlier-map", 2 * HOLD)


def take(address: str, path: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=CHROMIUM_FLAGS)
        page = new_tab(browser, viewport=WINDOW, color_scheme="light")
        page.set_default_timeout(1000 * MOST_SECONDS)
        open_page(page, address, "max_new_tokens=96")
        page.evaluate(POINTER)
        film = Film(page)
        for part in (compare, agreement, activations):
            part(film)
        film.save(path)
        print(f"{path}: {len(film.pictures)} pictures, {sum(film.seconds):.0f} s, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2] if sys.argv[2:] else ROOT / "assets" / "film.webp"))
