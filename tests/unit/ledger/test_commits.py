import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_factories import (
    FINGERPRINT,
    commit_all,
    local_storage,
    make_part,
    make_plan,
    make_results,
    open_ledger,
    steady,
)

from batchgen.errors import BatchgenError
from batchgen.ledger import RunCounts
from batchgen.ledger.commits import decode_commit, encode_dead_letters
from batchgen.ledger.plan import decode_job, encode_job
from batchgen.records import RowFailure, RowKey

JOB = decode_job(encode_job(FINGERPRINT, make_plan()), "job.json")
UNIT_1 = "commits/00000001.json"


def test_commit_is_read_back_by_the_next_run(tmp_path):
    ledger = open_ledger(local_storage(tmp_path), make_plan(3, 4))
    assert commit_all(ledger, 1)
    again = open_ledger(local_storage(tmp_path))
    assert again.committed == ledger.committed
    commit = again.committed[1]
    assert list(commit.parts) == make_part(make_results(ledger.plan.units[1]))
    assert commit.counts == RunCounts(
        total=4, ok=2, failed=1, skipped=1, prompt_tokens=20, output_tokens=4
    )
    assert commit.wall_s == 1.5
    assert not again.is_complete


def test_failed_rows_are_dead_letters_that_the_commit_names(tmp_path):
    ledger = open_ledger(local_storage(tmp_path))
    commit_all(ledger, 0)
    commit_all(ledger, 1)
    assert ledger.committed[0].dead_letters is None
    letters = ledger.committed[1].dead_letters
    assert letters is not None
    data = (tmp_path / letters.path).read_bytes()
    assert (letters.num_rows, letters.size_bytes) == (1, len(data))
    assert json.loads(data) == {
        "row_address": "in.parquet:1.0",
        "unit_id": 1,
        "index": 0,
        "kind": "empty_prompt",
        "message": "it is empty",
        "excerpt": "",
    }


def test_dead_letters_hold_any_text_and_are_in_row_order():
    failures = [
        RowFailure(
            key=RowKey(unit_id=0, index=index),
            address=f"a:{index}",
            kind="bad_record",
            message="broken \ud800 and\u2028\n\x00 “fine”",
        )
        for index in (2, 0)
    ]
    letters, data = encode_dead_letters(0, failures)
    assert (letters, data) == encode_dead_letters(0, failures[::-1])
    assert "“fine”" in data.decode("utf-8")
    read = [json.loads(line) for line in data.decode().split("\n")[:-1]]
    assert [row["index"] for row in read] == [0, 2]
    assert read[0]["message"] == failures[0].message


def test_rows_that_do_not_add_up_are_refused(tmp_path):
    ledger = open_ledger(local_storage(tmp_path))
    unit = ledger.plan.units[0]
    results = make_results(unit)
    for wrong in (results[:-1], [*results[:-1], results[0]], [*results, results[0]]):
        with pytest.raises(AssertionError):
            ledger.commit(unit, make_part(wrong), wrong, wall_s=1)
    with pytest.raises(AssertionError):
        ledger.commit(unit, make_part(results[:-1]), results, wall_s=1)
    with pytest.raises(AssertionError):
        ledger.commit(replace(unit, unit_id=1), make_part(results), results, wall_s=1)
    assert local_storage(tmp_path).list("commits") == []


def test_second_runner_is_told_and_takes_the_winners_commit(tmp_path):
    first, second = (open_ledger(local_storage(tmp_path)) for _ in range(2))
    assert commit_all(first, 0)
    assert not commit_all(second, 0)
    assert second.committed == first.committed
    assert second.counts() == first.counts()
    assert not commit_all(first, 0)


def test_commit_of_another_job_is_not_taken_for_ours(tmp_path):
    zombie = open_ledger(local_storage(tmp_path), make_plan(3, 2, uri="old.parquet"))
    (tmp_path / "job.json").unlink()
    ledger = open_ledger(local_storage(tmp_path))
    commit_all(zombie, 0)
    with pytest.raises(BatchgenError, match=r"00000000\.json is a commit of another job"):
        commit_all(ledger, 0)
    with pytest.raises(BatchgenError, match=r"00000000\.json is a commit of another job"):
        open_ledger(local_storage(tmp_path))


def test_lost_job_file_is_written_anew_for_the_same_job(tmp_path):
    commit_all(open_ledger(local_storage(tmp_path)), 0)
    (tmp_path / "job.json").unlink()
    assert list(open_ledger(local_storage(tmp_path)).committed) == [0]


def test_files_of_other_shapes_are_not_commits(tmp_path):
    commit_all(open_ledger(local_storage(tmp_path)), 0)
    for name in (".tmp-00000001.json", "00000001.json.tmp", "1.json", "notes.txt"):
        (tmp_path / "commits" / name).write_text("{")
    assert list(open_ledger(local_storage(tmp_path)).committed) == [0]


def change(data: bytes, **changes: object) -> bytes:
    return json.dumps({**json.loads(data), **changes}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-10],
        lambda data: b"\x00" * len(data),
        lambda data: change(data, unit_id=0),
        lambda data: change(data, unit_id="1"),
        lambda data: change(data, parts=[{"path": "x"}]),
        lambda data: change(data, counts={"total": 2, "ok": 2, "failed": 1, "skipped": 0}),
        lambda data: change(data, counts={"total": 1, "ok": 1, "failed": 0, "skipped": 0}),
    ],
)
def test_damaged_commit_is_named(tmp_path, damage):
    commit_all(open_ledger(local_storage(tmp_path)), 1)
    path = tmp_path / UNIT_1
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BatchgenError, match=r"commits/00000001\.json is damaged"):
        open_ledger(local_storage(tmp_path))


@steady
@given(st.binary(max_size=300))
def test_random_bytes_are_no_commit(data):
    with pytest.raises(BatchgenError, match=r"^where is damaged"):
        decode_commit(data, JOB, UNIT_1, "where")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@steady
@given(
    st.dictionaries(
        st.sampled_from(["job_id", "unit_id", "parts", "dead_letters", "counts", "wall_s"]),
        json_values,
    )
)
def test_wrong_json_is_no_commit(document):
    with pytest.raises(BatchgenError, match=r"^where is damaged"):
        decode_commit(json.dumps(document).encode(), JOB, UNIT_1, "where")
