"""The scheduler with a stand-in device: every token accounted for, whatever the KV's size."""

from __future__ import annotations

import itertools
import random
import time
from array import array

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchgen.engine import prefill_groups
from batchgen.engine.kv_cache import block_hashes
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.sequences import SchedulerConfig
from batchgen.engine.step_plan import DecodePlan, StepPlan
from batchgen.records import Prompt, RowKey

UNREADABLE = -2  # the label of a slot while its content is on its way


def config(**changes: int | bool | None) -> SchedulerConfig:
    values: dict[str, int | bool | None] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "decode_window": 4,
        "block_size": 4,
        "gpu_blocks": 64,
        "cpu_blocks": 64,
        "enable_prefix_caching": True,
        "merge_duplicates": False,
        "min_prefix_saving": 1,
        "prefill_tile_tokens": 4,
    }
    return SchedulerConfig(**(values | changes))  # type: ignore[arg-type]


def prompt(
    index: int, tokens: list[int], max_tokens: int, *, ignore_eos: bool = False, n: int = 1
) -> Prompt:
    key = RowKey(unit_id=0, index=index)
    seeds = tuple(output_key(index, sample) for sample in range(n))
    return Prompt(
        key=key,
        token_ids=array("i", tokens),  # as prompts.builder makes them
        max_tokens=max_tokens,
        seeds=seeds,
        ignore_eos=ignore_eos,
    )


def output_key(index: int, sample: int) -> int:
    """Names a sample; the first one of a prompt by the prompt's own index."""
    return index + 1000 * sample


