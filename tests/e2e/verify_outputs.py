"""Finished outputs for the tests of `batchgen verify`, and how to damage them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from e2e_jobs import batchgen, make_rows, write_job, write_jsonl
from standin import StandInEngine

from batchgen.dataset.storage import Storage
from batchgen.job.loading import load_job
from batchgen.runner import run_job
from batchgen.startup import open_ledger_storage
from batchgen.verify import Receipt, verify_job

KINDS = [
    *(("arrow", codec) for codec in ("zstd", "lz4", None)),
    *(("parquet", codec) for codec in ("zstd", "lz4", "snappy", "gzip", None)),
    *(("jsonl", codec) for codec in ("zstd", "gzip", None)),
]
FILE_ROWS = (100, 50)  # of each of two files, with one failed and one skipped row in the first
NUM_PARTS = 5  # of at most 40 rows, of units of 64, 36 and 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A finished output that a test may damage."""

    job: Path
    overrides: list[str]
    storage: Storage

    @property
    def ledger(self) -> Storage:
        return self.storage.child(".batchgen")

    def verify(self, *overrides: str) -> Receipt:
        spec = load_job(self.job, [*self.overrides, *overrides])
        return verify_job(spec, open_ledger_storage(spec))

    def problems(self) -> dict[str, str]:
        """What is wrong, by file; the last of a file's problems."""
        return {each.path: each.problem for each in self.verify().differences}

    def command(self, *options: str) -> Any:
        """The real command's outcome."""
        overrides = [text for each in self.overrides for text in ("-o", each)]
        return batchgen("verify", self.job, *overrides, *options)

    def commit(self, unit_id: int) -> dict[str, Any]:
        commit: dict[str, Any] = json.loads(self.ledger.read(commit_path(unit_id)))
        return commit

    def put_commit(self, unit_id: int, **changes: Any) -> None:
        changed = {**self.commit(unit_id), **changes}
        self.ledger.put(commit_path(unit_id), json.dumps(changed).encode())

    def parts(self) -> list[dict[str, Any]]:
        return [part for unit_id in range(3) for part in self.commit(unit_id)["parts"]]

    def forge(self, unit_id: int, change: Callable[[list[dict[str, Any]]], Any]) -> str:
        """Change the rows of a unit's first part and make its commit agree; the part's path.

        The part keeps its name, so that the dataset's own files name it still.
        """
        parts = self.commit(unit_id)["parts"]
        with pa.ipc.open_stream(self.storage.read(parts[0]["path"])) as reader:
            table = reader.read_all()
        rows = table.to_pylist()
        change(rows)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=table.schema))
        data = sink.getvalue().to_pybytes()
        self.storage.put(parts[0]["path"], data)
        parts[0] |= {
            "num_rows": len(rows),
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        self.put_commit(unit_id, parts=parts)
        path: str = parts[0]["path"]
        return path


def commit_path(unit_id: int) -> str:
    return f"commits/{unit_id:08d}.json"


def write_input(folder: Path) -> str:
    """Two files, the first of which ends with a bad record and has a row without text."""
    rows = make_rows(FILE_ROWS[0] - 1)
    rows[70]["text"] = None
    first = write_jsonl(folder / "in/0.jsonl", rows)
    with first.open("a", encoding="utf-8") as file:
        file.write("{not json}\n")
    write_jsonl(folder / "in/1.jsonl", make_rows(FILE_ROWS[1], start=1000))
    return str(folder / "in/*.jsonl")


def write_verify_job(folder: Path, model: Path) -> Path:
    return write_job(
        folder,
        model,
        input={"uri": write_input(folder), "on_bad_record": "skip"},
        output={"max_shard_rows": 40},
    )


def run_stand_in(job: Path, *overrides: str) -> None:
    run_job(load_job(job, overrides), make_engine=lambda *_: StandInEngine())


def flip(storage: Storage, path: str, position: int) -> bytes:
    """Flip a bit of a file; its bytes before."""
    data = storage.read(path)
    storage.put(path, flipped(data, position))
    return data


def flipped(data: bytes, position: int) -> bytes:
    """These bytes with one bit flipped."""
    changed = bytearray(data)
    changed[position] ^= 1 << position % 8
    return bytes(changed)
