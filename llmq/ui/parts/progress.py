"""What a running job yields, as the text or the value of a status line. No gradio."""

from __future__ import annotations

from llmq.contestant import shown_name
from llmq.events import Event, Failed, Freed, Loading, Planned, Progress, Step, Waiting


def progress_of(item: object) -> dict | str:
    """The line with its bar; '' for what is not worth a line."""
    if isinstance(item, Progress):
        return {"text": _sentence(item.message), "fraction": item.fraction} if item.message else ""
    line = event_line(item)
    return {"text": line, "fraction": None} if line else ""


def _sentence(message: str) -> str:
    """With a capital, unless it begins with a name: 'int8 · ours', 'model.layers.6'."""
    first = message.split(" ")[0]
    return message[:1].upper() + message[1:] if first.isalpha() else message


def event_line(event: Event) -> str:
    """The one line a screen reader hears; empty when nothing worth saying happened."""
    match event:
        case Waiting(position=position) if position:
            runs = "run is" if position == 1 else "runs are"
            return f"Waiting: {position} {runs} in front of yours"
        case Planned(reason=reason, schedule=schedule):
            return f"Running {schedule}: {reason}" if reason else f"Running ({schedule})"
        case Loading(contestant="", message=message):
            return _sentence(message)
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
