"""The device part of a beam step between the model's logits and the next step's rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from batchgen.engine.beam_runner import BeamRunner
from batchgen.engine.beam_search import BeamSearch, BeamTables
from batchgen.engine.config import BeamOptions
from batchgen.engine.inputs import SlotState
from batchgen.kernels import reference

WIDTH, NUM_GROUPS, BLOCK_SIZE, VOCAB_SIZE = 3, 4, 4, 50


def runner_on(device: torch.device, copies: list[tuple[Tensor, ...]]) -> BeamRunner:
    """Notes the copies of blocks that it asks for, and has no model."""
    beams = BeamOptions(width=WIDTH, end_token_ids=[2])
    groups = {"num_groups": NUM_GROUPS, "device": device}
    ops = SimpleNamespace(copy_block_starts=lambda _, *forks: copies.append(forks))
    return BeamRunner(
        decoder=cast(Any, None),
        ops=cast(Any, ops),
        memory=cast(Any, SimpleNamespace(kv_PL2KSH=None, block_size=BLOCK_SIZE)),
        state=SlotState(num_rows=NUM_GROUPS * WIDTH, max_blocks=5, device=device),
        search=BeamSearch(beams, max_output_tokens=8, **groups),
        tables=BeamTables(width=WIDTH, block_size=BLOCK_SIZE, **groups),
        use_graphs=False,
        has_prefixes=False,
    )


def test_a_step_sets_the_rows_of_running_groups_alone() -> None:
    """Two groups, of which one is in its last step, and padding, with what a decode step reads."""
    copies: list[tuple[Tensor, ...]] = []
    runner = runner_on(torch.device("cpu"), copies)
    arrays = (np.array(x, dtype=np.int32) for x in ([2, 0], [6, 3], [14, 5]))
    runner._search.enter(*arrays)
    first_G, padded_G = torch.tensor([2, 0]), torch.tensor([2, 0, NUM_GROUPS])
    generator = torch.manual_seed(0)
    runner._go_on(first_G, runner._rows(first_G), torch.randn(2, VOCAB_SIZE, generator=generator))
    logits_BV = torch.randn(3 * WIDTH, VOCAB_SIZE, generator=generator)
    logits_BV[-WIDTH:] = torch.nan
    runner._go_on(padded_G, runner._rows(padded_G), logits_BV)
    state = runner.state
    slots = reference.read_slots(runner._rows(padded_G), state, None, block_size=BLOCK_SIZE)
    assert slots.seq_lens_B.tolist() == [8] * WIDTH + [0] * 2 * WIDTH
    assert (slots.slot_mapping_B[WIDTH:] == -1).all()
    assert state.active_R.nonzero()[:, 0].tolist() == [6, 7, 8]
    found = runner._search._tokens_MYW[2, 1].tolist()
    assert state.last_tokens_R[6:9].tolist() == found
    assert len(copies) == 2
    assert copies[0][3].tolist() == [False, True, True] * 2


def test_a_step_needs_no_value_on_the_host() -> None:
    """Tensors on `meta` have no values, so that a step which asks for one fails."""
    meta = torch.device("meta")
    runner = runner_on(meta, [])
    groups_G = torch.zeros(2, dtype=torch.int64, device=meta)
    rows_B = runner._rows(groups_G)
    runner._go_on(groups_G, rows_B, torch.zeros(2 * WIDTH, VOCAB_SIZE, device=meta))
    slots = reference.read_slots(rows_B, runner.state, None, block_size=BLOCK_SIZE)
    assert slots.seq_lens_B.device == meta
