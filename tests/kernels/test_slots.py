"""The slot table's kernels against plain torch, and the rules of an end against a loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from batchgen.kernels import reference, slots
from batchgen.kernels.cases import generator

BLOCK_SIZE = 4
MAX_BLOCKS = 6
NUM_SLOTS = 300  # more than a program has
PADDING = NUM_SLOTS  # the last row belongs to nobody
VOCABULARY = 11


def slot_table(device: str) -> dict[str, Tensor]:
    """Random slots; finished ones may stand one past their last block."""
    rng = generator(device)

    def integers(low: int, high: int, dtype: torch.dtype) -> Tensor:
        shape = (NUM_SLOTS + 1,)
        return torch.randint(low, high, shape, generator=rng, device=device).to(dtype)

    table = torch.randint(
        0, 1 << 20, (NUM_SLOTS + 1, MAX_BLOCKS), generator=rng, device=device, dtype=torch.int32
    )
    active = integers(0, 2, torch.bool)
    active[PADDING] = False
    lengths = integers(0, BLOCK_SIZE * MAX_BLOCKS, torch.int32)
    lengths[~active] += 1
    return {
        "block_table_RX": table,
        "kv_lens_R": lengths,
        "active_R": active,
        "last_tokens_R": integers(0, VOCABULARY, torch.int64),
        "stop_lens_R": integers(1, BLOCK_SIZE * MAX_BLOCKS + 8, torch.int32),
        "ignore_eos_R": integers(0, 2, torch.bool),
    }


def batch_rows(device: str, count: int) -> Tensor:
    """Distinct slots in random order, padded as the engine pads a captured batch."""
    rows = torch.randperm(NUM_SLOTS, generator=generator(device, 1), device=device)[:count]
    return torch.cat([rows, torch.full((3,), PADDING, device=device)])


@pytest.mark.parametrize("count", [0, 1, 127, 290])
@pytest.mark.parametrize("prefix_len", [None, 4])
def test_read_slots(device: str, count: int, prefix_len: int | None) -> None:
    state = slot_table(device)
    rows = batch_rows(device, count)
    prefix = None
    if prefix_len is not None:
        prefix = torch.arange(len(rows), device=device).int() % 3 * prefix_len

    def read(read_slots: Callable[..., reference.SlotInputs]) -> dict[str, Tensor | None]:
        table = SimpleNamespace(**state)
        return dataclasses.asdict(read_slots(rows, table, prefix, block_size=BLOCK_SIZE))

    got, expected = read(slots.read_slots), read(reference.read_slots)
    for name, tensor in expected.items():
        mine = got[name]
        if tensor is None or mine is None:
            assert tensor is mine
        else:
            assert mine.dtype == tensor.dtype
            assert torch.equal(mine, tensor), name


def advance(module: object, state: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    function = module.advance_slots  # type: ignore[attr-defined]
    result: Tensor = function(*inputs, SimpleNamespace(**state))
    return result


def advance_inputs(
    state: dict[str, Tensor], device: str, eos: list[int], stops: list[int]
) -> tuple[Tensor, ...]:
    rows = batch_rows(device, 290)
    active = state["active_R"][rows]
    lengths = torch.where(active, state["kv_lens_R"][rows] + 1, 0)
    size = (len(rows),)
    sampled = torch.randint(0, VOCABULARY, size, generator=generator(device, 2), device=device)
    logits = torch.randn(len(rows), VOCABULARY, generator=generator(device, 3), device=device)
    logits[::7] = torch.nan
    ends = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in (eos, stops))
    return rows, lengths, sampled, logits, *ends


@pytest.mark.parametrize(("eos", "stops"), [([], []), ([3], []), ([3, 5], [7]), ([], [1, 2, 9])])
def test_advance_slots(device: str, eos: list[int], stops: list[int]) -> None:
    state, expected_state = slot_table(device), slot_table(device)
    inputs = advance_inputs(state, device, eos, stops)
    got = advance(slots, state, inputs)
    assert torch.equal(got, advance(reference, expected_state, inputs))
    for name, tensor in expected_state.items():
        assert torch.equal(state[name], tensor), name


def test_a_slot_ends_where_the_rules_say(device: str) -> None:
    eos, stops = [3, 5], [7]
    state = slot_table(device)
    before = {name: tensor.tolist() for name, tensor in state.items()}
    inputs = advance_inputs(state, device, eos, stops)
    got = advance(slots, state, inputs).tolist()
    rows, lengths, sampled, logits = (tensor.tolist() for tensor in inputs[:4])
    for index, row in enumerate(rows):
        if not before["active_R"][row]:
            assert got[index] == -1
            assert not bool(state["active_R"][row])
            continue
        token = sampled[index]
        is_nan = logits[index][0] != logits[index][0]
        assert got[index] == (reference.NAN_TOKEN if is_nan else token)
        ends = token in stops or (token in eos and not before["ignore_eos_R"][row])
        ends = ends or lengths[index] + 1 >= before["stop_lens_R"][row]
        assert bool(state["active_R"][row]) != ends
        assert int(state["kv_lens_R"][row]) == lengths[index]
        assert int(state["last_tokens_R"][row]) == token
