"""How a batch's KV is cut into pieces of work for decoding, computed on the device.

The KV tokens of all rows, in tiles of TILE tokens, are spread over a fixed number of equal shares;
a row longer than a share is cut into equal pieces, any other row is one piece. So one long row
gets many pieces, many short rows one each, and the number of pieces is bounded by shapes alone
(shares + rows): the plan is made inside a CUDA graph, once a step for all layers.

With C = max(MIN_TILES, ceil(total tiles / shares)) a row of t tiles has max(1, ceil(t / C)) pieces:
at most shares + B in all. Fewer than `shares` rows are cut, into fewer than 2 * shares pieces.

Legend: B batch rows, W shares, P pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels.attention import check_index, num_processors
from batchgen.kernels.tuning import tuning_for

TILE = 64  # KV tokens; the unit in which pieces are cut
_MIN_TILES = 4  # a shorter piece is not worth its partial result
_BLOCK = 1024
_FEW_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Pieces of work of one decode step; device tensors, int32.

    pieces_P4: batch row, first tile, end tile, and where the partial result goes (negative: the
      piece is the whole row and writes the output itself). Row B marks an unused entry.
    merges_W3: batch row, first and end of its partial results. Row B marks an unused entry.
    """

    pieces_P4: Tensor
    merges_W3: Tensor
    num_rows: int

    @property
    def max_partials(self) -> int:
        """How many partial results a step can have at most."""
        return 2 * self.merges_W3.shape[0]


@triton.jit
def _num_tiles(seq_lens_ptr, kv_starts_ptr, rows, mask, TILE: tl.constexpr):
    num_tokens = tl.load(seq_lens_ptr + rows, mask=mask, other=0).to(tl.int32)
    if kv_starts_ptr is not None:
        num_tokens -= tl.load(kv_starts_ptr + rows, mask=mask, other=0).to(tl.int32)
    return (tl.maximum(num_tokens, 0) + TILE - 1) // TILE


