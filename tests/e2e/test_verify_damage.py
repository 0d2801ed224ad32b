"""Whatever is wrong with an output, `verify` finds and names it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from verify_outputs import KINDS, NUM_PARTS, Output, commit_path, flip, flipped

from batchgen.errors import VerifyError
from batchgen.ledger.audit import content_problem
from batchgen.verify import verdict


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_output_is_right_and_any_flipped_byte_is_found(
    tmp_path: Path, make_output: Callable[..., Output], kind: tuple[str, str | None]
) -> None:
    output = make_output(tmp_path, kind)
    receipt = output.verify()
    assert receipt.differences == []
    assert verdict(receipt) is None
    assert len(receipt.parts) == NUM_PARTS
    assert (receipt.state, receipt.is_right, receipt.leftovers) == ("done", True, [])
    positions = random.Random(7)
    for part in receipt.parts:
        for position in (0, part.size_bytes - 1, positions.randrange(part.size_bytes)):
            data = flip(output.storage, part.path, position)
            receipt = output.verify()
            assert [each.path for each in receipt.differences] == [part.path]
            assert "other bytes than were committed" in receipt.differences[0].problem
            assert isinstance(verdict(receipt), VerifyError)
            output.storage.put(part.path, data)
    assert output.verify().is_right


def rows_in(data: bytes, path: str) -> list[dict[str, Any]] | None:
    """What a reader sees in a part; None if it refuses it."""
    try:
        if path.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
        else:
            with pa.ipc.open_stream(data) as reader:
                table = reader.read_all()
        table.validate(full=True)
        return table.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError):
        return None


@pytest.mark.parametrize("kind", [("arrow", None), ("parquet", "zstd")])
def test_flipped_bytes_that_no_reader_sees_are_found(
    tmp_path: Path, make_output: Callable[..., Output], kind: tuple[str, str | None]
) -> None:
    """Arrow aligns its buffers with padding; Parquet has fields that nothing needs."""
    output = make_output(tmp_path, kind)
    part = min(output.verify().parts, key=lambda part: part.size_bytes)
    data = output.storage.read(part.path)
    rows = rows_in(data, part.path)
    unseen = [
        position
        for position in range(len(data))
        if rows_in(flipped(data, position), part.path) == rows
    ]
    assert len(unseen) > 40
    for position in unseen[:: max(1, len(unseen) // 60)]:
        output.storage.put(part.path, flipped(data, position))
        assert "other bytes" in output.problems()[part.path]


@pytest.mark.parametrize("kind", [("arrow", "zstd"), ("parquet", "zstd"), ("jsonl", "gzip")])
def test_a_flipped_byte_at_any_offset_is_found(
    tmp_path: Path, make_output: Callable[..., Output], kind: tuple[str, str | None]
) -> None:
    output = make_output(tmp_path, kind)
    parts = output.parts()
    for part in parts:
        data = output.storage.read(part["path"])
        assert content_problem(data, part["size_bytes"], part["sha256"]) is None
        for position in range(len(data)):
            changed = flipped(data, position)
            assert content_problem(changed, part["size_bytes"], part["sha256"]) is not None


@pytest.mark.parametrize("number", range(5))
def test_a_deleted_part(output: Output, number: int) -> None:
    path = output.parts()[number]["path"]
    output.storage.delete([path])
    assert output.problems() == {path: "is missing"}


def test_a_part_that_is_cut_or_grown(output: Output) -> None:
    path = output.parts()[0]["path"]
    data = output.storage.read(path)
    for changed in (data[:-1], data + b"\0", b""):
        output.storage.put(path, changed)
        assert list(output.problems()) == [path]
        assert f"has {len(changed)} bytes" in output.problems()[path]


def test_two_parts_of_one_size_that_are_swapped(output: Output) -> None:
    first, second = (part["path"] for part in output.parts()[:2])
    data = output.storage.read(first)
    other = output.storage.read(second)[: len(data)].ljust(len(data), b"\0")
    output.storage.put(first, other)
    assert "other bytes" in output.problems()[first]
    output.storage.put(first, data)
    # With a commit that agrees: each of the two parts is what it is said to be.
    output.put_commit(0, parts=output.commit(0)["parts"][::-1])
    problems = output.problems()
    assert "out of order" in problems[first]
    assert "another order" in problems["state.json"]


def test_a_commit_that_names_wrong_counts(output: Output) -> None:
    commit = output.commit(0)
    path = commit_path(0)
    output.put_commit(0, counts={**commit["counts"], "ok": 63, "skipped": 1})
    assert output.problems() == {path: "says 63 ok; its files have 64 ok"}
    output.put_commit(0, counts={**commit["counts"], "ok": 63})
    assert "do not add up" in output.problems()[path]
    output.put_commit(0, counts={**commit["counts"], "output_tokens": 1})
    assert "says 1 output_tokens; its files have" in output.problems()[path]
    output.put_commit(0, counts=commit["counts"], parts=commit["parts"][:1])
    assert "says 64 ok, " in output.problems()[path]
    assert "its files have 40 ok, " in output.problems()[path]
    commit["parts"][0]["num_rows"] = 39
    output.put_commit(0, parts=commit["parts"])
    assert output.problems()[commit["parts"][0]["path"]] == "has 40 rows, its commit says 39"


def test_a_doubled_row(output: Output) -> None:
    def double(rows: list[dict[str, Any]]) -> None:
        rows[9] = rows[5]

    path = output.forge(0, double)
    assert "0.jsonl:5 a second time" in output.problems()[path]


def test_a_row_of_another_unit(output: Output) -> None:
    def move(rows: list[dict[str, Any]]) -> None:
        rows[0]["row_address"] = rows[0]["row_address"].replace(":64", ":3")

    path = output.forge(1, move)
    assert "which is not of its unit: rows 64 to 99" in output.problems()[path]


def test_a_row_without_an_address(output: Output) -> None:
    path = output.forge(2, lambda rows: rows[7].update(row_address=None))
    assert "holds the row None" in output.problems()[path]


def test_a_row_out_of_order(output: Output) -> None:
    def swap(rows: list[dict[str, Any]]) -> None:
        rows[3], rows[4] = rows[4], rows[3]

    path = output.forge(2, swap)
    assert "1.jsonl:3 out of order, after row 4" in output.problems()[path]


def test_a_row_that_is_a_dead_letter_too(output: Output) -> None:
    def revive(rows: list[dict[str, Any]]) -> None:
        assert rows[6]["row_address"].endswith(":71")  # 70 has failed
        rows[5]["row_address"] = rows[6]["row_address"].replace(":71", ":70")
        del rows[6]
        rows[6:6] = [{**rows[6], "row_address": rows[5]["row_address"].replace(":70", ":71")}]

    path = output.forge(1, revive)
    assert "which is a dead letter too" in output.problems()[path]


def test_a_part_of_other_columns(output: Output) -> None:
    path = output.parts()[0]["path"]
    other = pa.table({"id": pa.array(range(40))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, other.schema) as writer:
        writer.write_table(other)
    data = sink.getvalue().to_pybytes()
    output.storage.put(path, data)
    commit = output.commit(0)
    sha256 = hashlib.sha256(data).hexdigest()
    commit["parts"][0] |= {"size_bytes": len(data), "sha256": sha256}
    output.put_commit(0, parts=commit["parts"])
    assert "columns are not the output's: response: absent" in output.problems()[path]


def test_a_part_that_is_committed_twice(output: Output) -> None:
    commit = output.commit(0)
    output.put_commit(0, parts=[*commit["parts"][:1], *commit["parts"][:1]])
    assert output.problems()[commit["parts"][0]["path"]] == "is committed a second time"


def test_a_commit_that_names_a_file_outside_of_the_output(output: Output) -> None:
    commit = output.commit(0)
    commit["parts"][0]["path"] = "data/../../secret"
    output.put_commit(0, parts=commit["parts"])
    assert "no path of a part" in output.problems()[commit_path(0)]


def test_a_commit_that_is_gone_or_damaged(output: Output) -> None:
    path = commit_path(1)
    data = output.ledger.read(path)
    for damaged in (data[:-20], b"", data.replace(b'"unit_id": 1', b'"unit_id": 2')):
        assert damaged != data
        output.ledger.put(path, damaged)
        assert "is damaged" in output.problems()[path]
    output.ledger.delete([path])
    assert "missing, but the dataset was published" in output.problems()[path]


def test_dead_letters_that_are_not_the_committed_ones(output: Output) -> None:
    [path] = output.ledger.list("dead")
    data = flip(output.ledger, path, 30)
    assert "other bytes" in output.problems()[path]
    output.ledger.delete([path])
    assert output.problems() == {path: "is missing"}
    letter = data.replace(b":70", b":7")
    output.ledger.put(path, letter)
    sha256 = hashlib.sha256(letter).hexdigest()
    named = output.commit(1)["dead_letters"]
    output.put_commit(1, dead_letters={**named, "size_bytes": len(letter), "sha256": sha256})
    assert "not of its unit" in output.problems()[path]
    output.put_commit(1, dead_letters=None)
    assert output.problems() == {commit_path(1): "says 1 failed; its files have 0 failed"}


def test_files_that_no_commit_names_are_told_and_no_difference(output: Output) -> None:
    extra = output.storage.read(output.parts()[0]["path"])
    output.storage.put("data/part-extra.arrow", extra)
    output.ledger.put("dead/stray.jsonl", b"{}\n")
    receipt = output.verify()
    assert receipt.is_right
    assert receipt.leftovers == ["data/part-extra.arrow", "dead/stray.jsonl"]
    done = output.command()
    assert done.returncode == 0
    assert "leftover: data/part-extra.arrow: no commit names it" in done.stderr


def test_a_changed_state(output: Output) -> None:
    state = json.loads(output.storage.read("state.json"))
    files = state["_data_files"]
    output.storage.put("data/part-extra.arrow", b"")
    for changed, text in (
        (files[1:], f"lacks {files[0]['filename']}"),
        ([*files, {"filename": "data/part-extra.arrow"}], "part-extra.arrow (1 in all)"),
        (files[::-1], "another order"),
    ):
        changed_state = json.dumps({**state, "_data_files": changed})
        output.storage.put("state.json", changed_state.encode())
        assert text in output.problems()["state.json"]
    output.storage.delete(["state.json"])
    assert output.problems() == {"state.json": "is missing"}


@pytest.mark.parametrize("kind", [("parquet", "zstd"), ("jsonl", "gzip")])
def test_a_changed_readme(
    tmp_path: Path, make_output: Callable[..., Output], kind: tuple[str, str | None]
) -> None:
    output = make_output(tmp_path, kind)
    readme = output.storage.read("README.md")
    path = output.parts()[4]["path"]
    output.storage.put("README.md", readme.replace(path.encode(), b"data/other"))
    assert "lacks" in output.problems()["README.md"]
    output.storage.put("README.md", readme + b"A note of its owner.\n")
    assert output.problems() == {}
