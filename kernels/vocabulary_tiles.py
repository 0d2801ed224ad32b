"""Rows of logits as tiles: what one pass leaves of a row, and sums over the tiles that matter.

A tile is 64 fixed tokens of the vocabulary: 8 runs of 8 neighbours, each run 1024 tokens from the
next. So 128 threads read a block of 8192 tokens in 16-byte loads that coalesce, each thread holds
one whole tile, and a tile's maximum and sum cross no threads. Tiles depend on the vocabulary alone,
hence so does the order of every sum.

V vocabulary.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from batchgen.kernels import reference

_RUN = tl.constexpr(reference.TILE_RUN)
_RUNS = tl.constexpr(reference.TILE_RUNS)
_TILE_SIZE = tl.constexpr(reference.TILE_SIZE)
BLOCK_TILES = tl.constexpr(reference.BLOCK_TILES)
_LISTED = tl.constexpr(128)  # tiles of an operation on a list
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def first_ids(tiles):
    """The first token of each tile."""
    return tiles // BLOCK_TILES * (BLOCK_TILES * _TILE_SIZE) + tiles % BLOCK_TILES * _RUN


@triton.jit
def ids_of_tile(tile):
    """The token ids of one tile in ascending order, [TILE_SIZE]; some may be V or more."""
    lanes = tl.arange(0, _TILE_SIZE)
    return first_ids(tile) + lanes // _RUN * (BLOCK_TILES * _RUN) + lanes % _RUN


@triton.jit
def ids_of_tiles(tiles):
    """Token ids, [tiles, TILE_RUNS, TILE_RUN]: in this order a thread is given whole tiles."""
    runs = tl.arange(0, _RUNS)[None, :, None] * (BLOCK_TILES * _RUN)
    return first_ids(tiles)[:, None, None] + runs + tl.arange(0, _RUN)[None, None, :]


@triton.jit
def load_logits(logits_ptr, ids, V: tl.constexpr):
    """fp32 logits of a row; -inf for NaN and for ids of V or more."""
    x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    return tl.where(x > float("-inf"), x, float("-inf"))


@triton.jit
def finite(x):
    """x, or zero in the place of an infinity: something to subtract."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def tile_kernel(
    logits_ptr,
    maxima_ptr,
    log_sums_ptr,
    stride_logits,
    temperature,
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    STORE_MAX: tl.constexpr,
    STORE_SUM: tl.constexpr,
):
    """Of each tile the largest logit, and T log(sum(exp(x / T))) with the temperature T.

    One program a row and block. Both results are fp32 [rows, BLOCKS * BLOCK_TILES].
    """
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    tiles = tl.program_id(0) % BLOCKS * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    x = load_logits(logits_ptr + row * stride_logits, ids_of_tiles(tiles), V)
    maxima = tl.max(tl.max(x, axis=2), axis=1)
    if STORE_MAX:
        tl.store(maxima_ptr + row * (BLOCKS * BLOCK_TILES) + tiles, maxima)
    if STORE_SUM:
        weights = tl.exp2((x - finite(maxima)[:, None, None]) * (_LOG2_E / temperature))
        sums = tl.sum(tl.sum(weights, axis=2), axis=1)
        sums = tl.where(maxima > float("-inf"), sums, 1.0)
        log_sums = maxima + temperature * tl.log(sums)
        tl.store(log_sums_ptr + row * (BLOCKS * BLOCK_TILES) + tiles, log_sums)


@triton.jit
def order_key(x, UNUSED_BITS: tl.constexpr):
    """An int64 that orders as the fp32 x does, of a dtype that leaves its low UNUSED_BITS zero."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # the sum makes one key of 0 and -0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> UNUSED_BITS).to(tl.int64)


@triton.jit
def lowest_of_key(key, UNUSED_BITS: tl.constexpr):
    """The lowest fp32 with that key."""
    UNUSED: tl.constexpr = (1 << UNUSED_BITS) - 1
    bits = (key.to(tl.int32) << UNUSED_BITS) | tl.where(key < 0, UNUSED, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_by_tile(values_ptr, TILES: tl.constexpr, PADDED_TILES: tl.constexpr):
    """A row's value for each tile; -inf in the padding."""
    tiles = tl.arange(0, PADDED_TILES)
    return tl.load(values_ptr + tiles, mask=tiles < TILES, other=float("-inf"))