@triton.jit(do_not_specialize=["num_rows", "num_shares"])
def _plan_rows_kernel(
    seq_lens_ptr,
    kv_starts_ptr,
    piece_starts_ptr,
    partial_starts_ptr,
    merges_ptr,
    num_rows,
    num_shares,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_B)
    real = rows < num_rows
    tiles = _num_tiles(seq_lens_ptr, kv_starts_ptr, rows, real, TILE)
    share = tl.maximum((tl.sum(tiles, 0) + num_shares - 1) // num_shares, MIN_TILES)
    pieces = tl.where(real, tl.maximum((tiles + share - 1) // share, 1), 0)
    is_cut = (pieces > 1).to(tl.int32)
    piece_ends = tl.cumsum(pieces, 0)
    partial_ends = tl.cumsum(pieces * is_cut, 0)
    partial_starts = partial_ends - pieces * is_cut
    tl.store(piece_starts_ptr, 0)
    tl.store(piece_starts_ptr + 1 + rows, piece_ends, mask=real)
    tl.store(partial_starts_ptr + rows, partial_starts, mask=real)

    num_cut = tl.sum(is_cut, 0)
    merge_ptrs = merges_ptr + (tl.cumsum(is_cut, 0) - 1) * 3
    tl.store(merge_ptrs, rows, mask=is_cut > 0)
    tl.store(merge_ptrs + 1, partial_starts, mask=is_cut > 0)
    tl.store(merge_ptrs + 2, partial_ends, mask=is_cut > 0)
    for start in range(0, num_shares, BLOCK_W):
        unused = start + tl.arange(0, BLOCK_W)
        mask = (unused >= num_cut) & (unused < num_shares)
        tl.store(merges_ptr + unused * 3, num_rows, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_entries", "num_steps"])
def _plan_pieces_kernel(
    seq_lens_ptr,
    kv_starts_ptr,
    piece_starts_ptr,
    partial_starts_ptr,
    pieces_ptr,
    num_rows,
    num_entries,
    num_steps,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    piece = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    # Bisection: piece_starts[low] <= piece < piece_starts[high].
    low = tl.zeros([BLOCK_P], tl.int32)
    high = tl.zeros([BLOCK_P], tl.int32) + num_rows
    for _ in range(num_steps):
        middle = (low + high) // 2
        is_right = tl.load(piece_starts_ptr + middle) <= piece
        low = tl.where(is_right, middle, low)
        high = tl.where(is_right, high, middle)
    row_start = tl.load(piece_starts_ptr + low)
    num_pieces = tl.load(piece_starts_ptr + low + 1) - row_start
    index = piece - row_start
    is_used = index < num_pieces
    index = tl.where(is_used, index, 0)
    tiles = _num_tiles(seq_lens_ptr, kv_starts_ptr, low, is_used, TILE)
    partial = tl.load(partial_starts_ptr + low) + index
    entry_ptrs = pieces_ptr + piece * 4
    mask = piece < num_entries
    tl.store(entry_ptrs, tl.where(is_used, low, num_rows), mask=mask)
    tl.store(entry_ptrs + 1, tiles * index // num_pieces, mask=mask)
    tl.store(entry_ptrs + 2, tiles * (index + 1) // num_pieces, mask=mask)
    tl.store(entry_ptrs + 3, tl.where(num_pieces > 1, partial, -1), mask=mask)


def default_shares(num_rows: int, num_kv_heads: int, device: torch.device) -> int:
    """How many shares fill the device when every share is one program a kv head."""
    few, many = tuning_for(device).decode_shares
    shares = (few if num_rows <= _FEW_ROWS else many) * num_processors(device)
    return -(-shares // num_kv_heads)


def plan_decode(
    seq_lens_B: Tensor,
    kv_starts_B: Tensor | None = None,
    *,
    num_kv_heads: int,
    num_shares: int | None = None,
) -> DecodePlan:
    """Cut a decode step's KV into pieces; two small kernels, no host sync, shapes fixed by B.

    seq_lens_B counts the token being decoded; 0 marks a padding row. kv_starts_B counts leading
    tokens to leave out, at most seq_lens_B. The plan holds for these lengths only.
    """
    num_rows = seq_lens_B.shape[0]
    device = seq_lens_B.device
    check_index(seq_lens_B, (num_rows,), device, "seq_lens")
    if kv_starts_B is not None:
        check_index(kv_starts_B, (num_rows,), device, "kv_starts")
    if num_shares is None:
        num_shares = default_shares(seq_lens_B.shape[0], num_kv_heads, device)
    num_entries = num_shares + num_rows
    pieces_P4 = torch.empty((num_entries, 4), dtype=torch.int32, device=device)
    merges_W3 = torch.empty((num_shares, 3), dtype=torch.int32, device=device)
    piece_starts = torch.empty(num_rows + 1, dtype=torch.int32, device=device)
    partial_starts = torch.empty(num_rows, dtype=torch.int32, device=device)
    _plan_rows_kernel[(1,)](
        seq_lens_B,
        kv_starts_B,
        piece_starts,
        partial_starts,
        merges_W3,
        num_rows,
        num_shares,
        TILE=TILE,
        MIN_TILES=_MIN_TILES,
        BLOCK_B=max(_BLOCK, triton.next_power_of_2(num_rows)),
        BLOCK_W=_BLOCK,
        num_warps=8,
    )
    _plan_pieces_kernel[(triton.cdiv(num_entries, 128),)](
        seq_lens_B,
        kv_starts_B,
        piece_starts,
        partial_starts,
        pieces_P4,
        num_rows,
        num_entries,
        num_rows.bit_length(),
        TILE=TILE,
        BLOCK_P=128,
    )
    return DecodePlan(pieces_P4=pieces_P4, merges_W3=merges_W3, num_rows=num_rows)
