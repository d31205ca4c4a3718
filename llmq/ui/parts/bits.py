"""Bits as boxes: a code of a floating-point format or of int8, bit by bit, and the number that it stands for.

All of it runs in the browser (`bits.js`); `bits_values.js` says what a code stands for.
"""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import component, script

FORMATS = {
    "fp16": "FP16", "bf16": "BF16", "e4m3": "FP8 E4M3", "e5m2": "FP8 E5M2", "int8": "int8, a scale",
    "zeropoint": "int8, a zero-point",
}  # fmt: skip
KINDS = {"sign": "sign", "exponent": "exponent", "significand": "significand", "digit": "the other digits"}
_TEMPLATE = f"""
<section class="llmq-bits" aria-label="Bits of a number">
  <fieldset><legend>Format</legend>{
    "".join(f'<label><input type="radio" name="llmq-format" value="{value}"> {label}</label>'
            for value, label in FORMATS.items())
}</fieldset>
  <div class="llmq-boxes" role="group" data-part="boxes"></div>
  <p class="llmq-quiet llmq-bit-kinds">{
    "".join(f'<span data-kind="{kind}"><i class="llmq-bit-{kind}"></i>{label}</span>'
            for kind, label in KINDS.items())
}</p>
  <div class="llmq-affine" data-part="affine" hidden>
    <label>Scale <input type="number" step="any" min="0" value="0.0271" data-part="scale"></label>
    <label data-part="zeros">Zero-point <input type="number" step="1" min="-128" max="127" value="-26" data-part="zero">
    </label>
  </div>
  <pre class="llmq-sums" role="status" data-part="sum"></pre>
  <div class="llmq-presets">
    <button type="button" class="llmq-button" data-part="less">Code − 1</button>
    <button type="button" class="llmq-button" data-part="more">Code + 1</button>
    <span class="llmq-presets" role="group" aria-label="Codes worth a look" data-part="presets"></span>
  </div>
</section>
"""  # fmt: skip


def bits_view(*, elem_id: str) -> gr.HTML:
    """The component."""
    return component(_TEMPLATE, script("nodes.js", "bits_values.js", "bits.js"), elem_id=elem_id, value={})
