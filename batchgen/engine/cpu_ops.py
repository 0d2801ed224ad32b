"""The CPU backend.

Linear layers use oneDNN with weights packed once (about a tenth faster than F.linear at the batch
sizes of decode, more at small ones). In bf16 the small operations and decode attention are those of
`kernels.native`, which reads paged KV where it lies. Without it, and for prefill, torch ops:
attention gathers the blocks of a group of sequences of like length, small enough for the cache, and
calls torch's flash attention; the query heads that share a kv head stand as further query rows.

Legend: T tokens, B sequences, N query heads, K kv heads, G = N / K, H head size, P blocks,
S block size, X blocks of a table row, Q queries and L keys of the longest sequence of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from batchgen.engine.config import Quantization
from batchgen.engine.inputs import DecodeBatch, PrefillBatch, SlotState, StepBatch
from batchgen.engine.kv_memory import KVMemory
from batchgen.kernels import native, reference
from batchgen.kernels.fp8 import FP8, QuantizedRows
from batchgen.models.config import ModelConfig
from batchgen.models.ops import Activation, LayerOps, Linear

GROUP_TOKENS = 8192  # padded KV tokens of a group: its keys and values of a layer stay in cache

NATIVE_PREFILL_TOKENS = 512  # the longest context that native attention prefills
# With fewer rows oneDNN and MKL sum in another order (seen on two and one threads), and a row's
# tokens would depend on how many others are in its batch: zeros fill up.
MIN_ROWS_BF16 = 2
MIN_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Sequences that are attended together, padded to one shape."""

    gather_BQ: Tensor  # token of the step at each query place (padding repeats a valid one)
    scatter_T: Tensor  # places, flattened over B and Q, that hold tokens
    tokens_T: Tensor  # and which tokens these are
    blocks_BX: Tensor  # int64
    mask_B1QL: Tensor  # additive, in the dtype of the queries


def _fill_up(x_TD: Tensor, min_rows: int) -> Tensor:
    """x_TD, with rows of zeros below it where it has some, but fewer than `min_rows`."""
    if not 0 < len(x_TD) < min_rows:
        return x_TD
    return F.pad(x_TD, (0, 0, 0, min_rows - len(x_TD)))


class CpuFp8Ops:
    """Implements models.ops.LayerOps by what fp8 means: saves memory here, and no time."""

    def __init__(self, dense: LayerOps) -> None:
        self._dense = dense

    def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        weight, dtype = reference.quantize_rows(weight_OD), weight_OD.dtype

        def linear(x_TD: Activation) -> Tensor:
            rows = _quantized(x_TD)
            padded = QuantizedRows(
                values_TD=_fill_up(rows.values_TD.view(torch.uint8), MIN_ROWS).view(FP8),
                scales_T1=_fill_up(rows.scales_T1, MIN_ROWS),
            )
            y_TO = reference.scaled_linear(padded, weight, bias_O, dtype)
            return y_TO[: len(rows.values_TD)]

        return linear

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> QuantizedRows:
        return _quantized(self._dense.rms_norm(x_TD, weight_D, eps))

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> QuantizedRows:
        return _quantized(self._dense.add_rms_norm(x_TD, residual_TD, weight_D, eps))

    def silu_mul(self, gate_up_T2I: Tensor) -> QuantizedRows:
        return _quantized(self._dense.silu_mul(gate_up_T2I))


