"""What a running job yields, as the text or the value of a status line. No gradio."""

from __future__ import annotations

from llmq.contestant import shown_name
from llmq.events import Event, Failed, Freed, Loading, Planned, Progress, Step, Waiting


def progress_of(item: object) -> dict | str:
    """The line with its bar; '' for what is not worth a line."""
    if isinstance(item, Progress):
        message = item.message[:1].upper() + item.message[1:]
        return {"text": message, "fraction": item.fraction} if message else ""
    line = event_line(item)
    return {"text": line, "fraction": None} if isinstance(item, Loading) and line else line


def event_line(event: Event) -> str:
    """The one line a screen reader hears; empty when nothing worth saying happened."""
    match event:
        case Waiting(position=position) if position:
            runs = "run is" if position == 1 else "runs are"
            return f"Waiting: {position} {runs} in front of yours"
        case Planned(reason=reason, schedule=schedule):
            return f"Running {schedule}: {reason}" if reason else f"Running ({schedule})"
        case Loading(contestant="", message=message):
            return message[:1].upper() + message[1:]
        case Loading(contestant=contestant):
            return f"Loading {shown_name(contestant)}"
        case Step(contestant=contestant, index=0):
            return "Generating"
        case Failed(contestant=contestant):
            return f"{shown_name(contestant)} failed; the others go on"
        case Freed(contestant=contestant, verified=verified):
            return f"{shown_name(contestant)} freed" + (
                "" if verified else ", but its memory was not seen to come back"
            )
    return ""
