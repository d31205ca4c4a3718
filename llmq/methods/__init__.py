"""The methods: one file each, found by looking into this folder. A new one touches nothing else.

A method is a value: a frozen record whose fields are its settings (`base.Method`).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from llmq.errors import unknown
from llmq.methods.base import DEFAULT_THRESHOLD, Method, WeightBytes, subclasses
from llmq.methods.mixed import SETTING, mixed

__all__ = ["DEFAULT_THRESHOLD", "METHODS", "Method", "WeightBytes", "mixed", "parse_method"]

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

# Baselines first, then in the order of files and definitions. Each with its settings at their defaults.
_NAMED = [cls for cls in subclasses(Method) if cls.name]
_NAMED.sort(key=lambda cls: (not cls.dense, cls.__module__))
METHODS: dict[str, Method] = {cls.name: cls() for cls in _NAMED}


def parse_method(text: str, defaults: Mapping[str, Any] | None = None) -> Method:
    """`fp16`, `llm-int8@3.5`, `gptq@bits=4:group=128`: a name, and settings after an `@`; `keep=` among them names
    layers that are not quantized. `defaults`: values for settings that are not given, for the methods that have them.
    Raises BadChoice naming value and choices."""
    name, at, settings = text.strip().partition("@")
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    cls = type(METHODS[name])
    if at and not settings:
        settings = " "  # nothing after the @ is no number
    own = [part for part in settings.split(":") if not part.startswith(SETTING)]
    kept = [part.removeprefix(SETTING) for part in settings.split(":") if part.startswith(SETTING)]
    method = cls.parse(":".join(own), defaults or {})
    return mixed(method, "+".join(kept)) if kept else method
