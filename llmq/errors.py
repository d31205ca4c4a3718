"""What a user may be shown. The library raises these; only `ui/` and `cli.py` translate them for their audience."""

import errno

NOT_A_NUMBER = "the model's output is not a number (an overflow in 16 bit?); try bf16 or fp32"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, of a share of it, of what a process may write


class UserError(Exception):
    """A failure whose message is written for the person at the screen: what happened, and what to do about it."""


class BadChoice(UserError, ValueError):
    """A value that cannot be used; the message names the value and the choices."""


class ModelUnavailable(UserError):
    """A model that cannot be fetched, opened or understood."""


class NoModel(ModelUnavailable):
    """Files of which a library makes no model; the message ends in the library's words."""


class Ended(UserError):
    """A job that was ended before it was done, by nobody's click; what it yielded stays."""


class OutOfMemory(UserError):
    """Memory ran out, or would; the message gives predicted and free bytes."""


def is_allocation_failure(error: Exception) -> bool:
    """Whether memory ran out: torch's CPU allocator raises a plain RuntimeError, and its wording is the only sign."""
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("can't allocate memory", "not enough memory", "out of memory")
    )


def first_line(error: BaseException) -> str:
    """What a library says went wrong, in one line; the kind of error where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unknown(kind: str, value: object, choices) -> BadChoice:
    """The one wording for a name that is not in a table."""
    return BadChoice(f"unknown {kind} {value!r}; choose from {', '.join(map(str, choices))}")
