"""The English text that every install has: what models read where nobody gives them a text."""

from __future__ import annotations

WINDOW = 512  # tokens that a model reads in one call


def reference_text() -> str:
    """Join CPython's documentation topics, sorted by name, by newlines: technical English in every install."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def windows(model, count: int) -> list[list[int]]:
    """Return the first `count` windows of the text as ids of `model`, each WINDOW tokens or the whole context."""
    length = min(WINDOW, model.context)
    ids = model.tokenize(reference_text()[: 20 * WINDOW * count])
    return [ids[i : i + length] for i in range(0, length * count, length)]