class StandInDevice:
    """Keeps a label for each KV slot, moves labels as plans say, and checks what is read.

    The label of a slot is (sequence id or prefix content, position); reading a wrong or unwritten
    label fails. Sequences end after `length_of[output key]` tokens.
    """

    def __init__(self, scheduler: Scheduler, length_of: dict[int, int]) -> None:
        self.scheduler = scheduler
        self.length_of = length_of
        c = scheduler.config
        self.gpu = np.full((c.gpu_blocks, c.block_size), -1, dtype=np.int64)
        self.cpu = np.full((c.cpu_blocks, c.block_size), -1, dtype=np.int64)
        self.table = np.zeros_like(scheduler.kv.table_RX)
        self.prompts: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}  # row -> prompt and output
        self.kv_len: dict[int, int] = {}
        self.alive: dict[int, bool] = {}
        self.stop_len: dict[int, int] = {}
        self.prefilled_tokens = 0
        self.copied_blocks = 0
        self.num_groups = 0
        self.num_swaps = 0  # steps with any
        self.num_waits = 0

    def label(self, row: int, position: int) -> int:
        return hash(tuple(self.tokens[row][: position + 1]))

    def write(self, row: int, position: int) -> None:
        size = self.scheduler.config.block_size
        self.gpu[self.table[row, position // size], position % size] = self.label(row, position)

    def read_all(self, row: int, length: int) -> None:
        size = self.scheduler.config.block_size
        for position in range(length):
            got = self.gpu[self.table[row, position // size], position % size]
            assert got == self.label(row, position), f"row {row} reads a wrong KV at {position}"

    def launch(self, plan: StepPlan) -> dict[int, tuple[int, bool]]:
        """Returns row -> (tokens made, still active)."""
        out, into = plan.swap_out, plan.swap_in
        self.num_swaps += out is not None or into is not None
        if out is not None:
            leaving = self.gpu[out.source].copy()
            self.cpu[out.target] = leaving
        if into is not None:
            self.gpu[into.target] = self.cpu[into.source] if plan.waits_for_swaps else UNREADABLE
        made = self._run(plan)
        if plan.waits_for_swaps:
            self.num_waits += 1
            return made
        # The copies ran beside the step: at any time of it they found and left the same.
        if out is not None:
            assert np.array_equal(self.gpu[out.source], leaving)
        if into is not None:
            assert (self.gpu[into.target] == UNREADABLE).all()
            self.gpu[into.target] = self.cpu[into.source]
        return made

    def _run(self, plan: StepPlan) -> dict[int, tuple[int, bool]]:
        if plan.copies is not None:
            self.gpu[plan.copies.target] = self.gpu[plan.copies.source]
            self.copied_blocks += len(plan.copies.target)
        if plan.table is not None:
            self.table[plan.table.rows, plan.table.columns] = plan.table.blocks
        return self._prefill(plan) if plan.prefill is not None else self._decode(plan)

    def _prefill(self, plan: StepPlan) -> dict[int, tuple[int, bool]]:
        p = plan.prefill
        assert p is not None
        assert len(p.token_ids) <= self.scheduler.config.max_num_batched_tokens
        self.prefilled_tokens += len(p.token_ids)
        for row, tokens, stop in zip(p.new.rows, p.new.prompts, p.new.stop_lens, strict=True):
            self.tokens[int(row)] = tokens.tolist()
            self.stop_len[int(row)] = int(stop)
        made = {}
        starts = np.cumsum(p.query_lens) - p.query_lens
        for i, row in enumerate(p.rows.tolist()):
            first = int(p.seq_lens[i] - p.query_lens[i])
            chunk = p.token_ids[starts[i] : starts[i] + p.query_lens[i]].tolist()
            assert chunk == self.tokens[row][first : first + len(chunk)]
            for position in range(first, int(p.seq_lens[i])):
                self.write(row, position)
        if p.slot_copies is not None:
            flat = self.gpu.reshape(-1)
            assert not set(p.slot_copies.source.tolist()) & set(p.slot_copies.target.tolist())
            flat[p.slot_copies.target] = flat[p.slot_copies.source]
        for i, row in enumerate(p.rows.tolist()):
            self.read_all(row, int(p.seq_lens[i]))
        ended = np.flatnonzero(p.is_last)
        for row, index in zip(p.sample_rows.tolist(), ended[p.sample_of].tolist(), strict=True):
            self.kv_len[row] = int(p.seq_lens[index])
            self.read_all(row, self.kv_len[row])
            made[row] = self._sample(row)
        return made

    def _sample(self, row: int) -> tuple[int, bool]:
        index = key_in(self.scheduler, row)
        self.tokens[row].append(1000 * (index + 1) + len(self.tokens[row]))
        generated = self.kv_len[row] + 1 - int(self.scheduler.table.prompt_len_R[row])
        total = len(self.tokens[row])
        self.alive[row] = generated < self.length_of[index] and total < self.stop_len[row]
        return 1, self.alive[row]

    def _decode(self, plan: StepPlan) -> dict[int, tuple[int, bool]]:
        assert plan.decode is not None
        self._check_groups(plan.decode)
        made = {}
        for row in plan.decode.rows.tolist():
            count = 0
            for _ in range(plan.decode.num_steps):
                if not self.alive[row]:
                    break
                self.write(row, self.kv_len[row])
                self.kv_len[row] += 1
                self.read_all(row, self.kv_len[row])
                count += self._sample(row)[0]
            made[row] = (count, self.alive[row])
        return made

    def _check_groups(self, plan: DecodePlan) -> None:
        """A group's blocks are the first of each member, full before the step begins."""
        if plan.groups is None:
            return
        self.num_groups += len(plan.groups.blocks)
        for index, blocks in enumerate(plan.groups.blocks):
            first, end = plan.groups.cu_members[index : index + 2].tolist()
            for row in plan.rows[plan.groups.members[first:end]].tolist():
                assert np.array_equal(self.table[row, : len(blocks)], blocks)
                if self.alive[row]:
                    assert self.kv_len[row] >= len(blocks) * self.scheduler.config.block_size


def key_in(scheduler: Scheduler, row: int) -> int:
    return output_key(scheduler.key_of(row).index, int(scheduler.table.sample_R[row]))


def run(
    scheduler: Scheduler,
    prompts: list[Prompt],
    lengths: dict[int, int],
    lateness: int = 1,
    device: StandInDevice | None = None,
) -> dict[int, int]:
    """Runs all prompts, reading results some steps late as the engine does on a GPU."""
    device = device or StandInDevice(scheduler, lengths)
    scheduler.add(prompts)
    generated: dict[int, int] = dict.fromkeys(lengths, 0)
    finished: dict[int, int] = {}
    in_flight: list[tuple[StepPlan, dict[int, tuple[int, bool]]]] = []
    for _ in range(20_000):
        plan = scheduler.schedule(in_flight=bool(in_flight))
        if plan is not None:
            scheduler.check_integrity()
            in_flight.append((plan, device.launch(plan)))
        if in_flight and (plan is None or len(in_flight) > lateness):
            done, made = in_flight.pop(0)
            for row, sequence_id in zip(done.rows.tolist(), done.sequence_ids, strict=True):
                if scheduler.table.sequence_id_R[row] != sequence_id:
                    continue
                index = key_in(scheduler, row)
                generated[index] += made[row][0]
                if not made[row][1]:
                    scheduler.finish(row, generated[index])
                    finished[index] = generated[index]
        elif plan is None:
            assert not scheduler.num_live
            assert not scheduler.admission.waiting
            scheduler.kv.gpu.check_integrity([])
            scheduler.kv.cpu.check_integrity([])
            return finished
    raise AssertionError("no end in sight")


def test_all_prompts_end_with_their_lengths() -> None:
    prompts = [prompt(i, list(range(100 * i, 100 * i + 5 + i)), 10) for i in range(20)]
    lengths = {i: 1 + i % 10 for i in range(20)}
    assert run(Scheduler(config()), prompts, lengths) == lengths


def test_a_shared_prefix_is_prefilled_once_even_within_one_step() -> None:
    prefix = list(range(32))
    prompts = [prompt(i, [*prefix, 100 + i, 200 + i], 2) for i in range(8)]
    scheduler = Scheduler(config(max_num_batched_tokens=256, gpu_blocks=128))
    run(scheduler, prompts, dict.fromkeys(range(8), 2))
    assert scheduler.counters.cached_prompt_tokens == 7 * 32
    assert scheduler.counters.prefill_steps == 1


def test_rows_that_share_a_prefix_are_grouped_where_that_pays() -> None:
    prompts = [prompt(i, [i % 3] * 8 + [100 + i, 200 + i], 12) for i in range(8)]
    lengths = dict.fromkeys(range(8), 12)
    scheduler = Scheduler(config(max_num_batched_tokens=256))
    run(scheduler, prompts, lengths)
    assert scheduler.counters.prefix_blocks_saved == 11 * (8 - 3) * 2
    scheduler = Scheduler(config(max_num_batched_tokens=256, min_prefix_saving=11))
    run(scheduler, prompts, lengths)
    assert scheduler.counters.prefix_blocks_saved == 0


def test_chunks_that_share_a_prefix_are_grouped_where_that_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompt that computes the prefix is no member; the others' tokens fill tiles of four."""
    monkeypatch.setattr(prefill_groups, "MERGE_COST_TOKENS", 1)
    prefixes = [[i] * 8 for i in (1, 2)]
    prompts = [prompt(i, [*prefixes[i // 4], 100 + i, 200 + i], 2) for i in range(8)]
    lengths = dict.fromkeys(range(8), 2)
    scheduler = Scheduler(config(max_num_batched_tokens=256))
    scheduler.add(prompts)
    plan = scheduler.schedule(in_flight=False)
    assert plan is not None
    assert plan.prefill is not None
    assert plan.prefill.groups is not None
    assert plan.prefill.groups.cu_chunks.tolist() == [0, 1, 4, 5, 8]
    assert plan.prefill.groups.prefix_lens.tolist() == [0, 8, 0, 8]
    assert scheduler.counters.prefill_blocks_saved == 2 * (3 - 2) * 2
    for none in ({"min_prefix_saving": 5}, {"min_prefix_saving": None}):
        scheduler = Scheduler(config(max_num_batched_tokens=256, **none))
        run(scheduler, prompts, lengths)
        assert scheduler.counters.prefill_blocks_saved == 0


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=16))
    run(scheduler, [prompt(0, list(range(50)), 3)], {0: 3})
    assert scheduler.counters.prefill_steps == 4


def test_small_kv_swaps_and_computes_no_prompt_token_twice() -> None:
    rng = random.Random(0)
    prompts = [prompt(i, [rng.randrange(9**9) for _ in range(8)], 40) for i in range(30)]
    scheduler = Scheduler(config(gpu_blocks=24, cpu_blocks=200))
    device_lengths = dict.fromkeys(range(30), 40)
    assert run(scheduler, prompts, device_lengths) == device_lengths
    counters = scheduler.counters
    assert counters.swapped_out_blocks > 0
    assert counters.swapped_in_blocks == counters.swapped_out_blocks
    assert counters.prompt_tokens == 30 * 8


def test_few_steps_wait_for_swaps() -> None:
    rng = random.Random(0)
    prompts = [prompt(i, [rng.randrange(9**9) for _ in range(8)], 40) for i in range(200)]
    lengths = {i: rng.randint(1, 40) for i in range(200)}
    scheduler = Scheduler(config(gpu_blocks=48, cpu_blocks=800, max_num_seqs=32))
    device = StandInDevice(scheduler, lengths)
    assert run(scheduler, prompts, lengths, device=device) == lengths
    assert device.num_swaps > 50
    assert device.num_waits <= 1


def test_known_lengths_are_admitted_without_any_swap() -> None:
    prompts = [prompt(i, [1000 * i + j for j in range(8)], 40, ignore_eos=True) for i in range(30)]
    scheduler = Scheduler(config(gpu_blocks=48, cpu_blocks=200))
    run(scheduler, prompts, dict.fromkeys(range(30), 40))
    assert scheduler.counters.swapped_out_blocks == 0


def test_prompts_that_are_left_over_do_not_wait_for_a_full_step() -> None:
    scheduler = Scheduler(config(max_num_seqs=64, gpu_blocks=1024))
    scheduler.add([prompt(i, [i] * 8, 9) for i in range(33)])
    in_prefill = 0
    while (plan := scheduler.schedule(in_flight=False)) is not None and plan.prefill is not None:
        in_prefill += len(plan.prefill.new.rows)
    assert in_prefill == 33, "a prompt decodes after all others"


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_hashes_taken_over_from_another_prompt_are_the_same(
    common: int, own: int, others: int
) -> None:
    shared = np.arange(common, dtype=np.int32)
    ids = np.concatenate([shared, np.full(own, 1000, dtype=np.int32)])
    other_ids = np.concatenate([shared, np.full(others, 2000, dtype=np.int32)])
    assert block_hashes(ids, 4, (other_ids, block_hashes(other_ids, 4))) == block_hashes(ids, 4)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    block_size=st.sampled_from([2, 4, 8]),
    spare_blocks=st.sampled_from([0, 1, 3, 20, 60]),
    host_share=st.sampled_from([0.0, 0.5, 1.0, 2.5, 20.0]),
    window=st.sampled_from([1, 4, 16]),
    caching=st.booleans(),
    batched=st.sampled_from([7, 24, 64, 512]),
    lateness=st.sampled_from([0, 1, 4]),
    most_samples=st.sampled_from([1, 3, 8]),
)
@example(  # a block is read by a copy of the step in which another prompt wants a block
    seed=968036,
    block_size=8,
    spare_blocks=1,
    host_share=20.0,
    window=4,
    caching=True,
    batched=7,
    lateness=4,
    most_samples=1,
)
def test_any_job_ends_with_every_token_right(
    seed: int,
    block_size: int,
    spare_blocks: int,
    host_share: float,
    window: int,
    caching: bool,
    batched: int,
    lateness: int,
    most_samples: int,
) -> None:
    rng = random.Random(seed)
    prefixes = [[rng.randrange(50) for _ in range(rng.choice([0, 3, 9, 17]))] for _ in range(3)]
    prompts, lengths = [], {}
    for i in range(rng.randint(1, 40)):
        tokens = [*rng.choice(prefixes), *(rng.randrange(50) for _ in range(rng.randint(1, 20)))]
        max_tokens = rng.randint(1, 64 - len(tokens))
        exact = rng.random() < 0.3
        n = rng.randint(1, most_samples)
        for sample in range(n):
            length = max_tokens if exact else rng.randint(1, max_tokens)
            lengths[output_key(i, sample)] = length
        prompts.append(prompt(i, tokens, max_tokens, ignore_eos=exact, n=n))
    scheduler = Scheduler(
        config(
            block_size=block_size,
            gpu_blocks=64 // block_size + (most_samples > 1) + spare_blocks,
            cpu_blocks=int(host_share * 64 // block_size),
            decode_window=window,
            enable_prefix_caching=caching,
            max_num_batched_tokens=batched,
        )
    )
    scheduler.admission.output_lengths.MIN_SAMPLES = 2
    assert run(scheduler, prompts, lengths, lateness) == lengths


def test_a_forecast_is_made_while_a_prompt_is_prefilled_in_part() -> None:
    rng = random.Random(3)
    prompts, lengths = [], {}
    for i in range(200):
        prompts.append(prompt(i, [rng.randrange(50) for _ in range(rng.randint(5, 20))], 30))
        lengths[i] = rng.randint(1, 20)
    scheduler = Scheduler(config(max_num_batched_tokens=24))
    assert run(scheduler, prompts, lengths) == lengths


@pytest.mark.parametrize("batch", [1024, 4096])
def test_planning_a_window_takes_little_and_does_not_loop_over_sequences(batch: int) -> None:
    scheduler = Scheduler(
        config(
            max_num_seqs=batch,
            max_num_batched_tokens=10**6,
            max_model_len=4096,
            decode_window=16,
            block_size=16,
            gpu_blocks=batch * 256,
            cpu_blocks=0,
            enable_prefix_caching=False,
        )
    )
    scheduler.add(prompt(i, [i] * 16, 2000, ignore_eos=True) for i in range(batch))
    while len(scheduler.table.decodable()) < batch:
        assert scheduler.schedule(in_flight=False) is not None
    times = []
    for _ in range(20):
        start = time.perf_counter()
        plan = scheduler.schedule(in_flight=True)
        times.append(time.perf_counter() - start)
        assert plan is not None
        assert plan.decode is not None
        assert len(plan.decode.rows) == batch
    assert sorted(times)[10] < 0.005


def test_equal_prompts_are_computed_once() -> None:
    scheduler = Scheduler(config(merge_duplicates=True))
    prompts = [prompt(i, [5, 6, 7, i % 3], 4) for i in range(9)]
    prompts += [prompt(9, [5, 6, 7, 0], 5), prompt(10, [5, 6, 7, 0], 4, ignore_eos=True)]
    scheduler.add(prompts)
    assert scheduler.counters.merged_prompts == 6
    together = {
        (item.prompt.key.index, *(other.key.index for other in item.duplicates))
        for item in scheduler.admission.waiting
    }
    assert together == {(0, 3, 6), (1, 4, 7), (2, 5, 8), (9,), (10,)}


def test_the_longest_rows_do_not_start_last() -> None:
    rng = random.Random(0)
    scheduler = Scheduler(config())
    scheduler.add(prompt(i, [i] * rng.randint(4, 20), rng.randint(1, 40)) for i in range(100))
    lengths = [item.num_prompt_tokens + item.max_tokens for item in scheduler.admission.waiting]
    assert lengths == sorted(lengths, reverse=True)


def test_rows_that_share_a_prefix_stay_together_longest_first() -> None:
    scheduler = Scheduler(config())
    prefixes = [[1] * 4, [2] * 4, [3] * 4]
    scheduler.add(prompt(i, prefixes[i % 3] + [9] * (i % 7), 5) for i in range(30))
    order = [
        (int(item.token_ids[0]), item.num_prompt_tokens) for item in scheduler.admission.waiting
    ]
    groups = [prefix for prefix, _ in order]
    assert sum(a != b for a, b in itertools.pairwise(groups)) == 2
    for prefix in (1, 2, 3):
        lengths = [length for group, length in order if group == prefix]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("batched", [64, 4096])
def test_each_distinct_token_is_computed_once(batched: int) -> None:
    """Prompts that fork anywhere in a block, in random order: as many tokens as the trie has."""
    rng = random.Random(5)
    stems = [[rng.randrange(3) for _ in range(rng.randint(0, 30))] for _ in range(12)]
    tokens = [
        [*rng.choice(stems)[: rng.randint(0, 30)], 7, *(rng.randrange(3) for _ in range(9))]
        for _ in range(150)
    ]
    tokens = [[*ids, 100 + i] for i, ids in enumerate(tokens)]  # none is the beginning of another
    lengths = {i: 1 + i % 9 for i in range(150)}
    prompts = [prompt(i, ids, 9) for i, ids in enumerate(tokens)]
    scheduler = Scheduler(config(max_num_batched_tokens=batched, gpu_blocks=3000))
    assert run(scheduler, prompts, lengths) == lengths
    distinct = {tuple(ids[: end + 1]) for ids in tokens for end in range(len(ids))}
    counters = scheduler.counters
    assert counters.prompt_tokens - counters.cached_prompt_tokens == len(distinct)
