"""The end of a server: whoever waits for an answer is told, and nothing of it stays on the disk."""

from __future__ import annotations

import logging
import signal
import threading
import time

import gradio as gr
from gradio.tunneling import CURRENT_TUNNELS

from llmq.ui.shell.state import AppState

TELL_SECONDS = 0.7  # for the runs that are under way to end and to say so
CLOSE_SECONDS = 0.4  # for connections that are still open then


def serve_until_told(page: gr.Blocks, state: AppState) -> None:
    """Wait for SIGINT or SIGTERM (Ctrl-C, `docker stop`), or the end of the page; then end within two seconds."""
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while page.is_running and not told.wait(0.2):
            pass
        end(page, state)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(page: gr.Blocks, state: AppState) -> None:
    """End the runs, then the server, then remove its files."""
    if state.jobs:
        state.jobs.close()
        until = time.monotonic() + TELL_SECONDS
        while any(state.jobs) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.1)  # their last words are on the way
    if page.is_running:
        page.server.config.timeout_graceful_shutdown = CLOSE_SECONDS
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a stream that is cut off now is no error
        page.close(verbose=False)
    if state.classes:
        state.classes.close()
    state.close()
    for tunnel in CURRENT_TUNNELS:
        tunnel.kill()
