"""The script that explains the words of `glossary` wherever the page shows them."""

from __future__ import annotations

import json

from llmq.ui.parts.glossary import TERMS, WORD
from llmq.ui.shell.assets import script


def words_script() -> str:
    """What the browser runs once when the page is there."""
    known = {name.lower(): says for name, says in TERMS.items()}
    return script("words.js").replace("__TERMS__", json.dumps(known)).replace("__WORD__", json.dumps(WORD))
