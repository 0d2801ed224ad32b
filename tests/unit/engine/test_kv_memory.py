from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchgen.engine.kv_memory import KVMemory
from batchgen.models.config import parse_config

CONFIG = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    source="config.json",
)


def resident_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_cpu_the_cache_is_zeros_that_take_no_memory_until_they_are_written(
    dtype: torch.dtype,
) -> None:
    before = resident_mib()
    block = CONFIG.num_layers * 2 * CONFIG.num_kv_heads * 16 * CONFIG.head_dim
    num_blocks = (1 << 30) // (block * dtype.itemsize)
    memory = KVMemory(
        CONFIG, num_blocks=num_blocks, block_size=16, dtype=dtype, device=torch.device("cpu")
    )
    assert memory.kv_PL2KSH.nbytes > 1000 << 20
    assert memory.kv_PL2KSH.is_contiguous()
    assert memory.kv_PL2KSH.data_ptr() % 4096 == 0
    assert not memory.kv_PL2KSH[:: num_blocks // 7].any()
    assert resident_mib() - before < 100
    memory.kv_PL2KSH[5] = 1
    assert memory.block_rows[5].all()
    assert not memory.block_rows[4].any()
    assert not memory.block_rows[6].any()
