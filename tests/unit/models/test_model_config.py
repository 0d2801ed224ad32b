"""Reading config.json: transformers is the oracle for defaults; refusals name what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from batchgen.errors import ModelError, UnsupportedError, UsageError
from batchgen.models.config import ModelConfig, parse_config, resolve_max_model_len
from batchgen.models.families import FAMILIES, Family

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}


def parse(architecture: str = "LlamaForCausalLM", **values: Any) -> ModelConfig:
    return parse_config({"architectures": [architecture], **SIZES, **values}, source="config.json")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_a_config_leaves_out_is_what_transformers_assumes(family: Family) -> None:
    import transformers

    theirs = transformers.AutoConfig.for_model(family.name, **SIZES)
    ours = parse(family.architecture)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 256 // 32)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == theirs.to_dict().get("sliding_window")
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


def test_both_forms_of_the_rope_keys_mean_the_same() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = parse(rope_theta=500_000.0, rope_scaling={"type": "llama3", **scaling})
    new = parse(rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **scaling})
    assert old == new
    assert new.rope.factor == 8.0
    assert new.rope.theta == 500_000.0


def test_the_family_comes_from_model_type_when_no_architecture_is_given() -> None:
    config = parse_config({"model_type": "qwen3", **SIZES}, source="config.json")
    assert config.family == "qwen3"
    assert config.qk_norm


def test_generation_config_has_the_last_word_on_the_end_of_a_row() -> None:
    values = {"architectures": ["LlamaForCausalLM"], **SIZES, "eos_token_id": 7}
    config = parse_config(values, source="x", generation={"eos_token_id": [7, 9]})
    assert config.eos_token_ids == (7, 9)
    assert parse_config(values, source="x", generation={}).eos_token_ids == (7,)


@pytest.mark.parametrize(("key", "name"), [("dtype", "float32"), ("torch_dtype", "float16")])
def test_dtype_is_read_from_either_key(key: str, name: str) -> None:
    assert parse(**{key: name}).dtype == name
    assert parse().dtype == "bfloat16"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": ["MixtralForCausalLM"]}, "LlamaForCausalLM, MistralForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"num_key_value_heads": 5}, "32 query heads over 5 kv heads"),
        ({"head_dim": 7}, "of size 7"),
        ({"layer_types": ["linear_attention"]}, "linear_attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_what_is_not_built_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=r"config\.json") as refusal:
        parse(**values)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "256"}, "hidden_size is '256'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ],
)
def test_what_makes_no_sense_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json") as error:
        parse(**values)
    assert named in str(error.value)


def test_max_model_len_defaults_to_the_model_and_is_held_to_it() -> None:
    config = parse(max_position_embeddings=4096)
    assert resolve_max_model_len(config, None) == 4096
    assert resolve_max_model_len(config, 100) == 100
    with pytest.raises(UsageError, match="4097 is more than the 4096"):
        resolve_max_model_len(config, 4097)


def test_scaled_rope_stretches_the_model_length() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse(max_position_embeddings=32768, rope_scaling=yarn)
    assert resolve_max_model_len(config, None) == 131072
    linear = parse(max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 2.0})
    assert resolve_max_model_len(linear, None) == 8192


def test_a_sliding_window_is_refused_only_where_it_would_slide() -> None:
    config = parse("MistralForCausalLM", sliding_window=4096)
    assert resolve_max_model_len(config, 4096) == 4096
    for requested in (None, 4097):
        with pytest.raises(UnsupportedError, match="sliding window attention is not built"):
            resolve_max_model_len(config, requested)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 64}, None),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, 64),
        (
            {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"]},
            None,
        ),
    ],
)
def test_qwen_slides_only_where_it_says_so(values: dict[str, Any], window: int | None) -> None:
    assert parse("Qwen2ForCausalLM", **values).sliding_window == window
