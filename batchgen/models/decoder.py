"""The one decoder of every family: a pre-norm transformer with fused projections.

    h = embedding
    of each layer:  h += output(attention(qkv(norm(h))));  h += down(silu_mul(gate_up(norm(h))))
    logits = lm_head(norm(h))

Legend: T tokens of a step, B rows whose next token is wanted, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor
from torch.nn import functional

from batchgen.models.config import ModelConfig
from batchgen.models.layers import DecoderWeights, pack_layer
from batchgen.models.ops import Ops

BatchT = TypeVar("BatchT")


class Decoder(Generic[BatchT]):
    """The model on a device. Holds no state between steps; `ops` owns the KV.

    Both methods launch device work only: no host synchronization, no branch on tensor values, so
    that they can be captured in a CUDA graph.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, ops: Ops[BatchT]) -> None:
        """Packs the weights, and exhausts `weights.layers`. Let go of `weights` after this."""
        self.config = config
        self._ops = ops
        self._embedding_VD = weights.embedding_VD
        self._layers = [pack_layer(layer, ops) for layer in weights.layers]
        self._final_norm_D = weights.final_norm_D
        self._lm_head = ops.pack_linear(weights.lm_head_VD, None)

    def forward(self, token_ids_T: Tensor, batch: BatchT) -> Tensor:
        """hidden_TD after the final norm, with this step's KV written."""
        ops, eps = self._ops, self.config.rms_norm_eps
        residual_TD = functional.embedding(token_ids_T, self._embedding_VD)
        hidden_TD = ops.rms_norm(residual_TD, self._layers[0].input_norm_D, eps)
        following_norms = [layer.input_norm_D for layer in self._layers[1:]] + [self._final_norm_D]
        for index, (layer, next_norm_D) in enumerate(
            zip(self._layers, following_norms, strict=True)
        ):
            attended_TO = ops.attention(
                layer.qkv(hidden_TD), index, layer.q_norm_H, layer.k_norm_H, batch
            )
            hidden_TD = ops.add_rms_norm(
                layer.output(attended_TO), residual_TD, layer.post_attention_norm_D, eps
            )
            activated_TI = ops.silu_mul(layer.gate_up(hidden_TD))
            hidden_TD = ops.add_rms_norm(layer.down(activated_TI), residual_TD, next_norm_D, eps)
        return hidden_TD

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """logits_BV of the rows given, in the weights' dtype."""
        return self._lm_head(hidden_BD)
