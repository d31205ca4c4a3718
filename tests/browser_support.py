"""What the browser tests share: the real app in a process of its own, a real Chromium, and Gradio's raw stream."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

import httpx
from page_form import filled

ROOT = Path(__file__).resolve().parent.parent
# A name given here replaces Playwright's own list of features, so its entries that matter to a test come along. The two
# of the omnibox would start a hidden page of Chromium's own beside every window, for a second of a processor each.
WITHOUT = (
    "WebUIOmniboxPopup",
    "WebUIOmniboxAimPopup",
    "AvoidUnnecessaryBeforeUnloadCheckSync",
    "DestroyProfileOnBrowserClose",
    "HttpsUpgrades",
    "HttpsFirstBalancedModeAutoEnable",
    "LensOverlay",
    "MediaRouter",
    "PaintHolding",
    "ThirdPartyStoragePartitioning",
    "AvoidCorsURLLoaderRestartOnRedirect",
    "OptimizationHints",
    "NetworkTimeServiceQuerying",
    "AimEnabled",
    "PreconnectToSearch",
)
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    f"--disable-features={','.join(WITHOUT)}",
    "--js-flags=--min-semi-space-size=64",  # MiB; a page is opened without collecting the garbage many times
]
START_SECONDS = 300
PATIENCE = 240_000  # milliseconds until a state that does not come is a failure; other processes may have the cores
LOADED = "seed=1"  # a wish in the address: once the form shows it, the form has been filled from the address

# Zoomed to 200 %, a window has half as many pixels each way, and each of them is drawn as four.
WINDOWS = {
    "1400": {"viewport": {"width": 1400, "height": 900}},
    "200 %": {"viewport": {"width": 640, "height": 360}, "device_scale_factor": 2},
    "400": {"viewport": {"width": 400, "height": 900}},
    "320": {"viewport": {"width": 320, "height": 900}},
}


def resize(page, window: str) -> None:
    """Give an open page the size of one of WINDOWS, and wait until what is drawn has it."""
    page.set_viewport_size(WINDOWS[window]["viewport"])
    wait_until_still(page)


def chromium_path() -> str | None:
    """The Chromium to drive: CHROMIUM names one, else the system's."""
    named = os.environ.get("CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def running_app(*flags: str, **options) -> Iterator[str]:
    """`python app.py` on a free port; yields its address, and ends the process."""
    with tempfile.TemporaryFile("w+") as log, app_process(log, *flags, **options) as address:
        yield address


@contextmanager
def app_process(
    log: IO[str], *flags: str, program: Path = ROOT / "app.py", env: dict[str, str] | None = None
) -> Iterator[str]:
    """As `running_app`, with what it says in `log`: a pipe that nobody reads would be full one day. `program`: what
    starts it instead."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(program), "--port", str(port), "--device", "cpu", *flags]
    address = f"http://127.0.0.1:{port}"
    app = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, process_group=0)
    try:
        wait_for(address, app, log)
        yield address
    finally:
        app.terminate()
        app.wait(60)
        with suppress(ProcessLookupError):  # what it forked and left behind
            os.killpg(app.pid, signal.SIGKILL)


def wait_for(address: str, app: subprocess.Popen, log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if app.poll() is not None:
            log.seek(0)
            raise AssertionError(f"app.py ended with {app.returncode}: {log.read()}")
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"app.py did not answer within {START_SECONDS} s")


def call_of(client: httpx.Client, elem: str, event: str, data: list, session: str) -> dict:
    """What the browser sends for an event of the page's component `elem`."""
    config = client.get("/config").json()
    (pressed,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == elem)
    endpoint = next(d for d in config["dependencies"] if [pressed, event] in d["targets"])
    return {"data": data, "fn_index": endpoint["id"], "session_hash": session, "event_data": None}


def press_stop(address: str, session: str) -> None:
    """Do what the page's Stop does."""
    with httpx.Client(base_url=address, timeout=60) as client:
        call = call_of(client, "result", "stop", [], session)
        client.post("/gradio_api/run/predict", json=call).raise_for_status()


def raw_messages(address: str, button: str, data: list, session: str = "") -> Iterator[tuple[int, dict]]:
    """Do what a click on a button of the page does, and yield (bytes, message) of every server-sent event."""
    with httpx.Client(base_url=address, timeout=None) as client:
        session = session or uuid.uuid4().hex[:11]
        call = call_of(client, button, "click", data, session)
        client.post("/gradio_api/queue/join", json=call).raise_for_status()
        with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line.removeprefix("data:"))
                    yield len(line), message
                    if message["msg"] in ("process_completed", "close_stream"):
                        return


