"""Whether a visitor has given the password of `--auth`, for routes that are not Gradio's own. No gradio."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

LOG_IN = "log in first: open the server's first page and give the name and the password"
COOKIES = ("access-token-{}", "access-token-unsecure-{}")  # of https, of http; Gradio sets both at its login


def is_let_in(request: Request) -> bool:
    """Whether Gradio would answer this request: nobody has to log in, or this visitor has. As Gradio's own routes find
    it (get_current_user, login_check)."""
    app = request.app
    if app.auth_dependency is not None:
        return False  # somebody else's way to log in, which this server never has
    if app.auth is None:
        return True
    given = (request.cookies.get(name.format(app.cookie_id)) for name in COOKIES)
    return app.tokens.get(next(filter(None, given), None)) is not None


def refusal() -> Response:
    """What whoever is not let in gets."""
    return JSONResponse({"error": LOG_IN}, 401, {"Cache-Control": "no-store"})
