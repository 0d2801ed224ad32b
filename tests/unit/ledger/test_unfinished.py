"""Tokens of rows that were cut off: what comes back, what supersedes what, and damaged files."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_factories import (
    FINGERPRINT,
    commit_all,
    local_storage,
    make_plan,
    make_results,
    open_ledger,
    steady,
    with_keys_as_objects,
)

from batchgen.errors import BatchgenError
from batchgen.ledger.plan import StoredJob, decode_job, encode_job
from batchgen.ledger.unfinished import decode_unfinished, encode_unfinished
from batchgen.records import RowKey, SampleProgress, UnfinishedRow

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
running = st.builds(SampleProgress, token_ids=token_ids, finish_reason=st.none())
sample = st.builds(
    SampleProgress, token_ids=token_ids, finish_reason=st.sampled_from(["stop", "length", None])
)
unfinished_row = st.builds(
    UnfinishedRow,
    key=st.builds(RowKey, unit_id=st.integers(0, 10**6), index=st.integers(0, 10**6)),
    samples=st.tuples(st.lists(sample, max_size=3), running, st.lists(sample, max_size=3)).map(
        lambda parts: (*parts[0], parts[1], *parts[2])
    ),
)


def make_job() -> StoredJob:
    return decode_job(encode_job(FINGERPRINT, make_plan()), "job.json")


def make_row(unit_id: int, index: int, num_tokens: int) -> UnfinishedRow:
    ids = tuple(range(10, 10 + num_tokens))
    return UnfinishedRow(
        key=RowKey(unit_id=unit_id, index=index),
        samples=(SampleProgress(token_ids=ids, finish_reason=None),),
    )


def by_key(*rows: UnfinishedRow) -> dict[RowKey, UnfinishedRow]:
    return {row.key: row for row in rows}


@steady
@given(st.lists(unfinished_row, max_size=5))
def test_rows_come_back_exactly(rows):
    job = make_job()
    assert decode_unfinished(encode_unfinished(rows, job_id=job.job_id), job, "where") == rows


def test_rows_of_earlier_versions_come_back():
    job = make_job()
    rows = [make_row(0, 1, 3), make_row(1, 0, 2)]
    data = encode_unfinished(rows, job_id=job.job_id)
    assert decode_unfinished(with_keys_as_objects(data), job, "where") == rows


def test_every_truncation_and_every_changed_byte_is_noticed():
    job = make_job()
    data = encode_unfinished([make_row(0, 1, 3), make_row(1, 0, 2)], job_id=job.job_id)
    broken = [data[:length] for length in range(len(data))] + [data + b"\0\0\0\0"]
    for i in range(len(data)):
        broken.append(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
    for bad in broken:
        with pytest.raises(BatchgenError, match=r"^where is damaged"):
            decode_unfinished(bad, job, "where")


@steady
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_no_rows(data, has_magic):
    with pytest.raises(BatchgenError, match=r"^where is damaged"):
        decode_unfinished(b"BGTOKS1\n" * has_magic + data, make_job(), "where")


def test_a_row_that_has_ended_is_not_resumed():
    ended = SampleProgress(token_ids=(5,), finish_reason="stop")
    row = UnfinishedRow(key=RowKey(unit_id=0, index=0), samples=(ended, ended))
    job = make_job()
    with pytest.raises(BatchgenError, match="every sample has ended"):
        decode_unfinished(encode_unfinished([row], job_id=job.job_id), job, "where")


def test_of_several_runs_the_furthest_counts_and_finished_rows_are_left_out(tmp_path):
    storage = local_storage(tmp_path)
    plan = make_plan(3, 4, 2)
    first = open_ledger(storage, plan)
    first.save_unfinished([make_row(0, 0, 5), make_row(0, 1, 5), make_row(2, 1, 4)])
    other = open_ledger(storage)  # a second runner, which loaded nothing
    other.save_unfinished([make_row(0, 0, 3), make_row(0, 1, 8), make_row(1, 3, 2)])
    third = open_ledger(storage)
    assert third.load_unfinished({}) == by_key(
        make_row(0, 0, 5), make_row(0, 1, 8), make_row(1, 3, 2), make_row(2, 1, 4)
    )
    third.flush_partial(make_results(plan.units[0], 0, 1))
    commit_all(third, 2)
    last = open_ledger(storage)
    assert last.load_unfinished(last.load_partials()) == by_key(
        make_row(0, 1, 8), make_row(1, 3, 2)
    )


def test_a_runs_file_takes_the_place_of_those_before_it(tmp_path):
    storage = local_storage(tmp_path)
    open_ledger(storage, make_plan(9)).save_unfinished([make_row(0, i, 4) for i in range(4)])
    second = open_ledger(storage)
    second.load_unfinished({})
    second.flush_partial(make_results(second.plan.units[0], 0, 1))
    second.save_unfinished([make_row(0, 1, 6), make_row(0, 2, 1), make_row(0, 7, 3)])
    assert len(storage.list("unfinished")) == 1
    rows = (make_row(0, 1, 6), make_row(0, 2, 4), make_row(0, 3, 4), make_row(0, 7, 3))
    assert open_ledger(storage).load_unfinished({}) == by_key(*rows)


def test_a_damaged_file_costs_its_rows_only(tmp_path, caplog):
    storage = local_storage(tmp_path)
    for index in (0, 1):
        open_ledger(storage, make_plan(9)).save_unfinished([make_row(0, index, 4)])
    path = storage.list("unfinished")[0]
    storage.put(path, storage.read(path)[:-1])
    with caplog.at_level(logging.WARNING):
        loaded = open_ledger(storage).load_unfinished({})
    assert len(loaded) == 1
    assert "generated from their start" in caplog.text


def test_a_finished_job_keeps_no_tokens(tmp_path):
    storage = local_storage(tmp_path)
    ledger = open_ledger(storage)
    ledger.save_unfinished([make_row(0, 0, 4)])
    for unit in ledger.plan.units:
        commit_all(ledger, unit.unit_id)
    ledger.finish()
    assert storage.list("unfinished") == []
