"""The English text that every install has: what models read where nobody gives them a text."""

from __future__ import annotations


def reference_text() -> str:
    """CPython's own documentation topics, sorted by name and joined by newlines: technical English in every install."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))
