"""What whoever asks something of a class may be refused, by the reason. Each message says what to do about it."""

from __future__ import annotations

from llmq.errors import UserError


class Refused(UserError):
    """Something that whoever asks may not do, or may not do now."""


class WrongKey(Refused):
    """No teacher's key."""


class NoToken(Refused):
    """A token that is missing, or is nobody's in this class."""


class NotYours(Refused):
    """What is the teacher's to do, or a student's."""


class NoClass(Refused):
    """A code that no class has."""


class Full(Refused):
    """No room for one more."""
