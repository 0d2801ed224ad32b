"""The CUDA backend: Triton kernels, with the matrix products left to cuBLAS.

Nothing here waits for the device or depends on values that it holds, so a whole decode step can be
captured in a graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchgen.engine.config import Quantization
from batchgen.engine.inputs import DecodeBatch, LastTokens, PrefillBatch, SlotState, StepBatch
from batchgen.engine.kv_memory import KVMemory
from batchgen.kernels.copy_block_starts import copy_block_starts
from batchgen.kernels.copy_slots import copy_slots
from batchgen.kernels.fp8 import QuantizedRows
from batchgen.kernels.kv_write import kv_write
from batchgen.kernels.paged_decode import DecodePlan, paged_decode, plan_decode
from batchgen.kernels.paged_prefill import paged_prefill
from batchgen.kernels.penalties import apply_penalties
from batchgen.kernels.quantize import quantize_rows
from batchgen.kernels.rms_norm import add_rms_norm, add_rms_norm_fp8, rms_norm, rms_norm_fp8
from batchgen.kernels.sample import sample
from batchgen.kernels.shared_prefix import merge_attention, shared_prefix
from batchgen.kernels.silu_mul import silu_mul, silu_mul_fp8
from batchgen.kernels.slots import advance_slots, read_slots
from batchgen.models.config import ModelConfig
from batchgen.models.ops import Activation, LayerOps, Linear


class CudaFp8Ops:
    """Implements models.ops.LayerOps: fp8 matrices, with activations quantized as they are made."""

    rms_norm = staticmethod(rms_norm_fp8)
    add_rms_norm = staticmethod(add_rms_norm_fp8)
    silu_mul = staticmethod(silu_mul_fp8)

    def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        """O and D are multiples of 16; y_TO is bf16."""
        weight = quantize_rows(weight_OD)
        weight_DO, scales_1O = weight.values_TD.T, weight.scales_T1.T

        def linear(x_TD: Activation) -> Tensor:
            rows = x_TD if isinstance(x_TD, QuantizedRows) else quantize_rows(x_TD)
            return torch._scaled_mm(
                rows.values_TD,
                weight_DO,
                rows.scales_T1,
                scales_1O,
                bias=bias_O,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        return linear


class CudaOps:
    """Implements engine.ops.EngineOps."""

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    silu_mul = staticmethod(silu_mul)
    apply_penalties = staticmethod(apply_penalties)
    sample = staticmethod(sample)
    read_slots = staticmethod(read_slots)
    advance_slots = staticmethod(advance_slots)
    copy_block_starts = staticmethod(copy_block_starts)

    def __init__(
        self,
        config: ModelConfig,
        memory: KVMemory,
        state: SlotState,
        cos_sin_MH: Tensor,
        quantization: Quantization = None,
    ) -> None:
        self._config = config
        self._memory = memory
        self._state = state
        self._cos_sin_MH = cos_sin_MH
        self._scale = config.head_dim**-0.5
        self._decode_plan: DecodePlan | None = None
        self.layer_ops: LayerOps = CudaFp8Ops() if quantization == "fp8" else self

    def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        def linear(x_TD: Activation) -> Tensor:
            assert isinstance(x_TD, Tensor)
            return F.linear(x_TD, weight_OD, bias_O)

        return linear

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
        wanted_T: Tensor | None,
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
            if batch.slot_copies is not None:
                copy_slots(k_cache_PKSH, v_cache_PKSH, *batch.slot_copies)
            queries: PrefillBatch | LastTokens = batch
            if wanted_T is not None:
                q_TNH, queries = q_TNH[wanted_T], batch.last
                if len(wanted_T) == 0:
                    return q_TNH.flatten(1)
            out_TNH = self._prefill(q_TNH, k_cache_PKSH, v_cache_PKSH, queries)
        else:
            out_TNH = self._decode(q_TNH, k_cache_PKSH, v_cache_PKSH, batch)
        return out_TNH.flatten(1)

    def _prefill(
        self,
        q_TNH: Tensor,
        k_cache_PKSH: Tensor,
        v_cache_PKSH: Tensor,
        queries: PrefillBatch | LastTokens,
    ) -> Tensor:
        """Each sequence's own KV; a prefix is read once for a group's tokens and merged in."""
        table = (k_cache_PKSH, v_cache_PKSH, self._state.block_table_RX)
        sequences = (queries.rows_B, queries.cu_seqlens_q_B1, queries.seq_lens_B)
        groups = queries.groups
        if groups is None:
            return paged_prefill(q_TNH, *table, *sequences, scale=self._scale)
        own_TNH, own_lse_TN = paged_prefill(
            q_TNH,
            *table,
            *sequences,
            scale=self._scale,
            kv_starts_B=groups.kv_starts_B,
            return_lse=True,
        )
        prefix_TNH, prefix_lse_TN = paged_prefill(
            q_TNH,
            *table,
            groups.rows_G,
            groups.cu_seqlens_q_G1,
            groups.prefix_lens_G,
            scale=self._scale,
            is_causal=False,
            return_lse=True,
        )
        return merge_attention(own_TNH, own_lse_TN, prefix_TNH, prefix_lse_TN)

    def _decode(
        self, q_BNH: Tensor, k_cache_PKSH: Tensor, v_cache_PKSH: Tensor, batch: DecodeBatch
    ) -> Tensor:
        """Each sequence's own KV; a prefix is read once for all that share it and merged in."""
        assert self._decode_plan is not None
        prefixes, count = batch.prefixes, batch.max_groups
        if prefixes is None:
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
            prefixes.block_table_GX[:count],
            prefixes.lens_G[:count],
            prefixes.members_B[: len(q_BNH)],
            prefixes.cu_members_G1[: count + 1],
            scale=self._scale,
        )
        return merge_attention(own_BNH, own_lse_BN, prefix_BNH, prefix_lse_BN)
