"""GGUF to a model folder: config.json, safetensors, tokenizer and chat template.

Weights are stored in bfloat16, the dtype that they are run in: rounding to it is about ten times
finer than the steps of a 4-bit quantization. transformers reads the tokenizer; it could read the
weights too, but only with a package that batchgen does not need otherwise.

Source: llama.cpp's convert_hf_to_gguf.py, whose permutation of q and k is undone here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from batchgen.errors import ModelError, UnsupportedError
from batchgen.models.config import parse_config
from batchgen.models.families import EMBEDDING, FINAL_NORM, LAYER, LM_HEAD

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader

_SHARD_BYTES: Final = 2 << 30  # bounds the memory of a conversion

_ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",  # Mistral and SmolLM too
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# How text is split before BPE (llama.cpp's names). transformers splits as GPT-2 does whatever the
# file says, which for these gives the right tokens: SmolLM has no tokens of two digits, and a
# folder of Qwen's is loaded as Qwen2Tokenizer, with its own rules.
_PRE_TOKENIZERS: Final = (None, "default", "gpt-2", "smollm", "qwen2")
_TOP_NAMES: Final[Mapping[str, str]] = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}
_LAYER_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _GgufModel:
    """An open file: its metadata, and the config.json that says the same."""

    path: Path
    architecture: str
    reader: GGUFReader
    config: Mapping[str, Any]


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes the model of a GGUF file into an empty folder, as transformers would save it.

    Raises `UnsupportedError` for what is not built and `ModelError` for a broken file.
    """
    model = _open(path)
    _write_json(folder / "config.json", model.config)
    _write_weights(model, folder)
    _write_tokenizer(path, folder)


def _open(path: Path) -> _GgufModel:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ModelError(
            f"{path}: cannot be read as GGUF, it is truncated or damaged ({error}); get it again"
        ) from error
    architecture = _field(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: GGUF of the architecture {architecture!r} is not supported; "
            f"supported are {', '.join(_ARCHITECTURES)}"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _refuse_unsupported(path, reader, architecture, tensors)
    try:
        config = _config(reader, architecture, tensors)
    except KeyError as error:
        raise ModelError(f"{path}: {error.args[0]} is missing") from error
    parse_config(config, source=str(path))
    return _GgufModel(path=path, architecture=architecture, reader=reader, config=config)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _needed(reader: GGUFReader, key: str) -> Any:
    value = _field(reader, key)
    if value is None:
        raise KeyError(key)
    return value


def _refuse_unsupported(
    path: Path, reader: GGUFReader, architecture: str, tensors: Mapping[str, object]
) -> None:
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or "rope_freqs.weight" in tensors:
        raise UnsupportedError(
            f"{path}: RoPE scaling in a GGUF file is not supported; use the model's safetensors"
        )
    pre_tokenizer = _field(reader, "tokenizer.ggml.pre")
    if pre_tokenizer not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{path}: a tokenizer of the type {pre_tokenizer!r} in a GGUF file is not supported; "
            "use the model's safetensors"
        )
    if _field(reader, f"{architecture}.expert_count"):
        raise UnsupportedError(f"{path}: a mixture of experts is not supported")


def _config(reader: GGUFReader, architecture: str, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a config.json. Raises KeyError for metadata that is missing."""

    def needed(key: str) -> Any:
        return _needed(reader, f"{architecture}.{key}")

    def optional(key: str) -> Any:
        return _field(reader, f"{architecture}.{key}")

    num_heads, hidden_size = needed("attention.head_count"), needed("embedding_length")
    head_dim = optional("attention.key_length") or hidden_size // num_heads
    ends = [_field(reader, f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")]
    if "token_embd.weight" not in tensors:
        raise KeyError("token_embd.weight")
    return {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": needed("feed_forward_length"),
        "num_hidden_layers": needed("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": optional("attention.head_count_kv") or num_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": needed("attention.layer_norm_rms_epsilon"),
        "rope_theta": optional("rope.freq_base") or 10_000.0,
        "partial_rotary_factor": (optional("rope.dimension_count") or head_dim) / head_dim,
        "max_position_embeddings": needed("context_length"),
        "sliding_window": optional("attention.sliding_window"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }


def _write_weights(model: _GgufModel, folder: Path) -> None:
    """Shards of safetensors with their index, each written before the next one is made."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    try:
        for name, tensor in _tensors(model):
            if shard and shard_bytes + tensor.nbytes > _SHARD_BYTES:
                flush()
                shard_bytes = 0
            shard[name] = tensor
            shard_bytes += tensor.nbytes
        flush()
    except SafetensorError as error:
        raise ModelError(f"{folder}: cannot write the converted weights: {error}") from error
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _tensors(model: _GgufModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in bfloat16 under its name in transformers."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    for tensor in model.reader.tensors:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"{model.path}: {tensor.name} is of the type {tensor.tensor_type.name}, "
                "which is not supported"
            ) from error
        if model.architecture == "llama" and ".attn_q." in tensor.name:
            values = _unpermute(values, model.config["num_attention_heads"])
        if model.architecture == "llama" and ".attn_k." in tensor.name:
            values = _unpermute(values, model.config["num_key_value_heads"])
        owned = np.require(values, requirements="W")  # F32 is a view of the read-only file
        yield _name(model.path, tensor.name), torch.from_numpy(owned).to(torch.bfloat16)


def _unpermute(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Puts the rows of each head from pairs side by side back into two halves."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _name(path: Path, gguf_name: str) -> str:
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    match gguf_name.split("."):
        case ["blk", layer, part, kind] if part in _LAYER_NAMES:
            return LAYER.format(layer=layer) + f"{_LAYER_NAMES[part]}.{kind}"
    raise ModelError(f"{path}: the tensor {gguf_name} is not one of its architecture")


def _write_tokenizer(path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelError(f"{path}: its tokenizer cannot be read: {error}") from error
    tokenizer.save_pretrained(folder)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
