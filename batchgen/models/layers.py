"""A decoder's weights, plain as loaded and packed for a device.

Legend: N query heads, K kv heads, H head size, D hidden, I intermediate, V vocabulary,
C = (N + 2K) * H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from batchgen.models.ops import LayerOps, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer's weights, all in one dtype on one device."""

    input_norm_D: Tensor
    qkv_CD: Tensor  # rows of q, then k, then v
    qkv_bias_C: Tensor | None
    q_norm_H: Tensor | None
    k_norm_H: Tensor | None
    output_DO: Tensor  # O = N * H
    output_bias_D: Tensor | None
    post_attention_norm_D: Tensor
    gate_up_2ID: Tensor  # rows of gate, then up
    gate_up_bias_2I: Tensor | None
    down_DI: Tensor
    down_bias_D: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """A model's weights, for one decoder.

    `layers` makes each layer as it is asked for and is exhausted by the decoder, so that a layer
    whose packing made a copy is freed before the next one is loaded.
    """

    embedding_VD: Tensor
    layers: Iterator[LayerWeights]
    final_norm_D: Tensor
    lm_head_VD: Tensor  # the embedding's own storage when they are tied


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """One layer as functions of the device."""

    input_norm_D: Tensor
    qkv: Linear
    q_norm_H: Tensor | None
    k_norm_H: Tensor | None
    output: Linear
    post_attention_norm_D: Tensor
    gate_up: Linear
    down: Linear


def pack_layer(weights: LayerWeights, ops: LayerOps) -> PackedLayer:
    """Lays one layer's matrices out as the device likes them."""
    return PackedLayer(
        input_norm_D=weights.input_norm_D,
        qkv=ops.pack_linear(weights.qkv_CD, weights.qkv_bias_C),
        q_norm_H=weights.q_norm_H,
        k_norm_H=weights.k_norm_H,
        output=ops.pack_linear(weights.output_DO, weights.output_bias_D),
        post_attention_norm_D=weights.post_attention_norm_D,
        gate_up=ops.pack_linear(weights.gate_up_2ID, weights.gate_up_bias_2I),
        down=ops.pack_linear(weights.down_DI, weights.down_bias_D),
    )
