"""The CUDA backend: Triton kernels, with the matrix products left to cuBLAS.

Nothing here waits for the device or depends on values that it holds, so a whole decode step can be
captured in a graph.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from batchgen.engine.inputs import DecodeBatch, PrefillBatch, SlotState, StepBatch
from batchgen.engine.kv_memory import KVMemory
from batchgen.kernels.kv_write import kv_write
from batchgen.kernels.paged_decode import DecodePlan, paged_decode, plan_decode
from batchgen.kernels.paged_prefill import paged_prefill
from batchgen.kernels.penalties import apply_penalties
from batchgen.kernels.rms_norm import add_rms_norm, rms_norm
from batchgen.kernels.sample import sample
from batchgen.kernels.shared_prefix import merge_attention, shared_prefix
from batchgen.kernels.silu_mul import silu_mul
from batchgen.models.config import ModelConfig
from batchgen.models.ops import Linear


class CudaOps:
    """Implements engine.ops.EngineOps."""

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    silu_mul = staticmethod(silu_mul)
    apply_penalties = staticmethod(apply_penalties)
    sample = staticmethod(sample)

    def __init__(
        self, config: ModelConfig, memory: KVMemory, state: SlotState, cos_sin_MH: Tensor
    ) -> None:
        self._config = config
        self._memory = memory
        self._state = state
        self._cos_sin_MH = cos_sin_MH
        self._scale = config.head_dim**-0.5
        self._decode_plan: DecodePlan | None = None

    def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        return lambda x_TD: F.linear(x_TD, weight_OD, bias_O)

    def begin_step(self, batch: StepBatch) -> None:
        """Cuts the KV of a decode step into equal pieces of work, once for all layers."""
        if isinstance(batch, DecodeBatch):
            self._decode_plan = plan_decode(
                batch.seq_lens_B,
                batch.kv_starts_B,
                num_kv_heads=self._config.num_kv_heads,
            )

    def attention(
        self,
        qkv_TC: Tensor,
        layer: int,
        q_norm_H: Tensor | None,
        k_norm_H: Tensor | None,
        batch: StepBatch,
    ) -> Tensor:
        k_cache_PKSH, v_cache_PKSH = self._memory.layer(layer)
        q_TNH = kv_write(
            qkv_TC,
            self._cos_sin_MH,
            batch.positions_T,
            batch.slot_mapping_T,
            k_cache_PKSH,
            v_cache_PKSH,
            num_q_heads=self._config.num_heads,
            q_norm_H=q_norm_H,
            k_norm_H=k_norm_H,
            eps=self._config.rms_norm_eps,
        )
        if isinstance(batch, PrefillBatch):
            out_TNH = paged_prefill(
                q_TNH,
                k_cache_PKSH,
                v_cache_PKSH,
                self._state.block_table_RX,
                batch.rows_B,
                batch.cu_seqlens_q_B1,
                batch.seq_lens_B,
                scale=self._scale,
            )
        else:
            out_TNH = self._decode(q_TNH, k_cache_PKSH, v_cache_PKSH, batch)
        return out_TNH.view(len(q_TNH), -1)

    def _decode(
        self, q_BNH: Tensor, k_cache_PKSH: Tensor, v_cache_PKSH: Tensor, batch: DecodeBatch
    ) -> Tensor:
        """Each sequence's own KV; a shared prefix is read once for all and merged in."""
        assert self._decode_plan is not None
        prefix, size = batch.prefix, len(q_BNH)
        if prefix is None:
            return paged_decode(
                q_BNH,
                k_cache_PKSH,
                v_cache_PKSH,
                self._state.block_table_RX,
                batch.rows_B,
                batch.seq_lens_B,
                self._decode_plan,
                scale=self._scale,
            )
        own_BNH, own_lse_BN = paged_decode(
            q_BNH,
            k_cache_PKSH,
            v_cache_PKSH,
            self._state.block_table_RX,
            batch.rows_B,
            batch.seq_lens_B,
            self._decode_plan,
            scale=self._scale,
            kv_starts_B=batch.kv_starts_B,
            return_lse=True,
        )
        prefix_BNH, prefix_lse_BN = shared_prefix(
            q_BNH,
            k_cache_PKSH,
            v_cache_PKSH,
            prefix.block_table_1X,
            prefix.len_1,
            prefix.members_B[:size],
            prefix.cu_members[size],
            scale=self._scale,
        )
        return merge_attention(own_BNH, own_lse_BN, prefix_BNH, prefix_lse_BN)
