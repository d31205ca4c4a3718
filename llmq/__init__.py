"""llmq shows what 8-bit quantization does to a LLaMA: the same prompt through FP16 and int8, measured side by side.

Importing this package starts no CUDA, opens no network and loads neither gradio nor torch.
"""

__version__ = "0.1.0"
