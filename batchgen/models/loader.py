"""Weights for the decoder: from safetensors, or random ones for benchmarks.

Headers are checked before any data is read; then one layer at a time goes from the memory-mapped
files to the device, so that the peak is the model itself and a layer.

Legend: N query heads, K kv heads, H head size, D hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchgen.errors import ModelError
from batchgen.models.config import ModelConfig
from batchgen.models.families import EMBEDDING, FINAL_NORM, LAYER, LM_HEAD
from batchgen.models.layers import DecoderWeights, LayerWeights
from batchgen.models.registry import ModelFiles, some_of, weight_files

Shape = tuple[int, ...]

_DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_DUMMY_STD: Final = 0.02


class _Source(Protocol):
    """Where tensors come from, on the device and in the dtype of the model."""

    def join(self, shapes: Mapping[str, Shape]) -> Tensor:
        """The tensors of these names below each other, as one contiguous tensor."""
        ...


def resolve_dtype(
    requested: Literal["auto", "bfloat16", "float16", "float32"], config: ModelConfig
) -> torch.dtype:
    """The dtype to compute in; "auto" is the one that the model was saved in."""
    return _DTYPES[config.dtype if requested == "auto" else requested]


def load_weights(
    files: ModelFiles, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
) -> DecoderWeights:
    """The model's own weights, for one decoder.

    Raises `ModelError` for tensors that are missing, left over or of another shape, and for files
    that cannot be read.
    """
    found: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    for path in weight_files(files.folder):
        with _open(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a file, not a dict
                found[name] = path
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    _check_shapes(tensor_shapes(config), shapes, files.folder, tied=config.tie_word_embeddings)
    return _assemble(config, _Files(found, dtype, torch.device(device)))


def dummy_weights(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> DecoderWeights:
    """Random weights made on the device: normal with deviation 0.02, norms 1 and biases 0."""
    return _assemble(config, _Random(dtype, torch.device(device), seed))


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a model folder by its name in transformers."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {
        EMBEDDING: (config.vocab_size, hidden),
        FINAL_NORM: (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        for group in _layer_groups(config).values():
            shapes |= {LAYER.format(layer=layer) + name: shape for name, shape in group.items()}
    return shapes


def weight_bytes(config: ModelConfig, *, dtype: torch.dtype, is_fp8: bool) -> int:
    """What the weights take on a device: with fp8, a byte for each element of a layer's matrices
    and four for each of their rows."""
    dense = quantized = 0
    for name, shape in tensor_shapes(config).items():
        if is_fp8 and len(shape) == 2 and name not in (EMBEDDING, LM_HEAD):
            quantized += shape[0] * (shape[1] + torch.float32.itemsize)
        else:
            dense += math.prod(shape) * dtype.itemsize
    return dense + quantized


def _layer_groups(config: ModelConfig) -> dict[str, dict[str, Shape]]:
    """The tensors of a layer, grouped as the decoder fuses them: field of LayerWeights → group."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head, config.num_kv_heads * head
    qkv = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    gate_up = {"gate_proj": inner, "up_proj": inner}
    groups: dict[str, dict[str, Shape]] = {
        "input_norm_D": {"input_layernorm.weight": (hidden,)},
        "qkv_CD": {f"self_attn.{name}.weight": (rows, hidden) for name, rows in qkv.items()},
        "output_DO": {"self_attn.o_proj.weight": (hidden, q_rows)},
        "post_attention_norm_D": {"post_attention_layernorm.weight": (hidden,)},
        "gate_up_2ID": {f"mlp.{name}.weight": (rows, hidden) for name, rows in gate_up.items()},
        "down_DI": {"mlp.down_proj.weight": (hidden, inner)},
    }
    if config.attention_bias:
        groups["qkv_bias_C"] = {f"self_attn.{name}.bias": (rows,) for name, rows in qkv.items()}
    if config.output_bias:
        groups["output_bias_D"] = {"self_attn.o_proj.bias": (hidden,)}
    if config.qk_norm:
        groups["q_norm_H"] = {"self_attn.q_norm.weight": (head,)}
        groups["k_norm_H"] = {"self_attn.k_norm.weight": (head,)}
    if config.mlp_bias:
        groups["gate_up_bias_2I"] = {f"mlp.{name}.bias": (rows,) for name, rows in gate_up.items()}
        groups["down_bias_D"] = {"mlp.down_proj.bias": (hidden,)}
    return groups


