"""What events of the page are wired with: nothing fades while one runs, and programs have endpoints of their own."""

from __future__ import annotations

QUIET = {"show_progress": "hidden", "api_visibility": "private"}
RUNS = {"concurrency_limit": 16, "concurrency_id": "runs"}  # of whatever asks the machine
