"""The loading warp of paged_prefill_hopper, and what it shares with the warp groups that multiply.

The warp finds items, writes each into a record in shared memory, and copies its queries and, into
a ring of stages, its KV tiles: TMA, one box a page and 64 dims. Both sides take apart

    buffers = q_smem, k_smem, v_smem, record_E1
    barriers = q_full, q_empty, k_full, v_full, kv_empty

The q barriers guard the record, too; kv_empty guards K and V of a stage. A full barrier completes
when its bytes are there, an empty one when each warp group has read them. A wait names the phase,
0 and 1 by turns, that must be complete. The loader's first waits, for buffers that nobody has used
yet, name phase 1, which a new barrier lets pass.

Legend: H head size, E entries of a record, R rows looked at together.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

GROUP_ROWS = gl.constexpr(64)  # the rows of a warp group's product
BOX_DIMS = gl.constexpr(64)  # 128 bytes, the widest swizzle
# An item's record in shared memory.
_NUM_TOKENS = gl.constexpr(0)  # 0: no more items
_FIRST_TOKEN = gl.constexpr(1)
_FIRST_POSITION = gl.constexpr(2)  # counted, as seq_len is, from the first KV token that is read
_KV_HEAD = gl.constexpr(3)
_SEQ_LEN = gl.constexpr(4)
RECORD_SIZE = gl.constexpr(5)
_ROWS_AT_ONCE = gl.constexpr(128)
# Gluon renamed these after Triton 3.6.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_async_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
_view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or (
    gl.shared_memory_descriptor._reinterpret
)


@gluon.jit
def _read_entry(record_E1, entry: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(record_E1.index(entry).load(layout), 0)


@gluon.jit
def _write_entry(record_E1, entry: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    record_E1.index(entry).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def read_item(record_E1):
    """Number of tokens (0: no more items), first token, its position, kv head, seq_len."""
    return (
        _read_entry(record_E1, _NUM_TOKENS),
        _read_entry(record_E1, _FIRST_TOKEN),
        _read_entry(record_E1, _FIRST_POSITION),
        _read_entry(record_E1, _KV_HEAD),
        _read_entry(record_E1, _SEQ_LEN),
    )


@gluon.jit
def as_boxes(smem, shape: gl.constexpr):
    """Tiles as TMA fills them: boxes of 64 dims, one after the other."""
    return _view(smem, smem.dtype, shape, gl.NVMMASharedLayout(128, 16, len(shape) - 1))


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage and the phase of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _last_row(cu_seqlens_q_ptr, tile, first, end, STRIDE: gl.constexpr, BLOCK_Q: gl.constexpr):
    """Of the rows first, first + STRIDE, ... before `end`, the index of the last one whose tiles
    begin with this one or before."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    index = -1
    for start in range(first, end, _ROWS_AT_ONCE * STRIDE):
        rows_R = start + gl.arange(0, _ROWS_AT_ONCE, layout) * STRIDE
        cu_R = gl.load(cu_seqlens_q_ptr + rows_R, mask=rows_R < end, other=0)
        is_before_R = (cu_R // BLOCK_Q + rows_R <= tile) & (rows_R < end)
        index += gl.sum(is_before_R.to(gl.int32), 0)
    return index


@gluon.jit
def _find_item(
    ticket, rows, KV_HEADS: gl.constexpr, BLOCK_Q: gl.constexpr, IS_CAUSAL: gl.constexpr
):
    """The item of a ticket, or of the next one that has query tokens; 0 tokens: none is left.

    Also takes the ticket after it. A sequence's tiles are found as attention.find_row does, from
    the last to the first: those at the end of a sequence have the most work. Without a causal mask
    a sequence may have no KV, and its tiles are left out; the position is that of the first token
    if the last one stood at the end of the KV.
    """
    cu_seqlens_q_ptr, seq_lens_ptr, slot_ids_ptr, kv_starts_ptr, tickets = rows
    counter_ptr, num_rows, num_items = tickets
    num_tokens = 0
    token = 0
    position = 0
    kv_head = 0
    seq_len = 0
    slot = 0
    kv_start = 0
    while (num_tokens == 0) & (ticket < num_items):
        tile = (num_items - 1 - ticket) // KV_HEADS
        kv_head = ticket % KV_HEADS
        first_row = 0
        end_row = num_rows
        if kv_starts_ptr is not None:
            # With its prefix left out an item may be a single tile, and a step has thousands of
            # them: too little work to hide a look at all rows.
            span = _last_row(cu_seqlens_q_ptr, tile, 0, num_rows, _ROWS_AT_ONCE, BLOCK_Q)
            first_row = span * _ROWS_AT_ONCE
            end_row = gl.minimum(first_row + _ROWS_AT_ONCE, num_rows)
        row = first_row + _last_row(cu_seqlens_q_ptr, tile, first_row, end_row, 1, BLOCK_Q)
        query_start = gl.load(cu_seqlens_q_ptr + row).to(gl.int32)
        query_len = gl.load(cu_seqlens_q_ptr + row + 1).to(gl.int32) - query_start
        seq_len = gl.load(seq_lens_ptr + row).to(gl.int32)
        slot = gl.load(slot_ids_ptr + row).to(gl.int32)
        if kv_starts_ptr is not None:
            kv_start = gl.load(kv_starts_ptr + row).to(gl.int32)
            seq_len -= kv_start
        first = (tile - query_start // BLOCK_Q - row) * BLOCK_Q
        num_tokens = gl.maximum(gl.minimum(query_len - first, BLOCK_Q), 0)
        token = query_start + first
        position = seq_len - query_len + first
        if not IS_CAUSAL:
            num_tokens = gl.where(seq_len > 0, num_tokens, 0)
            position = seq_len - num_tokens
        ticket = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
    return ticket, num_tokens, token, position, kv_head, seq_len, slot, kv_start


@gluon.jit
def _load_lines(table_ptr, first_page, last_page, block_lines, first_line, PAGES: gl.constexpr):
    """Where the pages of a tile begin in a cache that is a matrix [lines, H]."""
    lines = ()
    for page in gl.static_range(PAGES):
        block = gl.load(table_ptr + gl.minimum(first_page + page, last_page))
        line = block * block_lines + first_line
        lines = lines + (line,)  # type: ignore[assignment]  # noqa: RUF005 (no stars in Gluon)
    return lines


@gluon.jit
def _load_tile(cache, boxes, stage, full, lines, PARTS: gl.constexpr):
    """Start the copy of a tile's pages into a stage, 64 dims after 64 dims."""
    PAGES: gl.constexpr = len(lines)
    mbarrier.expect(full.index(stage), PARTS * PAGES * boxes.shape[1] * BOX_DIMS * 2)
    for page in gl.static_range(PAGES):
        for part in gl.static_range(PARTS):
            box = boxes.index((stage * PARTS + part) * PAGES + page)
            _async_load(cache, [lines[page], part * BOX_DIMS], full.index(stage), box)


@gluon.jit
def load_items(
    q,
    k_cache,
    v_cache,
    table,
    rows,
    buffers,
    barriers,
    KV_HEADS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """The loading warp: queries and KV of one item after the other."""
    q_smem, k_smem, v_smem, record_E1 = buffers
    q_full, q_empty, k_full, v_full, kv_empty = barriers
    WARP_GROUPS: gl.constexpr = q_smem.shape[0]
    GROUP_TOKENS: gl.constexpr = q.block_shape[0]
    GROUP: gl.constexpr = q.block_shape[1]
    BLOCK_Q: gl.constexpr = WARP_GROUPS * GROUP_TOKENS
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_L: gl.constexpr = k_smem.shape[1]
    PAGE: gl.constexpr = k_cache.block_shape[0]
    PAGES: gl.constexpr = BLOCK_L // PAGE
    PARTS: gl.constexpr = k_smem.shape[2] // BOX_DIMS
    q_boxes = as_boxes(q_smem, [WARP_GROUPS * PARTS, GROUP_TOKENS, GROUP, BOX_DIMS])
    k_boxes = as_boxes(k_smem, [STAGES * PARTS * PAGES, PAGE, BOX_DIMS])
    v_boxes = as_boxes(v_smem, [STAGES * PARTS * PAGES, PAGE, BOX_DIMS])
    table_ptr, table_stride, block_lines = table
    stage = 0
    phase = 1
    count = 0
    ticket, num_tokens, token, position, kv_head, seq_len, slot, kv_start = _find_item(
        gl.program_id(0), rows, KV_HEADS, BLOCK_Q, IS_CAUSAL
    )
    while num_tokens > 0:
        slot_ptr = table_ptr + slot.to(gl.int64) * table_stride + kv_start // PAGE
        last_page = (seq_len - 1) // PAGE
        first_line = kv_head * PAGE
        lines = _load_lines(slot_ptr, 0, last_page, block_lines, first_line, PAGES)
        mbarrier.wait(q_empty, (count & 1) ^ 1)
        count += 1
        _write_entry(record_E1, _NUM_TOKENS, num_tokens)
        _write_entry(record_E1, _FIRST_TOKEN, token)
        _write_entry(record_E1, _FIRST_POSITION, position)
        _write_entry(record_E1, _KV_HEAD, kv_head)
        _write_entry(record_E1, _SEQ_LEN, seq_len)
        barrier()
        mbarrier.expect(q_full, WARP_GROUPS * PARTS * GROUP_ROWS * BOX_DIMS * 2)
        for group in gl.static_range(WARP_GROUPS):
            for part in gl.static_range(PARTS):
                origin = [token + group * GROUP_TOKENS, kv_head * GROUP, part * BOX_DIMS]
                _async_load(q, origin, q_full, q_boxes.index(group * PARTS + part))
        num_kv = gl.cdiv(position + num_tokens, BLOCK_L)
        for j in range(num_kv):
            # One tile ahead: a block's id is there when its turn comes.
            next_page = (j + 1) * PAGES
            next_lines = _load_lines(slot_ptr, next_page, last_page, block_lines, first_line, PAGES)
            mbarrier.wait(kv_empty.index(stage), phase)
            _load_tile(k_cache, k_boxes, stage, k_full, lines, PARTS)
            _load_tile(v_cache, v_boxes, stage, v_full, lines, PARTS)
            lines = next_lines
            stage, phase = advance(stage, phase, STAGES)
            # The next item is looked up while the warp groups have tiles in stock.
            if j == gl.minimum(num_kv, STAGES) - 1:
                ticket, num_tokens, token, position, kv_head, seq_len, slot, kv_start = _find_item(
                    ticket, rows, KV_HEADS, BLOCK_Q, IS_CAUSAL
                )
    mbarrier.wait(q_empty, (count & 1) ^ 1)
    _write_entry(record_E1, _NUM_TOKENS, 0)
    barrier()
    mbarrier.arrive(q_full)