def compare_inputs(
    prompt: str, *, methods=("fp16", "bnb-int8", "none"), tokens: int = 8, temperature: float = 0
) -> list:
    """The inputs of a click on Generate, in the form's order."""
    return filled(prompt, "demo", methods, tokens=tokens, temperature=temperature)


def new_tab(browser, **options):
    """An empty tab that waits as long as the tests do."""
    tab = browser.new_page(**options)
    tab.set_default_timeout(PATIENCE)
    return tab


def open_page(page, address: str, query: str = "", ready: str = "#generate") -> None:
    page.goto(f"{address}/?{query}&{LOADED}")
    page.wait_for_selector(ready)
    page.wait_for_function("/seed=1/.test(document.querySelector('#link textarea, #link input')?.value)")
    page.wait_for_function("document.querySelector('#compare-view')?.dataset.state")


def wait_until_still(page) -> None:
    """No transition runs any more, and the browser has painted since."""
    page.wait_for_function(
        "() => document.getAnimations().every("
        "a => a.playState !== 'running' || a.effect.getTiming().iterations === Infinity)"
    )
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


# The words of the glossary that a part of the page shows to be read, and explains nowhere in that part.
UNEXPLAINED = """(word) => {
  const own = 'button, summary, label:has(> [type=radio]), label:has(> [type=checkbox]), .wrap-inner, textarea, '
    + 'select, .llmq-text, .llmq-texts, .llmq-reading-text, q, pre, code, legend';
  const seen = (node) => node.checkVisibility({ visibilityProperty: true }) && node.getClientRects().length;
  const told = (place) => [...place.querySelectorAll('.llmq-term')].filter(seen).map((term) => term.dataset.word);
  const said = (place) => {
    const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT), texts = [];
    while (walker.nextNode()) {
      const inside = walker.currentNode.parentElement;
      if (!inside.closest(own) && seen(inside)) texts.push(walker.currentNode.data);
    }
    return [...texts.join(' | ').matchAll(new RegExp(word, 'gi'))].map((found) => found[1].toLowerCase());
  };
  return [...document.querySelectorAll('[role=tabpanel], .llmq-part')].filter(seen).flatMap((place) => {
    const known = told(place);
    return [...new Set(said(place))].filter((name) => !known.includes(name)).map((name) => `${place.id}: ${name}`);
  });
}"""


def unexplained(page) -> list[str]:
    """What stands in the open parts of the page without an explanation there, as 'part: word'."""
    from llmq.ui.parts.glossary import WORD  # here: the scripts beside the tests run without the package, too

    return page.evaluate(UNEXPLAINED, WORD)


def themes(page) -> Iterator[str]:
    """Show the open page light, then dark, as Gradio does; yields each name once the page stands still."""
    for theme in ("light", "dark"):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
        wait_until_still(page)
        yield theme


def violations(page, theme: str = "light", within: str = "html") -> list[dict]:
    """What axe finds in the open page, or `within` a part of it that is new, each with the rule's `id`, `impact` and
    its `nodes`. In a dark `theme`, after a light one, it looks at colours alone: nothing else has changed. The script
    stays in the page, since a newly compiled one takes twice as long; the style sheets, which only an experimental rule
    reads, are not fetched again."""
    from axe_playwright_python.base import AXE_SCRIPT  # here: the scripts beside the tests run without it

    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE_SCRIPT)
    options = {"resultTypes": ["violations"], "preload": {"assets": ["media"]}}
    if theme == "dark":
        options["runOnly"] = {"type": "tag", "values": ["cat.color"]}
    return page.evaluate(
        "([within, options]) => axe.run(within, options).then(found => found.violations)", [within, options]
    )


def open_settings(page) -> None:
    """Open the settings of a comparison, and wait: Gradio gives what it has just shown its first values once more, over
    what was typed meanwhile."""
    page.locator("#settings button").first.click()
    page.wait_for_selector("#threshold input[type=number]")
    wait_until_still(page)


def status(page, elem: str = "result") -> str:
    return page.locator(f"#{elem} .llmq-status").text_content()
