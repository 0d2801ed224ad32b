"""The only plain torch reference of each kernel; the CPU backend samples with it, too.

T tokens, B sequences (batch rows), R slots, N query heads, K kv heads, H head size, D hidden,
I intermediate, V vocabulary, P blocks, S block size, C columns of a fused matrix, M positions,
X blocks of a table row, G groups, W tiles of a vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from batchgen.kernels.fp8 import FP8, FP8_MAX, MIN_AMAX, QuantizedRows

# ---- element-wise and sampling ------------------------------------------------------------------

# A sampler's tile: runs of neighbouring tokens, each BLOCK_TILES runs from the next.
TILE_RUN = 8
TILE_RUNS = 8
TILE_SIZE = TILE_RUN * TILE_RUNS
BLOCK_TILES = 128
MAX_DRAWS = 1 << 14  # of one row; that so many are dropped is less likely than 1e-99

_ROWS_PER_TASK = 8
_FEW_CANDIDATES = (1024, 8192)  # top_p sorts that many of the largest logits before it sorts all


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) in fp32, rounded before and after the weight."""
    x_fp32 = x_TD.float()
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return weight_D * (x_fp32 * scale).to(x_TD.dtype)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`residual_TD += x_TD` in place, then the norm of the rounded sum."""
    residual_TD += x_TD
    return rms_norm(residual_TD, weight_D, eps)


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up, with silu in fp32 and rounded before the product. Returns [T, I]."""
    gate, up = gate_up_T2I.chunk(2, dim=-1)
    gate_fp32 = gate.float()
    return (gate_fp32 * torch.sigmoid(gate_fp32)).to(gate.dtype) * up


def to_fp8(x: Tensor) -> Tensor:
    """x in fp8, saturated: torch's cast alone gives NaN above 464 in some versions."""
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(FP8)


def quantize_rows(x_TD: Tensor) -> QuantizedRows:
    """Rows in fp8 whose largest magnitude is 448 times their scale."""
    x_fp32 = x_TD.float()
    amax_T1 = x_fp32.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX)
    return QuantizedRows(
        values_TD=to_fp8(x_fp32 * (FP8_MAX / amax_T1)), scales_T1=amax_T1 * (1.0 / FP8_MAX)
    )


