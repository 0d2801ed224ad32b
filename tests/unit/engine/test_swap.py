"""Swapped blocks come back as they went, however they lie and wherever the host's chunks end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine import swap
from batchgen.engine.kv_memory import KVMemory
from batchgen.engine.step_plan import BlockCopies
from batchgen.engine.swap import SwapSpace
from batchgen.models.config import parse_config
from tests.benchmarks.workloads import LLAMA_8B

NUM_BLOCKS = 12
TINY = LLAMA_8B | {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def memory() -> KVMemory:
    return KVMemory(
        parse_config(TINY, source="test"),
        num_blocks=NUM_BLOCKS,
        block_size=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@settings(max_examples=50, deadline=None)
@given(
    st.permutations(range(NUM_BLOCKS)),
    st.permutations(range(NUM_BLOCKS)),
    st.permutations(range(NUM_BLOCKS)),
    st.integers(0, NUM_BLOCKS),
    st.integers(1, 5),
)
def test_blocks_come_back_as_they_went(
    memory: KVMemory,
    source: list[int],
    host: list[int],
    target: list[int],
    count: int,
    chunk_blocks: int,
) -> None:
    rows = memory.block_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap, "_CHUNK_BYTES", chunk_blocks * rows[0].nbytes)
        space = SwapSpace(memory, NUM_BLOCKS)
        rows.copy_(torch.randn_like(rows))
        before = rows.clone()
        out, on_host, back = (np.array(x[:count], dtype=np.int32) for x in (source, host, target))
        space.run(BlockCopies(source=out, target=on_host), None, is_awaited=True)
        rows.zero_()
        space.run(None, BlockCopies(source=on_host, target=back), is_awaited=True)
    expected = torch.zeros_like(before)
    expected[torch.from_numpy(back).long()] = before[torch.from_numpy(out).long()]
    assert torch.equal(rows, expected)
