"""Draws one token a row: Gumbel-max over the logits that temperature, top-k, top-p and min-p leave.

token = argmax_v (x_v - temperature * log E_v), with E_v ~ Exp(1) from a counter-based generator:
a hash of (seed, position, v), so that a row's tokens depend on nothing else: not on its place in
the batch, the batch's size or how the row is cut into programs. No sort: a filter keeps
x_v >= threshold, and the threshold is found by narrowing a bracket of floats, three pivots to a
pass over the row. Ties at the threshold are kept.

B sequences, V vocabulary.
Source: Gumbel-max, Gumbel 1954; splitmix64, Steele et al. 2014 (constants of Stafford's mix 13);
the 32-bit finalizer is C. Wellons' lowbias32, https://github.com/skeeto/hash-prospector.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # elements of a tile of _sample_kernel, 8 a thread
_MIN_PROGRAMS = 1024  # rows are cut until that many programs run: about a full H200
_SEARCH_BLOCK = 4096  # elements of a tile of _threshold_kernel
# Low bits of an fp32 that are always zero in a value of the dtype: the search leaves them out.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def _mix64(z):
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def noise_key(seed, position):
    """The int64 key of a row's draw at a position. Twin: reference.noise_keys."""
    return _mix64(_mix64(seed) + position.to(tl.int64) * -0x61C8864680B583EB)


@triton.jit
def noise_bits(key, token_ids):
    """31 random bits for each token id (int32 >= 0). Twin: reference.noise_bits."""
    x = token_ids.to(tl.uint32) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    signed = x.to(tl.int32, bitcast=True)
    return signed ^ (signed >> 16)  # the shift copies the sign, so the sign ends as zero


@triton.jit
def _log_exponential(bits):
    # log(E), E = -log(1 - u), u in (0, 1): minus a Gumbel. The tokens that win have the smallest E,
    # which come from the smallest u, where a float is finest. E = -log(u), as in the textbook, has
    # steps of 2^-24 there: too coarse for 150k tokens.
    u = (bits.to(tl.float32) + 0.5) * 4.656612595521636e-10  # 2^-31 - 2^-55: below one
    series = u * (1.0 + u * (0.5 + u * (0.3333333333 + u * 0.25)))
    return tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))


