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
from batchgen.models.ops import Activation, Ops

BatchT = TypeVar("BatchT")


class Decoder(Generic[BatchT]):
    """The model on a device. Holds no state between steps; `ops` owns the KV.

    Both methods launch device work only: no host synchronization, no branch on tensor values, so
    that they can be captured in a CUDA graph.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, ops: Ops[BatchT]) -> None:
        """Packs the weights, and exhausts `weights.layers`. Let go of `weights` after this."""
        self.config = config
        self._ops, self._layer_ops = ops, ops.layer_ops
        self._embedding_VD = weights.embedding_VD
        self._layers = [pack_layer(layer, self._layer_ops) for layer in weights.layers]
        self._final_norm_D = weights.final_norm_D
        self._lm_head = ops.pack_linear(weights.lm_head_VD, None)

    def forward(self, token_ids_T: Tensor, batch: BatchT, wanted_T: Tensor | None = None) -> Tensor:
        """hidden_TD after the final norm, with this step's KV written.

        wanted_T: the tokens whose hidden state is wanted, each the last of its sequence in the
        step; none others leave the last layer's attention. None: all of them.
        """
        ops, eps = self._layer_ops, self.config.rms_norm_eps
        residual_TD = functional.embedding(token_ids_T, self._embedding_VD)
        hidden_TD = ops.rms_norm(residual_TD, self._layers[0].input_norm_D, eps)
        last = len(self._layers) - 1
        for index in range(last):
            attended_TO = self._attention(index, hidden_TD, batch, None)
            out_TD = self._after_attention(index, attended_TO, residual_TD)
            norm_D = self._layers[index + 1].input_norm_D
            hidden_TD = ops.add_rms_norm(out_TD, residual_TD, norm_D, eps)
        attended_TO = self._attention(last, hidden_TD, batch, wanted_T)
        if wanted_T is not None:
            residual_TD = residual_TD[wanted_T]
            if len(residual_TD) == 0:
                return residual_TD
        out_TD = self._after_attention(last, attended_TO, residual_TD)
        return self._ops.add_rms_norm(out_TD, residual_TD, self._final_norm_D, eps)

    def _attention(
        self, index: int, hidden_TD: Activation, batch: BatchT, wanted_T: Tensor | None
    ) -> Tensor:
        layer = self._layers[index]
        qkv_TC = layer.qkv(hidden_TD)
        return self._ops.attention(qkv_TC, index, layer.q_norm_H, layer.k_norm_H, batch, wanted_T)

    def _after_attention(self, index: int, attended_TO: Tensor, residual_TD: Tensor) -> Tensor:
        """What is still to be added to residual_TD; the output of attention is added in place."""
        layer, ops = self._layers[index], self._layer_ops
        hidden_TD = ops.add_rms_norm(
            layer.output(attended_TO),
            residual_TD,
            layer.post_attention_norm_D,
            self.config.rms_norm_eps,
        )
        return layer.down(ops.silu_mul(layer.gate_up(hidden_TD)))

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """logits_BV of the rows given, in the weights' dtype."""
        return self._lm_head(hidden_BD)