def scaled_linear(
    rows: QuantizedRows, weight: QuantizedRows, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The linear layer of what two quantized matrices stand for, in fp32; rounded once."""
    y_TO = rows.values_TD.float() @ weight.values_TD.float().T
    y_TO *= rows.scales_T1 * weight.scales_T1.T
    if bias_O is not None:
        y_TO += bias_O
    return y_TO.to(dtype)


def rotate(x_TNH: Tensor, cos_sin_MH: Tensor, positions_T: Tensor) -> Tensor:
    """Rotary embedding in fp32: halves (a, b) of a head become (a c - b s, b c + a s)."""
    cos, sin = cos_sin_MH[positions_T.long(), None].chunk(2, dim=-1)
    a, b = x_TNH.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_TNH.dtype)


def kv_write(
    qkv_TC: Tensor,
    cos_sin_MH: Tensor,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    *,
    num_q_heads: int,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Norms and rotates queries and keys, writes keys and values, returns q_TNH."""
    _, num_kv_heads, block_size, head_size = k_cache_PKSH.shape
    heads = qkv_TC.unflatten(-1, (-1, head_size))
    q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm_H is not None and k_norm_H is not None:
        q, k = rms_norm(q, q_norm_H, eps), rms_norm(k, k_norm_H, eps)
    has_slot = slot_mapping_T >= 0
    slots = slot_mapping_T[has_slot]
    blocks, offsets = slots // block_size, slots % block_size
    k, v = rotate(k, cos_sin_MH, positions_T)[has_slot], v[has_slot]
    if k_cache_PKSH.dtype == FP8:
        k, v = to_fp8(k), to_fp8(v)
    k_cache_PKSH[blocks, :, offsets] = k
    v_cache_PKSH[blocks, :, offsets] = v
    return rotate(q, cos_sin_MH, positions_T)


def _mix64(z: Tensor) -> Tensor:
    # splitmix64's finalizer; int64 has no logical shift, hence the masks.
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def noise_keys(seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """The int64 key of each row's first draw: all that its randomness depends on."""
    return _mix64(_mix64(seeds_B) + positions_B.long() * -0x61C8864680B583EB)


def next_noise_keys(keys_B: Tensor) -> Tensor:
    """The key of each row's draw after one that was dropped."""
    return _mix64(keys_B - 0x61C8864680B583EB)


def noise_bits(keys_B: Tensor, counters_C: Tensor) -> Tensor:
    """31 random bits for each row and counter (int32: a token id, or -1 - tile): int32, [B, C]."""
    keys_B1 = keys_B[:, None]
    x = counters_C ^ keys_B1.to(torch.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = x ^ (keys_B1 >> 32).to(torch.int32)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ (x >> 16)


def log_exponential(bits: Tensor) -> Tensor:
    """log(E), E = -log(1 - u), with u = (bits + 0.5) / 2^31 kept below one: minus a Gumbel."""
    return bits.float().add_(0.5).mul_(2.0**-55 - 2.0**-31).log1p_().neg_().log_()


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """The settings of sampling; by default each but the temperature is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def keep_thresholds(x_V: Tensor, filters: Filters) -> tuple[float, float]:
    """The logits at and above which a token is kept: by top_k and min_p; by these and top_p."""
    temperature = filters.temperature
    row_max = float(x_V.amax())
    threshold = -math.inf
    if 0 < filters.top_k < len(x_V):
        threshold = float(x_V.topk(filters.top_k).values[-1])
    top_p_threshold = threshold
    if filters.top_p < 1.0:
        kept = x_V if threshold == -math.inf else x_V[x_V >= threshold]
        target = filters.top_p * float(_mass(kept, row_max, temperature).sum())
        for num_candidates in (*_FEW_CANDIDATES, len(kept)):
            largest = kept.topk(min(num_candidates, len(kept))).values
            mass = _mass(largest, row_max, temperature)
            cumulated = mass.cumsum(0)
            if float(cumulated[-1]) >= target:
                break
        # A token stays while the mass of those above it falls short of the target.
        num_kept = int((cumulated - mass < target).sum())
        top_p_threshold = float(largest[max(num_kept, 1) - 1])
    if filters.min_p > 0.0:
        threshold = max(threshold, row_max + temperature * math.log(filters.min_p))
    return threshold, max(threshold, top_p_threshold)


def _mass(x: Tensor, row_max: float, temperature: float) -> Tensor:
    return (x - row_max).div_(temperature).exp_()


class _RowSampler:
    """Draws row after row in one thread; owns that thread's buffers, of a row each.

    Fresh memory for every operation would double the time of a draw.
    """

    def __init__(self, vocabulary: int, filters: Filters, device: torch.device) -> None:
        self._filters = filters
        num_blocks = -(-vocabulary // (BLOCK_TILES * TILE_SIZE))
        self._shape = (num_blocks, TILE_RUNS, BLOCK_TILES, TILE_RUN)
        size = math.prod(self._shape)
        self._token_ids = torch.arange(size, dtype=torch.int32, device=device).view(self._shape)
        self._counters_W = -1 - self._token_ids.view(-1)[: size // TILE_SIZE]
        self._row = torch.full((size,), -torch.inf, device=device)
        self._weights = torch.empty((size,), device=device)

    def draw(self, logits_V: Tensor, key: Tensor) -> int:
        """A token id. `key` is of shape [1]."""
        x_V = self._row[: len(logits_V)]
        torch.nan_to_num(logits_V.float(), -torch.inf, torch.inf, -torch.inf, out=x_V)
        row_max = float(x_V.amax())
        temperature = self._filters.temperature
        if temperature == 0.0 or math.isinf(row_max):
            return int(x_V.argmax())
        lowest, threshold = keep_thresholds(x_V, self._filters)
        maxima_W = self._over_tiles(self._row, torch.amax)
        torch.sub(self._row, row_max, out=self._weights).mul_(1.0 / temperature).exp_()
        log_sums_W = self._over_tiles(self._weights, torch.sum).log_()
        log_sums_W.mul_(temperature).add_(row_max).masked_fill_(maxima_W < lowest, -torch.inf)
        token = 0
        for _ in range(MAX_DRAWS):
            tile = self._best(log_sums_W, self._counters_W, key)
            block, place = divmod(tile, BLOCK_TILES)
            ids = self._token_ids[block, :, place].flatten()
            token = int(ids[self._best(self._row[ids], ids, key)])
            logit = float(self._row[token])
            if logit >= threshold:
                break
            log_sums_W.masked_fill_(maxima_W <= logit, -torch.inf)
            key = next_noise_keys(key)
        return token

    def _over_tiles(self, values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        # Over a tile's runs first: that is the cheap direction.
        over_runs = reduce(values.view(self._shape), dim=1)
        return reduce(over_runs, dim=-1).flatten()

    def _best(self, values_C: Tensor, counters_C: Tensor, key: Tensor) -> int:
        noise = log_exponential(noise_bits(key, counters_C))[0]
        return int(torch.sub(values_C, noise, alpha=self._filters.temperature).argmax())


def sample(
    logits_BV: Tensor,
    seeds_B: Tensor,
    positions_B: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    """One token id a row, int64 [B]: Gumbel-max over tiles, then over the tokens of one.

    A draw of a token that is not kept is repeated with other noise; one that top_p drops bounds
    what is drawn after it from below. temperature 0 is argmax, the lowest id of a tie. Logits of
    any float dtype; not changed.
    Rows are spread over threads, not operations: a barrier an operation would cost more than the
    arithmetic whenever another thread of the run has the second core.
    """
    batch, vocabulary = logits_BV.shape
    filters = Filters(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    keys_B1 = noise_keys(seeds_B, positions_B)[:, None]

    def draw_rows(start: int) -> list[int]:
        sampler = _RowSampler(vocabulary, filters, logits_BV.device)
        rows = range(start, min(start + _ROWS_PER_TASK, batch))
        return [sampler.draw(logits_BV[row], keys_B1[row]) for row in rows]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        chunks = list(pool.map(draw_rows, range(0, batch, _ROWS_PER_TASK)))
    token_ids = [token_id for chunk in chunks for token_id in chunk]
    return torch.tensor(token_ids, dtype=torch.int64, device=logits_BV.device)


def apply_penalties(
    logits_BV: Tensor,
    slot_ids_B: Tensor,
    output_counts_RV: Tensor,
    prompt_mask_RV: Tensor,
    *,
    presence: float,
    frequency: float,
    repetition: float,
) -> None:
    """Repetition over prompt and output, then frequency and presence over output; in place."""
    has_slot = slot_ids_B >= 0
    slots = slot_ids_B[has_slot].long()
    x = logits_BV[has_slot].float()
    counts = output_counts_RV[slots]
    is_generated = counts > 0
    repeated = torch.where(x > 0, x / repetition, x * repetition)
    x = torch.where(prompt_mask_RV[slots] | is_generated, repeated, x)
    x -= frequency * counts + presence * is_generated
    logits_BV[has_slot] = x.to(logits_BV.dtype)


# ---- attention ----------------------------------------------------------------------------------


def _attend(
    q_QNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, visible_QL: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention in fp64: out_QNH and lse_QN (natural log). Nothing visible: 0 and -inf."""
    group = q_QNH.shape[1] // k_LKH.shape[1]
    k_LNH = k_LKH.double().repeat_interleave(group, dim=1)
    v_LNH = v_LKH.double().repeat_interleave(group, dim=1)
    scores_QNL = torch.einsum("qnh,lnh->qnl", q_QNH.double(), k_LNH) * scale
    scores_QNL = scores_QNL.masked_fill(~visible_QL[:, None, :], -torch.inf)
    lse_QN = torch.logsumexp(scores_QNL, dim=-1)
    p_QNL = torch.exp(scores_QNL - torch.nan_to_num(lse_QN, neginf=0.0)[..., None])
    return torch.einsum("qnl,lnh->qnh", p_QNL, v_LNH), lse_QN


def _gather_kv(cache_PKSH: Tensor, blocks_X: Tensor, start: int, end: int) -> Tensor:
    """The tokens [start, end) of a sequence, contiguous: [L, K, H]."""
    block_size = cache_PKSH.shape[2]
    positions_L = torch.arange(start, end, device=cache_PKSH.device)
    blocks_L = blocks_X[positions_L // block_size].long()
    return cache_PKSH[blocks_L, :, positions_L % block_size]


def paged_prefill(
    q_TNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    cu_seqlens_q_B1: Tensor,
    seq_lens_B: Tensor,
    *,
    scale: float,
    kv_starts_B: Tensor | None = None,
    is_causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention over paged KV from kv_starts on, in fp64: out_TNH and lse_TN.

    Padding rows of q_TNH give zeros and -inf.
    """
    out_TNH = torch.zeros_like(q_TNH, dtype=torch.float64)
    lse_TN = torch.full(q_TNH.shape[:2], -torch.inf, dtype=torch.float64, device=q_TNH.device)
    cu_seqlens_q = cu_seqlens_q_B1.tolist()
    for row, seq_len in enumerate(seq_lens_B.tolist()):
        first, end = cu_seqlens_q[row], cu_seqlens_q[row + 1]
        start = 0 if kv_starts_B is None else int(kv_starts_B[row])
        blocks_X = block_table_RX[slot_ids_B[row]]
        k_LKH = _gather_kv(k_cache_PKSH, blocks_X, start, seq_len)
        v_LKH = _gather_kv(v_cache_PKSH, blocks_X, start, seq_len)
        positions_L = torch.arange(start, seq_len, device=q_TNH.device)
        last_Q = torch.arange(seq_len - (end - first), seq_len, device=q_TNH.device)
        if not is_causal:
            last_Q[:] = seq_len - 1
        visible_QL = positions_L <= last_Q[:, None]
        out_TNH[first:end], lse_TN[first:end] = _attend(
            q_TNH[first:end], k_LKH, v_LKH, visible_QL, scale
        )
    return out_TNH, lse_TN


def paged_decode(
    q_BNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    seq_lens_B: Tensor,
    *,
    scale: float,
    kv_starts_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over its KV from kv_starts on, in fp64: out_BNH and lse_BN."""
    out_BNH = torch.zeros_like(q_BNH, dtype=torch.float64)
    lse_BN = torch.zeros(q_BNH.shape[:2], dtype=torch.float64, device=q_BNH.device)
    for row, seq_len in enumerate(seq_lens_B.tolist()):
        start = 0 if kv_starts_B is None else int(kv_starts_B[row])
        blocks_X = block_table_RX[slot_ids_B[row]]
        k_LKH = _gather_kv(k_cache_PKSH, blocks_X, start, seq_len)
        v_LKH = _gather_kv(v_cache_PKSH, blocks_X, start, seq_len)
        visible_QL = torch.ones(1, seq_len - start, dtype=torch.bool, device=q_BNH.device)
        out_BNH[row], lse_BN[row] = _attend(q_BNH[row, None], k_LKH, v_LKH, visible_QL, scale)
    return out_BNH, lse_BN


def shared_prefix(
    q_BNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    prefix_block_table_GX: Tensor,
    prefix_lens_G: Tensor,
    member_ids_U: Tensor,
    cu_members_G1: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of each member over its group's prefix, in fp64; other rows give 0 and -inf."""
    out_BNH = torch.zeros_like(q_BNH, dtype=torch.float64)
    lse_BN = torch.full(q_BNH.shape[:2], -torch.inf, dtype=torch.float64, device=q_BNH.device)
    cu_members = cu_members_G1.tolist()
    for group, prefix_len in enumerate(prefix_lens_G.tolist()):
        rows = member_ids_U[cu_members[group] : cu_members[group + 1]].long()
        blocks_X = prefix_block_table_GX[group]
        k_LKH = _gather_kv(k_cache_PKSH, blocks_X, 0, prefix_len)
        v_LKH = _gather_kv(v_cache_PKSH, blocks_X, 0, prefix_len)
        visible_QL = torch.ones(len(rows), prefix_len, dtype=torch.bool, device=q_BNH.device)
        out_BNH[rows], lse_BN[rows] = _attend(q_BNH[rows], k_LKH, v_LKH, visible_QL, scale)
    return out_BNH, lse_BN


def merge_attention(
    out_a_BNH: Tensor, lse_a_BN: Tensor, out_b_BNH: Tensor, lse_b_BN: Tensor
) -> Tensor:
    """The attention over two disjoint sets of KV, in fp64; a side with lse -inf is ignored."""
    lse_2BN = torch.stack([lse_a_BN, lse_b_BN]).double()
    out_2BNH = torch.stack([out_a_BNH, out_b_BNH]).double()
    is_empty_2BN = lse_2BN == -torch.inf
    weight_2BN = torch.softmax(lse_2BN.masked_fill(is_empty_2BN, -1e300), dim=0)
    weight_2BN = weight_2BN.masked_fill(is_empty_2BN, 0.0)
    return (out_2BNH.masked_fill(is_empty_2BN[..., None], 0.0) * weight_2BN[..., None]).sum(0)


# ---- the slot table -----------------------------------------------------------------------------

NAN_TOKEN = -2


class SlotTable(Protocol):
    """What a decode step reads and writes of the sequences, a row each."""

    block_table_RX: Tensor  # int32
    kv_lens_R: Tensor  # int32, tokens with KV
    last_tokens_R: Tensor  # int64, the newest, without KV yet
    active_R: Tensor  # bool, not ended
    stop_lens_R: Tensor  # int32, prompt and output together
    ignore_eos_R: Tensor  # bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotInputs:
    """What a decode step needs to know of its slots. An inactive one has seq_len 0 and slot -1."""

    token_ids_B: Tensor  # int64, the newest, whose KV this step computes
    row_ids_B: Tensor  # int32
    positions_B: Tensor  # int32
    slot_mapping_B: Tensor  # int64, block * block_size + offset
    seq_lens_B: Tensor  # int32, the token of this step counted
    kv_starts_B: Tensor | None  # int32, tokens of a prefix that is read apart


def copy_slots(
    k_cache_PKSH: Tensor, v_cache_PKSH: Tensor, source_C: Tensor, target_C: Tensor
) -> None:
    """See copy_slots.copy_slots."""
    size = k_cache_PKSH.shape[2]
    for cache_PKSH in (k_cache_PKSH, v_cache_PKSH):
        tokens_CKH = cache_PKSH[source_C // size, :, source_C % size]
        cache_PKSH[target_C // size, :, target_C % size] = tokens_CKH


def copy_block_starts(
    kv_PL2KSH: Tensor, source_F: Tensor, target_F: Tensor, num_slots_F: Tensor, is_copied_F: Tensor
) -> None:
    """See copy_block_starts.copy_block_starts."""
    copied = is_copied_F.nonzero()[:, 0]
    source, target = source_F[copied].long(), target_F[copied].long()
    # Indexing knows no fp8.
    bits_PL2KSZ = kv_PL2KSH.view(torch.uint8)
    is_filled_CS = (
        torch.arange(kv_PL2KSH.shape[4], device=copied.device) < num_slots_F[copied, None]
    )
    is_filled = is_filled_CS[:, None, None, None, :, None]
    bits_PL2KSZ[target] = torch.where(is_filled, bits_PL2KSZ[source], bits_PL2KSZ[target])


def read_slots(
    rows_B: Tensor,
    table: SlotTable,
    prefix_lens_B: Tensor | None,
    *,
    block_size: int,
) -> SlotInputs:
    """See slots.read_slots."""
    active_B = table.active_R[rows_B]
    positions_B = table.kv_lens_R[rows_B]
    # A finished row may stand one past its last block; its slot is masked.
    columns_B = (positions_B // block_size).clamp(max=table.block_table_RX.shape[1] - 1).long()
    slots_B = table.block_table_RX[rows_B, columns_B].long() * block_size + positions_B % block_size
    return SlotInputs(
        token_ids_B=table.last_tokens_R[rows_B],
        row_ids_B=rows_B.to(torch.int32),
        positions_B=positions_B,
        slot_mapping_B=torch.where(active_B, slots_B, -1),
        seq_lens_B=torch.where(active_B, positions_B + 1, 0),
        kv_starts_B=None if prefix_lens_B is None else torch.where(active_B, prefix_lens_B, 0),
    )


def advance_slots(
    rows_B: Tensor,
    seq_lens_B: Tensor,
    sampled_B: Tensor,
    logits_BV: Tensor,
    eos_E: Tensor,
    stops_E: Tensor,
    table: SlotTable,
) -> Tensor:
    """See slots.advance_slots."""
    active_B = table.active_R[rows_B]
    ends_B = seq_lens_B + 1 >= table.stop_lens_R[rows_B]
    ends_B |= (sampled_B[:, None] == eos_E).any(dim=1) & ~table.ignore_eos_R[rows_B]
    ends_B |= (sampled_B[:, None] == stops_E).any(dim=1)
    moved_B = rows_B[active_B]
    table.kv_lens_R[moved_B] = seq_lens_B[active_B]
    table.last_tokens_R[moved_B] = sampled_B[active_B]
    table.active_R[moved_B] = ~ends_B[active_B]
    tokens_B = torch.where(logits_BV[:, 0].isnan(), NAN_TOKEN, sampled_B)
    return torch.where(active_B, tokens_B, -1).to(torch.int32)