class CpuOps:
    """Implements engine.ops.EngineOps."""

    read_slots = staticmethod(reference.read_slots)
    advance_slots = staticmethod(reference.advance_slots)
    copy_block_starts = staticmethod(reference.copy_block_starts)

    def __init__(
        self,
        config: ModelConfig,
        memory: KVMemory,
        state: SlotState,
        cos_sin_MH: Tensor,
        dtype: torch.dtype,
        quantization: Quantization = None,
    ) -> None:
        self._config = config
        self._memory = memory
        self._state = state
        self._cos_sin_MH = cos_sin_MH
        self._dtype = dtype
        # Row ((p * L + l) * 2 + kv) * K + k of this view is one head of one block.
        self._heads_FZ = memory.kv_PL2KSH.view(-1, memory.block_size * config.head_dim)
        self._groups: list[_Group] = []
        self._native_rows: tuple[Tensor, Tensor] | None = None
        self._is_native = native.library() is not None and native.supports(
            self._dtype,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_dim,
        )
        self._is_native_kv = self._is_native and memory.kv_PL2KSH.dtype == dtype
        self.layer_ops: LayerOps = CpuFp8Ops(self) if quantization == "fp8" else self

    # -- what a decoder asks -------------------------------------------------------------------

    def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        is_packed = weight_OD.dtype == torch.bfloat16
        if is_packed:
            weight_OD = torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), 256)

        min_rows = MIN_ROWS_BF16 if is_packed else MIN_ROWS

        def linear(x_TD: Activation) -> Tensor:
            assert isinstance(x_TD, Tensor)
            padded = _fill_up(x_TD, min_rows)
            y_TO: Tensor
            if is_packed:
                y_TO = torch.ops.mkldnn._linear_pointwise(padded, weight_OD, bias_O, "none", [], "")
            else:
                y_TO = F.linear(padded, weight_OD, bias_O)
            return y_TO[: len(x_TD)]

        return linear

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if self._is_native:
            return native.rms_norm(x_TD, weight_D, eps)
        return reference.rms_norm(x_TD, weight_D, eps)

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> Tensor:
        if self._is_native:
            return native.rms_norm(x_TD, weight_D, eps, residual_TD)
        return reference.add_rms_norm(x_TD, residual_TD, weight_D, eps)

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        if self._is_native:
            return native.silu_mul(gate_up_T2I)
        return reference.silu_mul(gate_up_T2I)

    def begin_step(self, batch: StepBatch) -> None:
        self._groups = []
        self._native_rows = self._rows_for_native(batch)
        if self._native_rows is not None:
            return
        if isinstance(batch, PrefillBatch):
            query_lens, seq_lens = batch.query_lens, batch.seq_lens
        else:
            seq_lens = batch.seq_lens_B.numpy()
            query_lens = np.minimum(seq_lens, 1)
        rows = batch.rows_B.numpy()
        self._groups = [
            self._make_group(index, rows, query_lens, seq_lens)
            for index in _group_by_length(query_lens, seq_lens)
        ]

    def attention(
        self,
        qkv_TC: Tensor,
        layer: int,
        q_norm_H: Tensor | None,
        k_norm_H: Tensor | None,
        batch: StepBatch,
        wanted_T: Tensor | None,
    ) -> Tensor:
        config = self._config
        k_cache_PKSH, v_cache_PKSH = self._memory.layer(layer)
        kv_write = native.kv_write if self._is_native_kv else reference.kv_write
        q_TNH = kv_write(
            qkv_TC,
            self._cos_sin_MH,
            batch.positions_T,
            batch.slot_mapping_T,
            k_cache_PKSH,
            v_cache_PKSH,
            num_q_heads=config.num_heads,
            q_norm_H=q_norm_H,
            k_norm_H=k_norm_H,
            eps=config.rms_norm_eps,
        )
        if isinstance(batch, PrefillBatch) and batch.slot_copies is not None:
            reference.copy_slots(k_cache_PKSH, v_cache_PKSH, *batch.slot_copies)
        if self._native_rows is not None:
            rows_T, kv_lens_T = self._native_rows
            if wanted_T is not None:
                q_TNH, rows_T, kv_lens_T = (x[wanted_T] for x in (q_TNH, rows_T, kv_lens_T))
            table_RX = self._state.block_table_RX
            out_TNH = native.paged_decode(
                q_TNH,
                k_cache_PKSH,
                v_cache_PKSH,
                table_RX,
                rows_T,
                kv_lens_T,
                scale=config.head_dim**-0.5,
            )
            return out_TNH.flatten(1)
        out_TNH = torch.zeros_like(q_TNH)
        for group in self._groups:
            self._attend(group, q_TNH, out_TNH, layer)
        if wanted_T is not None:
            out_TNH = out_TNH[wanted_T]
        return out_TNH.flatten(1)

    # -- attention -----------------------------------------------------------------------------

    def _rows_for_native(self, batch: StepBatch) -> tuple[Tensor, Tensor] | None:
        """The slot row of each token, and how many tokens it sees, where native attention serves.

        A token of a prompt is to it what a token of decode is: a query over the KV up to itself.
        That beats the gathers of short prompts; long ones are better off with tiles of queries.
        """
        if not self._is_native_kv:
            return None
        if isinstance(batch, DecodeBatch):
            return batch.rows_B, batch.seq_lens_B
        if batch.seq_lens.max() > NATIVE_PREFILL_TOKENS:
            return None
        rows_T = torch.from_numpy(np.repeat(batch.rows_B.numpy(), batch.query_lens))
        return rows_T, batch.positions_T + 1

    def _attend(self, group: _Group, q_TNH: Tensor, out_TNH: Tensor, layer: int) -> None:
        config = self._config
        K, H = config.num_kv_heads, config.head_dim
        B, Q = group.gather_BQ.shape
        G = config.num_heads // K
        q_BKgH = (
            q_TNH[group.gather_BQ]
            .view(B, Q, K, G, H)
            .permute(0, 2, 3, 1, 4)
            .reshape(B, K, G * Q, H)
        )
        first_k = layer * 2 * K
        heads_K1 = torch.arange(K)[:, None]
        rows_BKX = group.blocks_BX[:, None, :] * (config.num_layers * 2 * K) + heads_K1 + first_k
        flat = rows_BKX.view(-1)
        keys = self._heads_FZ.index_select(0, flat).view(B, K, -1, H).to(self._dtype)
        values = self._heads_FZ.index_select(0, flat + K).view(B, K, -1, H).to(self._dtype)
        mask = group.mask_B1QL.repeat(1, 1, G, 1) if Q > 1 else group.mask_B1QL.expand(B, 1, G, -1)
        out_BKgH = F.scaled_dot_product_attention(q_BKgH, keys, values, attn_mask=mask)
        out_BQNH = out_BKgH.view(B, K, G, Q, H).permute(0, 3, 1, 2, 4).reshape(B * Q, K * G, H)
        out_TNH[group.tokens_T] = out_BQNH[group.scatter_T]

    def _make_group(
        self,
        index: NDArray[np.int64],
        rows: NDArray[np.int32],
        query_lens: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
    ) -> _Group:
        starts = np.cumsum(np.maximum(query_lens, 1)) - np.maximum(query_lens, 1)
        queries, keys = query_lens[index], seq_lens[index]
        Q = int(queries.max())
        X = -(-int(keys.max()) // self._memory.block_size)
        place = np.arange(Q)
        gather = starts[index][:, None] + np.minimum(place, queries[:, None] - 1)
        is_token = place < queries[:, None]
        position = (keys - queries)[:, None] + place
        key = np.arange(X * self._memory.block_size)
        visible = key[None, None, :] <= np.minimum(position, keys[:, None] - 1)[:, :, None]
        blocks = self._state.block_table_RX[torch.from_numpy(rows[index].astype(np.int64)), :X]
        held = np.arange(X) * self._memory.block_size < keys[:, None]
        mask = torch.from_numpy(np.where(visible, 0.0, -np.inf).astype(np.float32))
        return _Group(
            gather_BQ=torch.from_numpy(gather),
            scatter_T=torch.from_numpy(np.flatnonzero(is_token)),
            tokens_T=torch.from_numpy(gather[is_token]),
            blocks_BX=torch.where(torch.from_numpy(held), blocks.long(), blocks[:, :1].long()),
            mask_B1QL=mask[:, None].to(self._dtype),
        )

    # -- what a sampler asks -------------------------------------------------------------------

    def apply_penalties(
        self,
        logits_BV: Tensor,
        rows_B: Tensor,
        counts_RV: Tensor,
        in_prompt_RV: Tensor,
        *,
        presence: float,
        frequency: float,
        repetition: float,
    ) -> None:
        reference.apply_penalties(
            logits_BV,
            rows_B,
            counts_RV,
            in_prompt_RV,
            presence=presence,
            frequency=frequency,
            repetition=repetition,
        )

    def sample(
        self,
        logits_BV: Tensor,
        seeds_B: Tensor,
        positions_B: Tensor,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
    ) -> Tensor:
        if temperature == 0.0 and self._is_native:
            return native.argmax(logits_BV)
        return reference.sample(
            logits_BV,
            seeds_B,
            positions_B,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )


def _quantized(x_TD: Activation) -> QuantizedRows:
    return x_TD if isinstance(x_TD, QuantizedRows) else reference.quantize_rows(x_TD)


def _group_by_length(
    query_lens: NDArray[np.int32], seq_lens: NDArray[np.int32]
) -> list[NDArray[np.int64]]:
    """Cuts the sequences, sorted by length, where padding or the cache would be exceeded."""
    order = np.lexsort((seq_lens, query_lens))[::-1]
    order = order[seq_lens[order] > 0]
    groups: list[NDArray[np.int64]] = []
    start = 0
    for end in range(1, len(order) + 1):
        members = order[start : end + 1]
        if (
            end == len(order)
            or len(members) * int(seq_lens[members].max()) > GROUP_TOKENS
            or 2 * query_lens[order[end]] < query_lens[order[start]]
            or 2 * seq_lens[order[end]] < int(seq_lens[members].max())
        ):
            groups.append(order[start:end])
            start = end
    return groups
