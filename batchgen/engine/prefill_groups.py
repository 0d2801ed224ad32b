"""Which chunks of a prefill step read a common prefix once, and where that pays. No torch.

Attention works in tiles of query tokens, and each tile reads all the KV that its tokens see. A
chunk of a few tokens behind a long prefix leaves most of its tile empty. Neighbouring chunks with
the same leading blocks may put their tokens into common tiles for these blocks, so that each tile
is full; the rest of their KV is then read apart, and two results have to be merged.

Chunks stand in the order of the prefix plan, so those that share a prefix are neighbours, and the
blocks that neighbours have in common imply a tree: its nodes are the groups that may be formed.

Legend: B chunks, X blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.prefix_groups import common_with_next, tree_nodes
from batchgen.engine.step_plan import ChunkGroups, Int32

# What a step with groups costs more for each tile of query tokens, in KV tokens that the tile could
# attend to meanwhile: a start more, two results written and read, the merged one written. Measured
# on an H200: between 400 and 800 for tiles of 16 to 64 own query rows (benchmarks.md).
MERGE_COST_TOKENS = 640


@dataclass(frozen=True, slots=True)
class _Group:
    """The chunks from `first` up to `end`, and how many leading blocks they have in common."""

    first: int
    end: int
    num_blocks: int
    saving: int  # blocks, one for each tile that does not read it


class _Tiles:
    """How many tiles the chunks' query tokens take, alone and together."""

    def __init__(self, query_lens_B: Int32, tile_tokens: int) -> None:
        self._tile_tokens = tile_tokens
        self._tokens: list[int] = [0, *np.cumsum(query_lens_B).tolist()]
        self._tiles: list[int] = [0, *np.cumsum(-(-query_lens_B // tile_tokens)).tolist()]

    @property
    def num_full(self) -> float:
        """As many as all tokens would fill."""
        return self._tokens[-1] / self._tile_tokens

    def spared(self, first: int, end: int) -> int:
        together = -(-(self._tokens[end] - self._tokens[first]) // self._tile_tokens)
        return self._tiles[end] - self._tiles[first] - together

    def group(self, first: int, end: int, num_blocks: int) -> _Group:
        return _Group(first, end, num_blocks, self.spared(first, end) * num_blocks)

    def share(self, first: int, end: int) -> float:
        """What chunks add to the tiles spared by a large group that they join."""
        tokens = self._tokens[end] - self._tokens[first]
        return self._tiles[end] - self._tiles[first] - tokens / self._tile_tokens


def find_chunk_groups(
    tables_BX: Int32,
    num_full_B: NDArray[np.int64],
    query_lens_B: Int32,
    *,
    block_size: int,
    tile_tokens: int,
    min_saving: int,
) -> ChunkGroups | None:
    """Groups of neighbouring chunks that save nearly the most, or None where it does not pay.

    tables_BX: the chunks' blocks; num_full_B: how many leading ones of each were full before it.
    tile_tokens: query tokens of a tile. min_saving: blocks that the step has to save, each counted
    for every tile that does not read it; it must make up for the merge of all results, too.
    """
    common = common_with_next(tables_BX, num_full_B)
    if not common.any():
        return None
    tiles = _Tiles(query_lens_B, tile_tokens)
    groups = _best_groups(common, tiles)
    saving = sum(group.saving for group in groups)
    if saving < max(min_saving, 1) or saving * block_size <= MERGE_COST_TOKENS * tiles.num_full:
        return None
    bounds, num_blocks = [0], []
    for group in groups:
        if group.first > bounds[-1]:
            bounds.append(group.first)
            num_blocks.append(0)
        bounds.append(group.end)
        num_blocks.append(group.num_blocks)
    if bounds[-1] < len(query_lens_B):
        bounds.append(len(query_lens_B))
        num_blocks.append(0)
    return ChunkGroups(
        cu_chunks=np.array(bounds, dtype=np.int32),
        prefix_lens=np.array(num_blocks, dtype=np.int32) * np.int32(block_size),
        num_blocks_saved=saving,
    )


def _best_groups(common: NDArray[np.int64], tiles: _Tiles) -> list[_Group]:
    """Groups, in order, that together save nearly the most blocks.

    A child whose own groups save more than it would add to a group of its node stays apart; the
    children between such ones become the node's groups.
    """
    best: dict[tuple[int, int], list[_Group]] = {}
    for least, children in tree_nodes(common):
        groups: list[_Group] = []
        run: list[_Group] = []  # of the children that may join, their own groups
        begin, end = children[0][0], children[-1][1]
        first = begin
        for a, b in children:
            own = best.pop((a, b), [])
            if sum(group.saving for group in own) > tiles.share(a, b) * least:
                groups += _joined(tiles.group(begin, a, least), run) + own
                run, begin = [], b
            else:
                run += own
        best[first, end] = groups + _joined(tiles.group(begin, end, least), run)
    return best[0, len(common) + 1]


def _joined(whole: _Group, parts: list[_Group]) -> list[_Group]:
    return [whole] if whole.saving > sum(group.saving for group in parts) else parts
