"""What a click on Generate sends, in the form's order: the one place of the tests that knows it."""

from __future__ import annotations


def filled(prompt: str, model: str, methods: tuple, *, tokens: int = 8, temperature: float = 0) -> list:
    """The form's values; two methods leave the third list at 'none', and no server is asked."""
    third = () if len(methods) == 3 else ("none",)
    return [prompt, model, *methods, *third, 6.0, tokens, "interleave", temperature, 0, 1, 0, "", ""]
