"""llmq shows what 8-bit quantization does to a LLaMA: the same prompt through FP16 and int8, measured side by side.

Importing this package starts no CUDA, opens no network and loads neither gradio nor torch.
"""

__version__ = "0.1.0"
__all__ = ["METHODS", "Run", "agreement", "ask", "compare", "free", "load", "open_model", "outliers", "quality"]
__all__ += ["quantize", "save_quantized"]


def __getattr__(name: str):
    """Find a public name when it is first used (PEP 562); where each is at home, `llmq.face` says."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    homes = {"METHODS": "llmq.methods", "Run": "llmq.events", "quantize": "llmq.convert"}
    return getattr(import_module(homes.get(name, "llmq.face")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