@triton.jit
def list_tiles(maxima_ptr, list_ptr, lowest, TILES: tl.constexpr, PADDED_TILES: tl.constexpr):
    """Writes down the tiles that hold a logit of `lowest` or more; returns how many."""
    tiles = tl.arange(0, PADDED_TILES)
    maxima = load_by_tile(maxima_ptr, TILES, PADDED_TILES)
    is_listed = (tiles < TILES) & (maxima >= lowest)
    places = tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
    tl.debug_barrier()  # another thread may still read the last list
    tl.store(list_ptr + places, tiles, mask=is_listed)
    tl.debug_barrier()
    return tl.max(places, axis=0) + 1


@triton.jit
def _load_listed(logits_ptr, list_ptr, start, num_listed, V: tl.constexpr):
    places = start + tl.arange(0, _LISTED)
    tiles = tl.load(list_ptr + places, mask=places < num_listed, other=V)
    return load_logits(logits_ptr, ids_of_tiles(tiles), V)


@triton.jit
def mass_from(logits_ptr, list_ptr, num_listed, lowest, shift, inv_temperature, V: tl.constexpr):
    """The sum of exp((x - shift) / T) over the logits of listed tiles that are `lowest` or more."""
    sums = tl.zeros([_LISTED, _RUNS], tl.float32)
    for start in range(0, num_listed, _LISTED):
        x = _load_listed(logits_ptr, list_ptr, start, num_listed, V)
        weights = tl.exp2((x - shift) * (inv_temperature * _LOG2_E))
        sums += tl.sum(tl.where(x >= lowest, weights, 0.0), axis=2)
    return tl.sum(tl.sum(sums, axis=1), axis=0)


@triton.jit
def mass_of_tiles(log_sums, shift, inv_temperature):
    """The sum of exp((x - shift) / T) over the row whose tiles have these log sums."""
    return tl.sum(tl.exp2((log_sums - shift) * (inv_temperature * _LOG2_E)), axis=0)


@triton.jit
def kth_maximum_key(maxima, max_key, k, UNUSED_BITS: tl.constexpr):
    """The key of the k-th largest of the tiles' maxima, that of -inf if there are fewer.

    It bounds that of the row's k-th largest logit from below. max_key is that of the largest.
    """
    low = tl.full([], -0x7F800001 >> UNUSED_BITS, tl.int64)
    high = max_key + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        lowest = lowest_of_key(middle, UNUSED_BITS)
        if tl.sum(tl.where(maxima >= lowest, 1.0, 0.0), axis=0) >= k:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _count_from(x, key, UNUSED_BITS: tl.constexpr):
    return tl.sum(tl.where(x >= lowest_of_key(key, UNUSED_BITS), 1.0, 0.0), axis=2)


@triton.jit
def _is_at_least(counts, k):
    return tl.sum(tl.sum(counts, axis=1), axis=0) >= k


@triton.jit
def kth_logit_key(
    logits_ptr, list_ptr, num_listed, low, max_key, k, V: tl.constexpr, UNUSED_BITS: tl.constexpr
):
    """The key of the row's k-th largest logit, which is `low` or above and in a listed tile."""
    high = max_key + 1
    while high - low > 1:
        key1 = low + (high - low) // 4
        key2 = low + (high - low) // 2
        key3 = low + (high - low) * 3 // 4
        counts1 = tl.zeros([_LISTED, _RUNS], tl.float32)
        counts2 = tl.zeros([_LISTED, _RUNS], tl.float32)
        counts3 = tl.zeros([_LISTED, _RUNS], tl.float32)
        for start in range(0, num_listed, _LISTED):
            x = _load_listed(logits_ptr, list_ptr, start, num_listed, V)
            counts1 += _count_from(x, key1, UNUSED_BITS)
            counts2 += _count_from(x, key2, UNUSED_BITS)
            counts3 += _count_from(x, key3, UNUSED_BITS)
        if _is_at_least(counts3, k):
            low = key3
        elif _is_at_least(counts2, k):
            low = key2
            high = key3
        elif _is_at_least(counts1, k):
            low = key1
            high = key2
        else:
            high = key1
    return low