@triton.jit
def _sample_kernel(
    logits_ptr,
    thresholds_ptr,
    seeds_ptr,
    positions_ptr,
    scores_ptr,
    token_ids_ptr,
    stride_logits,
    temperature,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    GREEDY: tl.constexpr,
    FILTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    SPAN: tl.constexpr = ((V + BLOCK - 1) // BLOCK + SPLITS - 1) // SPLITS * BLOCK
    logits_ptr += row * stride_logits
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_ids = lanes
    threshold = float("-inf")
    if FILTER:
        threshold = tl.load(thresholds_ptr + row)
    if not GREEDY:
        key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    for start in range(split * SPAN, tl.minimum(split * SPAN + SPAN, V), BLOCK):
        ids = start + lanes
        x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        score = x
        if not GREEDY:
            score = x - temperature * _log_exponential(noise_bits(key, ids))
        if FILTER:
            score = tl.where(x >= threshold, score, float("-inf"))
        is_better = score > best  # strictly: the lowest id wins a tie within a lane
        best = tl.where(is_better, score, best)
        best_ids = tl.where(is_better, ids, best_ids)
    winner = tl.max(best, axis=0)
    winner_id = tl.min(tl.where(best == winner, best_ids, V - 1), axis=0)
    tl.store(scores_ptr + row * SPLITS + split, winner)
    tl.store(token_ids_ptr + row * SPLITS + split, winner_id.to(tl.int64))


@triton.jit
def _merge_splits_kernel(
    scores_ptr,
    token_ids_ptr,
    out_ptr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    scores = tl.load(scores_ptr + row * SPLITS + splits)
    ids = tl.load(token_ids_ptr + row * SPLITS + splits)
    winner = tl.max(scores, axis=0)
    tl.store(out_ptr + row, tl.min(tl.where(scores == winner, ids, 0x7FFFFFFF), axis=0))


@triton.jit
def _order_key(x, UNUSED_BITS: tl.constexpr):
    # An integer that orders as the fp32 x does; adding zero makes one key of 0 and -0.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> UNUSED_BITS


@triton.jit
def _lowest_of_key(key, UNUSED_BITS: tl.constexpr):
    # The lowest value of the dtype with that key; low bits of a negative one are all set.
    UNUSED: tl.constexpr = (1 << UNUSED_BITS) - 1
    bits = (key << UNUSED_BITS) | tl.where(key < 0, UNUSED, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight_above(
    logits_ptr,
    key1,
    key2,
    key3,
    row_max,
    inv_temperature,
    V: tl.constexpr,
    IS_MASS: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # How much of the row lies above each of three keys: tokens, or unnormalised probability.
    lanes = tl.arange(0, BLOCK)
    sum1 = tl.zeros([BLOCK], tl.float32)
    sum2 = tl.zeros([BLOCK], tl.float32)
    sum3 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        mask = start + lanes < V
        x = tl.load(logits_ptr + start + lanes, mask=mask, other=float("-inf")).to(tl.float32)
        keys = _order_key(x, UNUSED_BITS)
        weight = tl.where(mask, 1.0, 0.0)
        if IS_MASS:
            weight = tl.exp((x - row_max) * inv_temperature)
        sum1 += tl.where(keys > key1.to(tl.int32), weight, 0.0)
        sum2 += tl.where(keys > key2.to(tl.int32), weight, 0.0)
        sum3 += tl.where(keys > key3.to(tl.int32), weight, 0.0)
    return tl.sum(sum1, axis=0), tl.sum(sum2, axis=0), tl.sum(sum3, axis=0)


@triton.jit
def _smallest_key_below(
    logits_ptr,
    low,
    high,
    target,
    row_max,
    inv_temperature,
    V: tl.constexpr,
    IS_MASS: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The smallest key in (low, high] above which less than `target` lies; int64, for the middle
    # of two int32 keys. Such a key belongs to a token of the row.
    while high - low > 1:
        key1 = low + (high - low) // 4
        key2 = low + (high - low) // 2
        key3 = low + (high - low) * 3 // 4
        above1, above2, above3 = _weight_above(
            logits_ptr, key1, key2, key3, row_max, inv_temperature, V, IS_MASS, UNUSED_BITS, BLOCK
        )
        if above1 < target:
            high = key1
        elif above2 < target:
            low = key1
            high = key2
        elif above3 < target:
            low = key2
            high = key3
        else:
            low = key3
    return high


@triton.jit
def _threshold_kernel(
    logits_ptr,
    thresholds_ptr,
    stride_logits,
    inv_temperature,
    top_k,
    top_p,
    min_p_margin,
    V: tl.constexpr,
    USE_TOP_K: tl.constexpr,
    USE_TOP_P: tl.constexpr,
    USE_MIN_P: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    lanes = tl.arange(0, BLOCK)
    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + lanes, mask=start + lanes < V, other=float("-inf"))
        lane_max = tl.maximum(lane_max, x.to(tl.float32))
    row_max = tl.max(lane_max, axis=0)
    max_key = _order_key(row_max, UNUSED_BITS).to(tl.int64)
    threshold = float("-inf")
    LOWEST: tl.constexpr = -0x7F800001 >> UNUSED_BITS  # the key of -inf
    below_kept = tl.full([], LOWEST - 1, tl.int64)
    if USE_TOP_K:
        key = _smallest_key_below(
            logits_ptr, below_kept, max_key, top_k, row_max, inv_temperature,
            V, False, UNUSED_BITS, BLOCK,
        )  # fmt: skip
        threshold = _lowest_of_key(key.to(tl.int32), UNUSED_BITS)
        below_kept = key - 1
    if USE_TOP_P:
        mass, _, _ = _weight_above(
            logits_ptr, below_kept, max_key, max_key, row_max, inv_temperature,
            V, True, UNUSED_BITS, BLOCK,
        )  # fmt: skip
        # Tokens under (1 - p) / V of the mass cannot hold 1 - p of it: the search starts there.
        floor = row_max + (tl.log((1.0 - top_p) * mass / V) - 0.01) / inv_temperature
        low = tl.maximum(below_kept, _order_key(floor, UNUSED_BITS).to(tl.int64) - 1)
        key = _smallest_key_below(
            logits_ptr, low, max_key, top_p * mass, row_max, inv_temperature,
            V, True, UNUSED_BITS, BLOCK,
        )  # fmt: skip
        threshold = _lowest_of_key(key.to(tl.int32), UNUSED_BITS)
    if USE_MIN_P:
        threshold = tl.maximum(threshold, row_max + min_p_margin)
    tl.store(thresholds_ptr + row, threshold)


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
    """One token id a row, int64 [B]. Only reads the logits (bf16, fp16 or fp32; rows strided).

    temperature 0 is argmax, the lowest id of a tie. Otherwise temperature, then top_k (0: off),
    top_p (1: off) of what is left, and min_p (0: off), as transformers' warpers do.
    seeds_B int64; positions_B int32 or int64: the position of the token that is drawn.
    A logit of -inf is never drawn unless the whole row is.
    """
    batch, vocabulary = logits_BV.shape
    assert logits_BV.dtype in _UNUSED_BITS, f"no kernel for {logits_BV.dtype}"
    assert logits_BV.stride(1) == 1, "rows of logits must be contiguous"
    assert seeds_B.shape == positions_B.shape == (batch,), "one seed and one position a row"
    assert seeds_B.dtype == torch.int64, "seeds must be int64"
    assert positions_B.dtype in (torch.int32, torch.int64), "positions must be integers"
    assert seeds_B.is_contiguous(), "seeds must be contiguous"
    assert positions_B.is_contiguous(), "positions must be contiguous"
    assert seeds_B.device == positions_B.device == logits_BV.device, "not all on one device"
    device = logits_BV.device
    if batch == 0:
        return torch.empty((0,), dtype=torch.int64, device=device)

    is_greedy = temperature == 0.0
    use_top_k = 0 < top_k < vocabulary
    has_filter = not is_greedy and (use_top_k or top_p < 1.0 or min_p > 0.0)
    thresholds_B = torch.empty((batch if has_filter else 1,), dtype=torch.float32, device=device)
    if has_filter:
        _threshold_kernel[(batch,)](
            logits_BV,
            thresholds_B,
            logits_BV.stride(0),
            1.0 / temperature,
            float(top_k),
            top_p,
            temperature * math.log(min_p) if min_p > 0.0 else 0.0,
            V=vocabulary,
            USE_TOP_K=use_top_k,
            USE_TOP_P=top_p < 1.0,
            USE_MIN_P=min_p > 0.0,
            UNUSED_BITS=_UNUSED_BITS[logits_BV.dtype],
            BLOCK=_SEARCH_BLOCK,
            num_warps=16,
        )
    # A power of two, so that few variants of the kernel are compiled.
    tiles = triton.cdiv(vocabulary, _BLOCK)
    splits = triton.next_power_of_2(min(tiles, triton.cdiv(_MIN_PROGRAMS, batch)))
    scores_BX = torch.empty((batch, splits), dtype=torch.float32, device=device)
    token_ids_BX = torch.empty((batch, splits), dtype=torch.int64, device=device)
    _sample_kernel[(batch * splits,)](
        logits_BV,
        thresholds_B,
        seeds_B,
        positions_B,
        scores_BX,
        token_ids_BX,
        logits_BV.stride(0),
        temperature,
        V=vocabulary,
        SPLITS=splits,
        GREEDY=is_greedy,
        FILTER=has_filter,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    if splits == 1:
        return token_ids_BX.view(batch)
    out_B = torch.empty((batch,), dtype=torch.int64, device=device)
    _merge_splits_kernel[(batch,)](
        scores_BX,
        token_ids_BX,
        out_B,
        SPLITS=splits,
        num_warps=1,
    )
    return out_B
