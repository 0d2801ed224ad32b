"""The model families as data: what one decoder has to know to be each of them.

The weight names are the same in every family; a family says which of them exist.

Legend: N query heads, K kv heads, H head size, D hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
LAYER = "model.layers.{layer}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of transformers.

    A bias is True or False where the architecture fixes it and None where a config key decides.
    `defaults` are the values that transformers assumes for keys that a config.json leaves out.
    """

    name: str  # transformers' model_type
    architecture: str
    qkv_bias: bool | None  # None: `attention_bias`
    output_bias: bool | None  # None: `attention_bias`
    mlp_bias: bool | None  # None: `mlp_bias`
    qk_norm: bool
    defaults: Mapping[str, object] = field(default_factory=dict)


_QWEN_DEFAULTS: Mapping[str, object] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",  # SmolLM and SmolLM2 are Llama with tied embeddings
        architecture="LlamaForCausalLM",
        qkv_bias=None,
        output_bias=None,
        mlp_bias=None,
        qk_norm=False,
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        defaults=_QWEN_DEFAULTS,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        qkv_bias=None,
        output_bias=None,
        mlp_bias=False,
        qk_norm=True,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
)
