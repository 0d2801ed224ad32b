"""Forks of beams: each beam reads its own history; few blocks are copied, and none that is full."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchgen.engine.beam_search import BeamSearch, BeamStep, BeamTables
from batchgen.engine.config import BeamOptions
from tests.unit.engine.labelled_blocks import CPU, Blocks

VOCAB_SIZE = 96
END_TOKENS = [2, 5]


def random_step(
    parents_GW: Sequence[Sequence[int]], kv_lens: Sequence[int], token: int
) -> BeamStep:
    parents = torch.tensor(parents_GW)
    return BeamStep(
        tokens_GW=torch.arange(parents.numel()).view_as(parents) + token,
        parents_GW=parents,
        is_running_G=torch.ones(len(parents_GW), dtype=torch.bool),
        kv_lens_G=torch.tensor(kv_lens, dtype=torch.int32),
    )


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([2, 4, 5, 16]), st.sampled_from([1, 2, 4, 16]))
def test_every_beam_reads_its_own_history(data: st.DataObject, width: int, block_size: int) -> None:
    """Any forks at all, at any place in a block; `Blocks.apply` holds what must be true."""
    num_steps = data.draw(st.integers(1, 3 * block_size + 2))
    lengths = data.draw(st.lists(st.integers(1, 2 * block_size + 1), min_size=2, max_size=2))
    blocks = Blocks(
        width=width, num_groups=2, block_size=block_size, max_len=max(lengths) + num_steps
    )
    for group, length in enumerate(lengths):
        blocks.admit(group, tuple(range(length)), length + num_steps)
    beams = st.lists(st.integers(0, width - 1), min_size=width, max_size=width)
    beams |= st.permutations(range(width))
    for index in range(num_steps):
        parents = [data.draw(beams) if index else [0] * width for _ in lengths]
        kv_lens = [length + index for length in lengths]
        blocks.apply([0, 1], random_step(parents, kv_lens, 100 + index * 2 * width))


def test_an_exchange_of_beams_copies_nothing_and_a_fork_copies_once() -> None:
    blocks = Blocks(width=4, num_groups=1, block_size=4, max_len=12)
    blocks.admit(0, (1, 2, 3, 4, 5), 12)
    copied = []
    steps = ([0, 0, 0, 0], [1, 0, 3, 2], [1, 1, 0, 3], [3, 3, 3, 3], [2, 3, 0, 1])
    for index, parents in enumerate(steps):
        before = int(blocks.tables.copied_blocks)
        blocks.apply([0], random_step([parents], [5 + index], 100 + 4 * index))
        copied.append(int(blocks.tables.copied_blocks) - before)
    # The block is full at the fourth step: all four go on from it, and none copies it.
    assert copied == [3, 0, 1, 0, 0]
    # Two whole blocks in common and the four that are filled, of 4 x 3.
    assert len(np.unique(blocks.table_RX[blocks.rows_GW[0]])) == 6


def run_on(device: torch.device, logits_kBV: Tensor, *, use_graph: bool) -> list[Tensor]:
    """Four groups and a padding group, with a step that is captured once where there are graphs."""
    options = BeamOptions(width=4, early_stopping=True, end_token_ids=END_TOKENS)
    search = BeamSearch(options, num_groups=4, max_output_tokens=16, device=device)
    tables = BeamTables(width=4, num_groups=4, block_size=4, device=device)
    groups_G = torch.tensor([2, 0, 3, 1, 4], device=device)
    rows_B = torch.arange(20, device=device).clamp_(max=16)
    table_RX = torch.arange(17 * 8, dtype=torch.int32, device=device).view(17, 8)
    table_RX[16] = 0
    logits_BV = logits_kBV[0].to(device, copy=True)

    def one_step() -> tuple[Tensor, ...]:
        step = search.step(groups_G, logits_BV)
        forks = tables.fork(groups_G, rows_B, table_RX, step)
        masked = (forks.source_B * forks.is_copied_B, forks.target_B * forks.is_copied_B)
        return step.tokens_GW * step.is_running_G[:, None], step.parents_GW, *masked

    if device.type != "meta":
        prompt_lens = np.array([3, 4, 5, 6], dtype=np.int32)
        arange = np.arange(4, dtype=np.int32)
        search.enter(arange, prompt_lens, prompt_lens + np.array([16, 9, 12, 3], dtype=np.int32))
    graph, captured, outs = None, None, []
    for logits in logits_kBV:
        logits_BV.copy_(logits)
        if graph is None or captured is None:
            outs += one_step()
        else:
            graph.replay()
            outs += [x.clone() for x in captured]
        if use_graph and graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # nothing runs here
                captured = one_step()
    counts = [tables.copied_blocks, tables.distinct_blocks, tables.beam_blocks]
    return [*outs, table_RX, search.is_done_M, *counts]


def test_a_step_needs_no_value_on_the_host() -> None:
    """Tensors on `meta` have no values, so that a step which asks for one fails."""
    meta = torch.device("meta")
    for tensor in run_on(meta, torch.zeros(2, 20, VOCAB_SIZE), use_graph=False):
        assert tensor.device == meta


@pytest.mark.gpu
def test_a_captured_step_does_what_the_cpu_does() -> None:
    logits_kBV = torch.randn(16, 20, 20_001, generator=torch.manual_seed(0)) * 3
    logits_kBV[5:, :, 2] += 20  # so that groups end
    expected = run_on(CPU, logits_kBV, use_graph=False)
    actual = run_on(torch.device("cuda"), logits_kBV, use_graph=True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)
