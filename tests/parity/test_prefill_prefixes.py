"""Shared prefixes of prefill steps read once a group, through the CUDA kernels on the interpreter.

The engine is a CPU's but for its ops: transformers' greedy tokens, whatever is grouped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from batchgen.engine import build, prefill_groups
from tests.parity.test_engine import complete, engine_for, greedy, prompts_for
from tests.parity.tiny_models import save_tiny_model, tiny_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is off where there is a GPU"
)


@pytest.fixture
def cuda_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines on a CPU with the ops of a GPU, and groups wherever they save a tile."""
    from batchgen.engine.cuda_ops import CudaOps

    def ops(model, memory, state, cos_sin_MH, _dtype, quantization):  # type: ignore[no-untyped-def]
        return CudaOps(model, memory, state, cos_sin_MH, quantization)

    monkeypatch.setattr(build, "_ops", ops)
    monkeypatch.setattr(build, "_min_prefix_saving", lambda *_: 1)
    monkeypatch.setattr(prefill_groups, "MERGE_COST_TOKENS", 0)


@pytest.mark.usefixtures("cuda_ops")
def test_groups_change_no_token(tmp_path: Path) -> None:
    """Two prefixes that begin alike, members of several steps, and chunks that share nothing."""
    save_tiny_model("qwen3", tmp_path)
    model = tiny_model("qwen3")
    starts = [list(range(20, 60)), [*range(20, 44), *range(70, 110)], []]
    prompts = [
        dataclasses.replace(prompt, token_ids=[*starts[index % 3], *prompt.token_ids[-9:]])
        for index, prompt in enumerate(prompts_for(11, max_tokens=2))
    ]
    engine = engine_for(tmp_path, device="cpu", max_num_batched_tokens=130)
    completions = complete(engine, prompts)
    assert engine.stats().prefill_steps > 1
    assert engine.stats().prefill_blocks_saved > 0
    for prompt in prompts:
        assert list(completions[prompt.key.index].token_ids) == greedy(model, prompt)
