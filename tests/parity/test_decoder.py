"""The decoder against transformers: tiny random models, fp32, ragged prompts.

The decoder runs on plain dense ops with contiguous KV that are written here, so that what is
tested is the models room alone: config, RoPE table, weight names, fusion, residuals.

Legend: T tokens, N query heads, K kv heads, H head size, M positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from batchgen.job.sections import ModelSpec
from batchgen.models.config import ModelConfig
from batchgen.models.decoder import Decoder
from batchgen.models.loader import load_weights
from batchgen.models.ops import LayerOps
from batchgen.models.registry import load_config, resolve_model
from batchgen.models.rope import cos_sin_table
from tests.parity.tiny_models import FAMILIES, VOCAB_SIZE, Family, save_tiny_model

PROMPT_LENGTHS = (1, 7, 16, 61)
ATOL = 1e-4


@dataclass(frozen=True, kw_only=True)
class DenseBatch:
    """Which sequences a step holds, and how many tokens of each, side by side."""

    sequence_ids: Sequence[int]
    lengths: Sequence[int]


@dataclass
class DenseOps:
    """Plain torch, with every sequence's keys and values in one tensor each."""

    config: ModelConfig
    cos_sin_MH: Tensor
    kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Any:
        return lambda x_TD: functional.linear(x_TD, weight_OD, bias_O)

    @property
    def layer_ops(self) -> LayerOps:
        return self

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return functional.rms_norm(x_TD, weight_D.shape, weight_D, eps)

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> Tensor:
        residual_TD += x_TD
        return self.rms_norm(residual_TD, weight_D, eps)

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        gate, up = gate_up_T2I.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def attention(
        self,
        qkv_TC: Tensor,
        layer: int,
        q_norm_H: Tensor | None,
        k_norm_H: Tensor | None,
        batch: DenseBatch,
        wanted_T: Tensor | None,
    ) -> Tensor:
        outputs = []
        for sequence_id, qkv in zip(
            batch.sequence_ids, qkv_TC.split(list(batch.lengths)), strict=True
        ):
            outputs.append(self._attend_one(qkv, (layer, sequence_id), q_norm_H, k_norm_H))
        attended = torch.cat(outputs)
        return attended if wanted_T is None else attended[wanted_T]

    def _attend_one(
        self,
        qkv_TC: Tensor,
        place: tuple[int, int],
        q_norm_H: Tensor | None,
        k_norm_H: Tensor | None,
    ) -> Tensor:
        config = self.config
        head, num_kv = config.head_dim, config.num_kv_heads
        heads = qkv_TC.view(qkv_TC.shape[0], -1, head)
        q, k, v = heads.split([config.num_heads, num_kv, num_kv], dim=1)
        if q_norm_H is not None and k_norm_H is not None:
            q = self.rms_norm(q, q_norm_H, config.rms_norm_eps)
            k = self.rms_norm(k, k_norm_H, config.rms_norm_eps)
        old_k, old_v = self.kv.get(place, (k[:0], v[:0]))
        num_computed = old_k.shape[0]
        cos_sin = self.cos_sin_MH[num_computed : num_computed + q.shape[0], None]
        k = torch.cat((old_k, _rotate(k, cos_sin)))
        v = torch.cat((old_v, v))
        self.kv[place] = (k, v)
        groups = config.num_heads // num_kv
        scores = torch.einsum("tnh,snh->nts", _rotate(q, cos_sin), k.repeat_interleave(groups, 1))
        query_positions = torch.arange(num_computed, k.shape[0])[:, None]
        future = torch.arange(k.shape[0])[None, :] > query_positions
        weights = (scores / head**0.5).masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("nts,snh->tnh", weights, v.repeat_interleave(groups, 1)).flatten(1)


def _rotate(x_TNH: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin.chunk(2, dim=-1)
    first, second = x_TNH.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def load_decoder(folder: Path) -> tuple[Decoder[DenseBatch], ModelConfig]:
    files = resolve_model(ModelSpec(name_or_path=str(folder)))
    config = load_config(files)
    weights = load_weights(files, config, dtype=torch.float32, device="cpu")
    ops = DenseOps(config, cos_sin_table(config, 128, "cpu"))
    return Decoder(config, weights, ops), config


def ragged_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


@torch.inference_mode()
def assert_logits_match(folder: Path, reference: Any) -> None:
    """Logits of every token of every prompt: all prompts in one step, and again in two steps."""
    prompts = ragged_prompts()
    expected = [reference(torch.tensor([prompt])).logits[0] for prompt in prompts]
    scale = max(float(logits.abs().max()) for logits in expected)
    assert scale > 0.5, "the reference's logits are too flat to show a fault"

    decoder, _ = load_decoder(folder)
    hidden = decoder.forward(
        torch.tensor([token for prompt in prompts for token in prompt]),
        DenseBatch(sequence_ids=range(len(prompts)), lengths=PROMPT_LENGTHS),
    )
    torch.testing.assert_close(decoder.logits(hidden), torch.cat(expected), atol=ATOL, rtol=0)

    decoder, _ = load_decoder(folder)
    ends = torch.tensor(PROMPT_LENGTHS).cumsum(0) - 1
    hidden = decoder.forward(
        torch.tensor([token for prompt in prompts for token in prompt]),
        DenseBatch(sequence_ids=range(len(prompts)), lengths=PROMPT_LENGTHS),
        ends,
    )
    torch.testing.assert_close(decoder.logits(hidden), torch.cat(expected)[ends], atol=ATOL, rtol=0)

    decoder, _ = load_decoder(folder)
    longest, logits = prompts[-1], expected[-1]
    for start, end in ((0, 40), (40, len(longest))):
        hidden = decoder.forward(
            torch.tensor(longest[start:end]), DenseBatch(sequence_ids=[0], lengths=[end - start])
        )
        torch.testing.assert_close(decoder.logits(hidden), logits[start:end], atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_matches_transformers(family: Family, tmp_path: Path) -> None:
    assert_logits_match(tmp_path, save_tiny_model(family, tmp_path))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"rope_parameters": LINEAR_ROPE}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("qwen2", {"rope_parameters": YARN_ROPE}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("smollm", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_each_feature_matches_transformers(
    family: Family, overrides: dict[str, Any], tmp_path: Path
) -> None:
    assert_logits_match(tmp_path, save_tiny_model(family, tmp_path, **overrides))


def test_sharded_safetensors_match_transformers(tmp_path: Path) -> None:
    reference = save_tiny_model("qwen3", tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_logits_match(tmp_path, reference)


def test_tied_embeddings_share_their_storage(tmp_path: Path) -> None:
    save_tiny_model("smollm", tmp_path)
    files = resolve_model(ModelSpec(name_or_path=str(tmp_path)))
    weights = load_weights(files, load_config(files), dtype=torch.float32, device="cpu")
    assert weights.lm_head_VD.data_ptr() == weights.embedding_VD.data_ptr()
