"""Loading weights: fused right, checked before reading, one layer in memory at a time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from batchgen.errors import ModelError
from batchgen.job.sections import ModelSpec
from batchgen.models.config import ModelConfig
from batchgen.models.decoder import Decoder
from batchgen.models.layers import DecoderWeights
from batchgen.models.loader import dummy_weights, load_weights, resolve_dtype, tensor_shapes
from batchgen.models.registry import load_config, resolve_model
from tests.parity.tiny_models import save_tiny_model


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    files = resolve_model(ModelSpec(name_or_path=str(folder)))
    return load_weights(files, load_config(files), dtype=dtype, device="cpu")


def tiny_config(folder: Path, **overrides: Any) -> ModelConfig:
    save_tiny_model("llama", folder, tokenizer=False, **overrides)
    return load_config(resolve_model(ModelSpec(name_or_path=str(folder))))


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors")}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_expected_tensors_are_those_that_transformers_saves(tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "qwen3", "smollm"):
        folder = tmp_path / family
        model = save_tiny_model(family, folder, tokenizer=False)
        config = load_config(resolve_model(ModelSpec(name_or_path=str(folder))))
        saved = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert tensor_shapes(config) == saved


def test_q_k_v_and_gate_up_lie_below_each_other(tmp_path: Path) -> None:
    state = save_tiny_model("qwen2", tmp_path, tokenizer=False).state_dict()
    layer = list(load(tmp_path).layers)[1]
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    qkv = [state[f"{attention}{name}_proj.weight"] for name in "qkv"]
    biases = [state[f"{attention}{name}_proj.bias"] for name in "qkv"]
    assert torch.equal(layer.qkv_CD, torch.cat(qkv))
    assert layer.qkv_bias_C is not None
    assert torch.equal(layer.qkv_bias_C, torch.cat(biases))
    gate_up = [state[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.gate_up_2ID, torch.cat(gate_up))


def test_weights_are_rounded_to_the_dtype_asked_for(tmp_path: Path) -> None:
    state = save_tiny_model("smollm", tmp_path, tokenizer=False).state_dict()
    weights = load(tmp_path, torch.bfloat16)
    assert torch.equal(weights.final_norm_D, state["model.norm.weight"].bfloat16())
    assert {layer.down_DI.dtype for layer in weights.layers} == {torch.bfloat16}


def test_auto_dtype_is_the_one_of_the_config(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, dtype=torch.float16)
    assert resolve_dtype("auto", config) == torch.float16
    assert resolve_dtype("bfloat16", config) == torch.bfloat16


def test_missing_unexpected_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, tokenizer=False)
    rewrite(
        tmp_path,
        **{
            "model.norm.weight": None,
            "model.vision.weight": torch.zeros(2),
            "model.layers.0.mlp.down_proj.weight": torch.zeros(3, 5),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        },
    )
    with pytest.raises(ModelError) as error:
        load(tmp_path)
    message = str(error.value)
    assert "model.norm.weight missing" in message
    assert "model.vision.weight unexpected" in message
    assert "model.layers.0.mlp.down_proj.weight [3, 5] instead of [64, 96] of another" in message
    assert "inv_freq" not in message


def test_a_tied_checkpoint_may_hold_its_head_too(tmp_path: Path) -> None:
    state = save_tiny_model("smollm", tmp_path, tokenizer=False).state_dict()
    rewrite(tmp_path, **{"lm_head.weight": state["lm_head.weight"].clone()})
    weights = load(tmp_path)
    assert weights.lm_head_VD is weights.embedding_VD


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, tokenizer=False)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as safetensors"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, tokenizer=False, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    gone = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / gone).unlink()
    with pytest.raises(ModelError, match=f"the weights {gone} are missing"):
        load(tmp_path)


def test_dummy_weights_are_random_seeded_and_of_the_right_shapes(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, attention_bias=True)
    weights, again, other = (
        dummy_weights(config, dtype=torch.float32, device="cpu", seed=seed) for seed in (1, 1, 2)
    )
    assert weights.lm_head_VD.shape == (config.vocab_size, config.hidden_size)
    assert float(weights.embedding_VD.std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(weights.embedding_VD, again.embedding_VD)
    assert not torch.equal(weights.embedding_VD, other.embedding_VD)
    layer, loaded = next(weights.layers), next(load(tmp_path).layers)
    assert torch.equal(layer.input_norm_D, torch.ones(config.hidden_size))
    assert layer.qkv_bias_C is not None
    assert not layer.qkv_bias_C.any()
    for field in ("qkv_CD", "output_DO", "gate_up_2ID", "down_DI"):
        assert getattr(layer, field).shape == getattr(loaded, field).shape


def test_plain_weights_are_freed_as_they_are_packed(tmp_path: Path) -> None:
    """With a device that packs copies, at most two layers are there twice at any time."""
    config = tiny_config(tmp_path, num_hidden_layers=8)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    peak = 0

    class CopyingOps:
        @property
        def layer_ops(self) -> Any:
            return self

        def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Any:
            nonlocal peak
            alive.add(weight_OD)
            peak = max(peak, len(alive))
            packed_OD = weight_OD.clone()
            return lambda x_TD: x_TD @ packed_OD.T

    ops: Any = CopyingOps()
    weights = dummy_weights(config, dtype=torch.float32, device="cpu")
    decoder = Decoder(config, weights, ops)
    assert peak <= 8  # four matrices a layer; the embedding is not packed
    assert decoder.config is config
