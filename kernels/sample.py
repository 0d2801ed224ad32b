"""Draws one token a row: Gumbel-max over the logits that temperature, top-k, top-p and min-p leave.

One pass over the logits x gives, for every tile of 64 tokens, its largest logit m and
l = T log(sum(exp(x / T))) with the temperature T; all further work is on these and on few tiles.
A draw takes the tile of the largest l - T log(E), then in it the token of the largest
x - T log(E), with E ~ Exp(1) from a counter-based generator: a hash of (seed, position, tile or
token). The product of both odds is the softmax. So a row's token depends on nothing else: not on
its place in the batch, the batch's size or the number of programs.

Filters need no sort, and top_p no threshold. A draw of a token that a filter drops is repeated
with other noise. A token is within top_p if the mass above it is small enough: a sum over the
tiles whose m lies above it, few of a peaked row, one pass over a flat one. If it is not, nothing at
or below it is kept, and the draws that follow leave out tiles that lie there; such passes
number about 1 + log(1 / top_p). The k-th largest m bounds top_k's threshold from below, so
that it is searched in about k tiles. A tile in play has a token above the bound, with 1/64 of
the tile's mass or more: so draws end soon. Ties at a threshold are kept.

Accuracy: x - m is exact for bf16 and fp16, a sum of 64 terms of at most 1 is off by about 1e-6 of
itself, and l is rounded as any score in fp32: a token's odds are off by a few 1e-6 of themselves.

B sequences, V vocabulary, W tiles.
Source: rejection in the place of a sort is FlashInfer's (include/flashinfer/sampling.cuh), which
rejects tokens of a cumulated sum; tiles and bounds by their maxima are ours.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels import reference
from batchgen.kernels.noise import log_exponential, next_noise_key, noise_bits, noise_key
from batchgen.kernels.vocabulary_tiles import (
    BLOCK_TILES,
    finite,
    ids_of_tile,
    ids_of_tiles,
    kth_logit_key,
    kth_maximum_key,
    list_tiles,
    load_by_tile,
    load_logits,
    lowest_of_key,
    mass_from,
    mass_of_tiles,
    order_key,
    tile_kernel,
)

_MAX_DRAWS = tl.constexpr(reference.MAX_DRAWS)
_DRAW_WARPS = 8
_FILTER_REGISTERS = 80  # three programs on a multiprocessor; the compiler alone would run one
# Low bits of an fp32 that are always zero in a value of the dtype: searches leave them out.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def _argmax_kernel(
    logits_ptr,
    maxima_ptr,
    out_ptr,
    stride_logits,
    V: tl.constexpr,
    TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    maxima = load_by_tile(maxima_ptr + row * TILES, TILES, PADDED_TILES)
    row_max = tl.max(maxima, axis=0)
    # Tiles of a block interleave: the lowest id is anywhere in the first block with that maximum.
    blocks = tl.arange(0, PADDED_TILES) // BLOCK_TILES
    block = tl.min(tl.where(maxima == row_max, blocks, V), axis=0)
    ids = ids_of_tiles(block * BLOCK_TILES + tl.arange(0, BLOCK_TILES))
    x = load_logits(logits_ptr + row * stride_logits, ids, V)
    ids = tl.where(x == row_max, ids, V - 1)
    token = tl.min(tl.min(tl.min(ids, axis=2), axis=1), axis=0)
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def _best(scores, ids, LAST: tl.constexpr):
    # The lowest id of the highest score; LAST if every score is NaN.
    return tl.min(tl.where(scores == tl.max(scores, axis=0), ids, LAST), axis=0)


@triton.jit
def _draw_tile(log_sums, key, temperature, PADDED_TILES: tl.constexpr):
    tiles = tl.arange(0, PADDED_TILES)
    noise = log_exponential(noise_bits(key, -1 - tiles))
    return _best(log_sums - temperature * noise, tiles, PADDED_TILES - 1)


@triton.jit
def _draw_token(logits_ptr, tile, key, temperature, V: tl.constexpr):
    # A token of the tile, and its logit.
    ids = ids_of_tile(tile)
    x = load_logits(logits_ptr, ids, V)
    token = _best(x - temperature * log_exponential(noise_bits(key, ids)), ids, V - 1)
    return token, tl.max(tl.where(ids == token, x, float("-inf")), axis=0)


@triton.jit
def _draw_kernel(
    logits_ptr,
    log_sums_ptr,
    seeds_ptr,
    positions_ptr,
    out_ptr,
    stride_logits,
    temperature,
    V: tl.constexpr,
    TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    log_sums = load_by_tile(log_sums_ptr + row * TILES, TILES, PADDED_TILES)
    tile = _draw_tile(log_sums, key, temperature, PADDED_TILES)
    token, _ = _draw_token(logits_ptr + row * stride_logits, tile, key, temperature, V)
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def _filtered_draw_kernel(
    logits_ptr,
    maxima_ptr,
    log_sums_ptr,
    list_ptr,
    seeds_ptr,
    positions_ptr,
    out_ptr,
    stride_logits,
    temperature,
    inv_temperature,
    top_k,
    top_p,
    min_p_margin,
    V: tl.constexpr,
    TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    USE_TOP_K: tl.constexpr,
    USE_TOP_P: tl.constexpr,
    USE_MIN_P: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    maxima_ptr += row * TILES
    log_sums_ptr += row * TILES
    list_ptr += row * TILES
    maxima = load_by_tile(maxima_ptr, TILES, PADDED_TILES)
    row_max = tl.max(maxima, axis=0)
    shift = finite(row_max)
    lowest = tl.full([], float("-inf"), tl.float32)  # what lies below is not kept
    num_listed = 0
    if USE_TOP_K:
        max_key = order_key(row_max, UNUSED_BITS)
        low = kth_maximum_key(maxima, max_key, top_k, UNUSED_BITS)
        lowest = lowest_of_key(low, UNUSED_BITS)
        num_listed = list_tiles(maxima_ptr, list_ptr, lowest, TILES, PADDED_TILES)
        kth = kth_logit_key(logits_ptr, list_ptr, num_listed, low, max_key, top_k, V, UNUSED_BITS)
        lowest = lowest_of_key(kth, UNUSED_BITS)
    if USE_TOP_P:
        if USE_TOP_K:
            mass = mass_from(logits_ptr, list_ptr, num_listed, lowest, shift, inv_temperature, V)
        else:
            log_sums = load_by_tile(log_sums_ptr, TILES, PADDED_TILES)
            mass = mass_of_tiles(log_sums, shift, inv_temperature)
    if USE_MIN_P:
        lowest = tl.maximum(lowest, row_max + min_p_margin)

    key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    token = tl.full([], 0, tl.int32)
    num_draws = 0
    while num_draws < _MAX_DRAWS:
        # Loaded anew each time: registers are dearer than a cache.
        maxima = load_by_tile(maxima_ptr, TILES, PADDED_TILES)
        log_sums = load_by_tile(log_sums_ptr, TILES, PADDED_TILES)
        log_sums = tl.where(maxima >= lowest, log_sums, float("-inf"))
        tile = _draw_tile(log_sums, key, temperature, PADDED_TILES)
        token, x = _draw_token(logits_ptr, tile, key, temperature, V)
        is_kept = x >= lowest
        if USE_TOP_P:
            above = lowest_of_key(order_key(x, UNUSED_BITS) + 1, UNUSED_BITS)
            if is_kept & (x < row_max):  # nothing is above the largest
                if not USE_TOP_K:
                    num_listed = list_tiles(maxima_ptr, list_ptr, above, TILES, PADDED_TILES)
                mass_above = mass_from(
                    logits_ptr, list_ptr, num_listed, above, shift, inv_temperature, V
                )
                if mass_above >= top_p * mass:
                    is_kept = False
                    lowest = above
        num_draws = tl.where(is_kept, _MAX_DRAWS, num_draws + 1)
        key = next_noise_key(key)
    tl.store(out_ptr + row, token.to(tl.int64))


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
    A logit of -inf or NaN is never drawn unless the whole row is.
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
    out_B = torch.empty((batch,), dtype=torch.int64, device=logits_BV.device)
    if batch == 0:
        return out_B

    is_greedy = temperature == 0.0
    use_top_k = 0 < top_k < vocabulary
    has_filter = not is_greedy and (use_top_k or top_p < 1.0 or min_p > 0.0)
    num_blocks = triton.cdiv(vocabulary, reference.BLOCK_TILES * reference.TILE_SIZE)
    num_tiles = num_blocks * reference.BLOCK_TILES
    sizes = {
        "V": vocabulary,
        "TILES": num_tiles,
        "PADDED_TILES": triton.next_power_of_2(num_tiles),
        "num_warps": _DRAW_WARPS,
    }
    maxima_BW = logits_BV.new_empty((batch, num_tiles), dtype=torch.float32)
    log_sums_BW = torch.empty_like(maxima_BW) if has_filter else maxima_BW  # one of them is stored
    tile_kernel[(batch * num_blocks,)](
        logits_BV,
        maxima_BW,
        log_sums_BW,
        logits_BV.stride(0),
        temperature,
        V=vocabulary,
        BLOCKS=num_blocks,
        STORE_MAX=is_greedy or has_filter,
        STORE_SUM=not is_greedy,
        num_warps=reference.BLOCK_TILES // 32,
    )
    if is_greedy:
        _argmax_kernel[(batch,)](logits_BV, maxima_BW, out_B, logits_BV.stride(0), **sizes)
        return out_B
    rows = (seeds_B, positions_B, out_B, logits_BV.stride(0), temperature)
    if not has_filter:
        _draw_kernel[(batch,)](logits_BV, log_sums_BW, *rows, **sizes)
        return out_B
    _filtered_draw_kernel[(batch,)](
        logits_BV,
        maxima_BW,
        log_sums_BW,
        torch.empty_like(maxima_BW, dtype=torch.int32),
        *rows,
        1.0 / temperature,
        float(top_k),
        top_p,
        temperature * math.log(min_p) if min_p > 0.0 else 0.0,
        USE_TOP_K=use_top_k,
        USE_TOP_P=top_p < 1.0,
        USE_MIN_P=min_p > 0.0,
        UNUSED_BITS=_UNUSED_BITS[logits_BV.dtype],
        maxnreg=_FILTER_REGISTERS,
        **sizes,
    )
    return out_B
