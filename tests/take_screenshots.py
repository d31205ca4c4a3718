"""Take the pictures of assets/screenshots from a running page: python tests/take_screenshots.py ADDRESS [FOLDER]."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from browser_support import CHROMIUM_FLAGS, ROOT, chromium_path, new_tab, wait_until_still
from PIL import Image
from playwright.sync_api import Page, sync_playwright

SIZES = {1280: 720, 400: 800, 1920: 1080}
QUALITY = 60  # of WebP: text stays crisp, and the whole set under 3.5 MB
ASKED = "prompt=Plan+a+3-day+itinerary+in+Paris.&max_new_tokens=120"
STATE = "document.querySelector('#compare-view').dataset.state"
WRITTEN = "(document.querySelector('#pane-0')?.textContent || '').length"
WATCHED = "/watched in/.test(document.querySelector('#outlier-status [data-part=note]').textContent)"


def compare(page: Page, address: str) -> Iterator[str]:
    page.goto(f"{address}/?{ASKED}")
    page.wait_for_function("window.Plotly && /memory/.test(document.querySelector('#status')?.textContent)")
    yield "compare-idle"
    page.locator("#generate").click()
    page.wait_for_function(f"document.querySelector('#status').textContent === 'Generating' && {WRITTEN} > 60")
    yield "compare-running"
    page.wait_for_function(f"{STATE} === 'done'")
    yield "compare-done"
    page.locator("#replay").click()
    page.wait_for_function(f"!document.querySelector('[data-part=banner]').hidden && {WRITTEN} > 150")
    yield "compare-replay"
    page.locator("#stop").evaluate("button => button.click()")  # also where it has just ended
    page.locator("#change").click()
    page.locator("#prompt textarea").fill(" ")
    page.locator("#generate").click()
    page.wait_for_function("/^Not started/.test(document.querySelector('#status').textContent)")
    yield "compare-failed"


def outliers(page: Page, address: str) -> Iterator[str]:
    page.goto(f"{address}/?view=outliers&{ASKED}")
    page.wait_for_function("document.querySelector('#watch')?.offsetParent")
    yield "outliers-idle"
    page.locator("#watch").click()
    page.wait_for_function(WATCHED)
    page.wait_for_selector("#outlier-map .js-plotly-plot .hm")
    yield "outliers-done"


def labs(page: Page, address: str) -> Iterator[str]:
    page.goto(f"{address}/?view=outliers&part=what-if&{ASKED}")
    page.wait_for_function("document.querySelector('#part-what-if')?.offsetParent")
    yield "labs"


def fit(page: Page, address: str) -> Iterator[str]:
    page.goto(f"{address}/?view=fit")
    page.wait_for_selector("#fit tbody tr")
    yield "fit"


def lab(page: Page, address: str) -> Iterator[str]:
    page.goto(f"{address}/?view=lab")
    page.wait_for_selector("#rounding-table")
    page.wait_for_selector("#rounding-errors .js-plotly-plot .hm")
    yield "lab"
    part(page, "Race")
    page.wait_for_selector("#part-race .js-plotly-plot .main-svg")
    yield "lab-race"
    part(page, "Bits")
    page.wait_for_selector("#bits .llmq-bit")
    yield "lab-bits"


def part(page: Page, name: str) -> None:
    """Open a part of the Lab tab; in a narrow window it is in the menu of what has no room."""
    tab = page.locator("#lab-parts").get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.locator("#lab-parts .overflow-menu button").first.click()
        tab = page.locator("#lab-parts .overflow-dropdown").get_by_text(name)
    tab.click()


def keep(page: Page, folder: Path, name: str) -> None:
    """A picture of what is in the window, in light and in dark."""
    for theme in ("light", "dark"):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
        page.wait_for_timeout(500)  # plots are drawn anew
        wait_until_still(page)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.save(folder / f"{name}-{theme}.webp", quality=QUALITY, method=6)
    page.evaluate("document.body.classList.remove('dark')")


def take(address: str, folder: Path, views: tuple[Callable[[Page, str], Iterator[str]], ...]) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=CHROMIUM_FLAGS)
        for width, height in SIZES.items():
            page = new_tab(browser, viewport={"width": width, "height": height}, color_scheme="light")
            for view in views:
                for name in view(page, address):
                    keep(page, folder, f"{name}-{width}")
            page.close()


if __name__ == "__main__":
    take(
        sys.argv[1],
        Path(sys.argv[2] if sys.argv[2:] else ROOT / "assets" / "screenshots"),
        (compare, outliers, labs, fit, lab),
    )
