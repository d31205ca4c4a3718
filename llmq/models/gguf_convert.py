"""Turn the demo model's GGUF file into the folder transformers opens: fp16 safetensors, config, tokenizer.

Dequantisation and file parsing are the `gguf` package's. Two things are undone here: GGUF stores each head's query and
key rows interleaved for its own rotary embedding (rows 0, d/2, 1, d/2+1, …), and it names tensors its own way.
The byte-level BPE tokenizer is rebuilt from the vocabulary and merges in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SPECIAL = 3  # GGUF token type of control tokens


def convert_gguf(path: Path, folder: Path) -> Iterator[float]:
    """Write `folder` (config, fp16 weights, tokenizer) from the GGUF at `path`; yield the share done."""
    from gguf import GGUFReader

    reader = GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    yield 0.1
    _write_config(fields, folder, tied=all(t.name != "output.weight" for t in reader.tensors))
    _write_tokenizer(fields, folder)
    yield 0.3
    tensors = {}
    for done, tensor in enumerate(reader.tensors, 1):
        name, weight = _convert_tensor(tensor, fields)
        tensors[name] = weight
        yield 0.3 + 0.6 * done / len(reader.tensors)
    from safetensors.torch import save_file

    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    yield 1.0


def _convert_tensor(tensor, fields: dict):
    import torch
    from gguf import dequantize

    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())  # (out, in) float32
    stem = tensor.name.removesuffix(".weight")
    if stem in _TOP_TENSORS:
        return f"{_TOP_TENSORS[stem]}.weight", weight.half()
    _, layer, part = stem.split(".")
    if part in ("attn_q", "attn_k"):
        heads = fields["llama.attention.head_count" + ("_kv" if part == "attn_k" else "")]
        weight = _separate_halves(weight, heads)
    return f"model.layers.{layer}.{_TENSORS[part]}.weight", weight.half()


def _separate_halves(weight, heads: int):
    """(heads·d, in) rows interleaved as (d/2, 2) per head -> (2, d/2) per head, the order transformers rotates."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, half, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _write_config(fields: dict, folder: Path, *, tied: bool) -> None:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    named = {"bos": "bos", "eos": "eos", "pad": "padding"}
    special = {f"{key}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for key, name in named.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": float(fields["llama.rope.freq_base"]),
        # The file stores a float32; its shortest decimal form is the number the authors wrote.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config | special, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2))


def _write_tokenizer(fields: dict, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [t for t, kind in zip(tokens, types, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()},
    ).save_pretrained(str(folder))
