"""The RoPE table against transformers' own rotary modules, with the parameters of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batchgen.models.config import parse_config
from batchgen.models.rope import attention_factor, cos_sin_table, inverse_frequencies

DEFAULT = {"rope_type": "default", "rope_theta": 1_000_000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_2_5_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}


@pytest.mark.parametrize(
    "rope_parameters",
    [
        DEFAULT,
        LINEAR,
        LLAMA_3_1,
        {**LLAMA_3_1, "factor": 32.0},
        QWEN_2_5_YARN,
        {**QWEN_2_5_YARN, "attention_factor": 1.25, "beta_fast": 24.0, "beta_slow": 2.0},
        {**QWEN_2_5_YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
        {**QWEN_2_5_YARN, "truncate": False},
        {**QWEN_2_5_YARN, "factor": 1.0},
    ],
    ids=lambda parameters: "-".join(map(str, parameters.values())),
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_table_matches_transformers(rope_parameters: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(rope_parameters),
    )
    rotary = LlamaRotaryEmbedding(theirs)
    config = parse_config(theirs.to_dict(), source="config.json")

    torch.testing.assert_close(
        inverse_frequencies(config.rope, head_dim), rotary.inv_freq, rtol=1e-6, atol=0
    )
    assert attention_factor(config.rope) == pytest.approx(rotary.attention_scaling, rel=1e-12)

    cos_sin_MH = cos_sin_table(config, 600, "cpu")
    cos, sin = rotary(torch.zeros(1), torch.arange(600)[None])
    half = head_dim // 2
    assert cos_sin_MH.dtype == torch.float32
    torch.testing.assert_close(cos_sin_MH[:, :half], cos[0, :, :half], rtol=0, atol=2e-4)
    torch.testing.assert_close(cos_sin_MH[:, half:], sin[0, :, :half], rtol=0, atol=2e-4)
