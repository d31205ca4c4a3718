"""What the server tells about itself: `/healthz` to whoever asks, and `/jobs` to its owner, who may end one.

The owner gives the password that LLMQ_OWNER_PASSWORD holds, as `curl -u owner:…` does; where it holds none there are no
such pages. `curl -u owner:… -X POST http://…/jobs/7/end` ends job 7.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmq.machine.jobs import Job, Jobs

PASSWORD = "LLMQ_OWNER_PASSWORD"
HUNG_SECONDS = 300.0  # without a sign of life, after which a load balancer should look elsewhere


def routes_of(jobs: Jobs) -> list[Route]:
    """The routes for the web server."""

    async def health(request: Request) -> Response:
        told = health_of(jobs)
        return JSONResponse(told, 503 if told["state"] == "hangs" else 200)

    async def listed(request: Request) -> Response:
        return _refused(request) or JSONResponse([row_of(job, jobs.clock()) for job in jobs])

    async def ended(request: Request) -> Response:
        return _refused(request) or JSONResponse({"ended": jobs.end(request.path_params["number"])})

    return [
        Route("/healthz", health),
        Route("/jobs", listed),
        Route("/jobs/{number:int}/end", ended, methods=["POST"]),
    ]


def health_of(jobs: Jobs) -> dict:
    """Whether what computes answers, and how much is asked of it."""
    thread, line = jobs.machine.thread, jobs.machine.queue.waiting
    hangs = thread.silent_seconds > min(HUNG_SECONDS, thread.patience / 2)
    return {
        "state": "hangs" if hangs else "busy" if line else "idle",
        "in_line": line,
        "silent_seconds": round(thread.silent_seconds, 1),
        "given_up": thread.given_up,
    }


def row_of(job: Job, now: float) -> dict:
    """A job as its owner sees it: who, what, since when."""
    return {
        "number": job.number,
        "session": str(job.owner),
        "address": job.address,
        "question": type(job.question).__name__,
        "model": getattr(job.question, "model", ""),
        "waits": job.started is None,
        "seconds": round(now - (job.started or job.asked), 1),
    }


def _refused(request: Request) -> Response | None:
    """What somebody gets who is not the owner."""
    password = os.environ.get(PASSWORD)
    if not password:
        return JSONResponse({"error": f"the server's owner has set no {PASSWORD}"}, 404)
    if "origin" in request.headers:
        return JSONResponse({"error": "this is for programs; a page of any site could ask it in your name"}, 403)
    if not hmac.compare_digest(_given(request), password.encode()):
        return JSONResponse({"error": "the owner's password is wanted"}, 401, {"WWW-Authenticate": "Basic"})
    return None


def _given(request: Request) -> bytes:
    """The password in a request; empty where there is none."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return b""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
