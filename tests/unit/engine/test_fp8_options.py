"""fp8 from the job file or `bench` to the engine: options, memory, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from batchgen.commands.bench import bench_spec
from batchgen.engine.build import build_engine
from batchgen.engine.config import EngineOptions, SamplingOptions
from batchgen.engine.from_job import engine_options
from batchgen.engine.kv_memory import KVMemory, block_bytes
from batchgen.errors import UnsupportedError, UsageError
from batchgen.kernels import reference
from batchgen.kernels.fp8 import FP8
from batchgen.models.config import ModelConfig, parse_config
from batchgen.models.loader import dummy_weights, weight_bytes

BF16 = torch.bfloat16


def config(**changes: Any) -> ModelConfig:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return parse_config(values | changes, source="config.json")


def test_both_keys_reach_the_engine() -> None:
    spec = bench_spec("m", [])
    assert engine_options(spec.engine, spec.model) == EngineOptions()
    spec = bench_spec("m", ["model.quantization=fp8", "engine.kv_cache_dtype=fp8"])
    expected = EngineOptions(quantization="fp8", kv_cache_dtype="fp8")
    assert engine_options(spec.engine, spec.model) == expected


def test_bench_takes_keys_of_engine_and_model() -> None:
    spec = bench_spec("m", ["max_num_seqs=4", "engine.block_size=8", "model.dtype=float32"])
    assert (spec.engine.max_num_seqs, spec.engine.block_size) == (4, 8)
    assert (spec.model.name_or_path, spec.model.dtype) == ("m", "float32")


@pytest.mark.parametrize(
    ("override", "error", "text"),
    [
        ("model.quantization=int8", UnsupportedError, "-o model.quantization: not built yet"),
        ("kv_cache_dtype=int8", UnsupportedError, "-o engine.kv_cache_dtype: not built yet"),
        ("tensor_parallel_size=2", UnsupportedError, "-o engine.tensor_parallel_size: not built"),
        ("max_num_seqs=lots", UsageError, "-o engine.max_num_seqs: should be 'auto' or a whole"),
        ("max_nums=1", UsageError, "-o engine.max_nums: unknown key; did you mean"),
        ("sampling.n=2", UsageError, "a key of engine or model"),
        ("max_num_seqs", UsageError, "should be key=value"),
    ],
)
def test_bench_refuses_by_name(override: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        bench_spec("m", [override])
    assert text in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tie_word_embeddings": True}])
def test_weight_bytes_are_those_of_the_tensors(changes: dict[str, Any]) -> None:
    model = config(**changes)
    weights = dummy_weights(model, dtype=BF16, device="cpu")
    dense, quantized = weights.embedding_VD.nbytes + weights.final_norm_D.nbytes, 0
    dense += 0 if model.tie_word_embeddings else weights.lm_head_VD.nbytes
    matrices = 0
    for layer in weights.layers:
        for field in dataclasses.fields(layer):
            tensor = getattr(layer, field.name)
            if tensor is not None and tensor.ndim == 2:
                rows = reference.quantize_rows(tensor)
                quantized += rows.values_TD.nbytes + rows.scales_T1.nbytes
                matrices += tensor.nbytes
            elif tensor is not None:
                dense += tensor.nbytes
    assert weight_bytes(model, dtype=BF16, is_fp8=False) == dense + matrices
    assert weight_bytes(model, dtype=BF16, is_fp8=True) == dense + quantized


def test_a_block_in_fp8_is_half_of_one_in_bf16() -> None:
    model = config()
    memory = KVMemory(model, num_blocks=5, block_size=8, dtype=FP8, device=torch.device("cpu"))
    assert memory.kv_PL2KSH.nbytes == 5 * block_bytes(model, 8, FP8)
    assert 2 * block_bytes(model, 8, FP8) == block_bytes(model, 8, BF16)


@pytest.mark.parametrize(
    ("changes", "options", "capability", "text"),
    [
        ({}, {"quantization": "fp8"}, (8, 0), "model.quantization=fp8: A GPU has compute"),
        ({}, {"kv_cache_dtype": "fp8"}, (8, 6), "engine.kv_cache_dtype=fp8: A GPU has compute"),
        ({"dtype": "float16"}, {"quantization": "fp8"}, (9, 0), "model.dtype=bfloat16"),
        ({"intermediate_size": 100}, {"quantization": "fp8"}, (9, 0), "intermediate size is 100"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_before_weights_are_read(
    changes: dict[str, Any],
    options: dict[str, Any],
    capability: tuple[int, int],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    with pytest.raises(UsageError) as caught:
        build_engine(
            config(**changes),
            None,
            EngineOptions(device="cuda", num_gpu_blocks=9, **options),
            SamplingOptions(),
            decode=None,
        )
    assert text in str(caught.value)