def _assemble(config: ModelConfig, source: _Source) -> DecoderWeights:
    table = (config.vocab_size, config.hidden_size)
    embedding_VD = source.join({EMBEDDING: table})
    return DecoderWeights(
        embedding_VD=embedding_VD,
        layers=_layers(config, source),
        final_norm_D=source.join({FINAL_NORM: (config.hidden_size,)}),
        lm_head_VD=embedding_VD if config.tie_word_embeddings else source.join({LM_HEAD: table}),
    )


def _layers(config: ModelConfig, source: _Source) -> Iterator[LayerWeights]:
    groups = _layer_groups(config)
    for layer in range(config.num_layers):
        prefix = LAYER.format(layer=layer)

        def fused(field: str, prefix: str = prefix) -> Tensor:
            return source.join({prefix + name: shape for name, shape in groups[field].items()})

        def fused_if_any(field: str, prefix: str = prefix) -> Tensor | None:
            return fused(field, prefix) if field in groups else None

        yield LayerWeights(
            input_norm_D=fused("input_norm_D"),
            qkv_CD=fused("qkv_CD"),
            qkv_bias_C=fused_if_any("qkv_bias_C"),
            q_norm_H=fused_if_any("q_norm_H"),
            k_norm_H=fused_if_any("k_norm_H"),
            output_DO=fused("output_DO"),
            output_bias_D=fused_if_any("output_bias_D"),
            post_attention_norm_D=fused("post_attention_norm_D"),
            gate_up_2ID=fused("gate_up_2ID"),
            gate_up_bias_2I=fused_if_any("gate_up_bias_2I"),
            down_DI=fused("down_DI"),
            down_bias_D=fused_if_any("down_bias_D"),
        )


def _empty(shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = sum(shape[0] for shape in shapes.values())
    columns = next(iter(shapes.values()))[1:]
    return torch.empty((rows, *columns), dtype=dtype, device=device)


class _Files:
    """Tensors of safetensors files, copied out of the mapping into the device's memory."""

    def __init__(
        self, path_of: Mapping[str, Path], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._path_of = path_of
        self._dtype = dtype
        self._device = device

    def join(self, shapes: Mapping[str, Shape]) -> Tensor:
        joined = _empty(shapes, self._dtype, self._device)
        start = 0
        for name, shape in shapes.items():
            with _open(self._path_of[name]) as tensors:
                joined[start : start + shape[0]].copy_(tensors.get_tensor(name))
            start += shape[0]
        return joined


class _Random:
    """Random tensors, made on the device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def join(self, shapes: Mapping[str, Shape]) -> Tensor:
        joined = _empty(shapes, self._dtype, self._device)
        name = next(iter(shapes))
        if name.endswith("norm.weight"):
            return joined.fill_(1.0)
        if name.endswith(".bias"):
            return joined.zero_()
        return joined.normal_(std=_DUMMY_STD, generator=self._generator)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error


def _check_shapes(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], folder: Path, *, tied: bool
) -> None:
    missing = [name for name in expected if name not in found]
    # Old checkpoints store RoPE's frequencies, and some tied ones the same matrix twice.
    unexpected = [
        name
        for name in found
        if name not in expected
        and not (tied and name == LM_HEAD)
        and not name.endswith("rotary_emb.inv_freq")
    ]
    other_shape = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": other_shape}
    if any(problems.values()):
        raise ModelError(
            f"{folder}: the weights are not those of its config.json: "
            + "; ".join(f"{some_of(names)} {what}" for what, names in problems.items() if names)
        )
