"""Hostile bytes for what reads files of others: the job loader, the JSONL reader, the ledger.

    python tests/fuzz.py [--cases 1000000] [--seed 0]

feeds mutations of valid files, and random bytes, to each; only the package's own errors may come
out. `tests/unit/test_fuzz.py` runs a small share of it.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.dataset.chunks import BadRecord
from batchgen.dataset.lines import json_chunks
from batchgen.dataset.reader import UnitReader, plan_input
from batchgen.errors import BatchgenError, JobFileError, UnsupportedError
from batchgen.job.loading import load_job
from batchgen.job.spec import InputSpec
from batchgen.ledger import LedgerPlan, RunCounts, decode_schema, encode_schema
from batchgen.ledger.commits import Commit, DeadLetters, decode_commit, encode_commit
from batchgen.ledger.partials import decode_partial, encode_partial
from batchgen.ledger.plan import decode_job, encode_job
from batchgen.records import (
    InputFile,
    InputRow,
    OutputRow,
    Part,
    RowFailure,
    RowKey,
    RowSkip,
    Unit,
)

JOB = b"""params: {d: "1"}
input: {uri: "a/${params.d}/*.jsonl", limit: 5, storage_options: {key: x}}
prompt:
  messages: [{role: user, content: "{{ t }}"}]
model: &m {name_or_path: o/n}
sampling: {temperature: 0.5, stop: ["a", "\\n"], seed: 1}
output: {uri: o, columns: {keep: [id]}}
checkpoint: {flush_interval: 30s}
"""
LINES = (
    b'{"id": 1, "text": "one \\u00e9 \\ud83d\\ude00", "tags": ["a", null, {"b": 1.5e3}]}\n'
    b'{"id": -2, "text": "\xc3\xa9\\n", "deep": [[[[{}]]]], "big": 123456789012345678901}\r\n'
    b'\n{"id": true, "text": null, "nan": NaN}\n'
)
# What breaks parsers, put in at random places.
TOKENS = (
    b"\x00", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\r", b"\n", b"\t",
    b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"&a ", b"*a", b"!!python/object:os.system ",
    b"!!binary |", b"<<: *m", b"---\n", b"...", b"%YAML 9.9\n", b"? ", b"| \n", b"> \n", b"#",
    b"1e999", b"-0", b"0x", b"0o9", b"NaN", b"Infinity", b"null", b"true", b"~", b"9" * 5000,
    b"[" * 300, b'{"a":' * 300, b"\\u0000", b"\\x", b"${params.", b"${params.x}", b"a" * 300,
    b"2026-01-01", b"1:30", b"=", b"..", b"/", b"\xe2\x80\xa8", b"\xc2\x85", b"\x1b[2J",
)  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The data with a few changes; now and then bytes of no meaning at all."""
    if draw.random() < 0.05:
        return draw.randbytes(draw.randrange(200))
    for _ in range(1 + int(draw.expovariate(0.7))):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + int(draw.expovariate(0.1)))
        change = draw.randrange(6)
        if change == 0:
            piece = draw.choice(TOKENS)
        elif change == 1:
            piece, end = draw.choice(TOKENS), start
        elif change == 2:
            piece = b""
        elif change == 3:
            piece = draw.randbytes(1)
            end = min(len(data), start + 1)
        elif change == 4:
            piece = data[start:end] * draw.randrange(2, 5)
        else:
            other = draw.randrange(len(data) + 1)
            piece, end = data[other : other + 20], start
        data = data[:start] + piece + data[end:]
    return data


class Fuzzer:
    """Feeds one case after another; `folder` takes the job files."""

    def __init__(self, folder: Path) -> None:
        self.accepted = 0  # cases that were taken for valid
        self._job_path = folder / "job.yaml"
        self._plan = _plan()
        self._tables = _tables()
        self._job_bytes = encode_job({"sampling": {"seed": 1}}, self._plan)
        self._job = decode_job(self._job_bytes, "job.json")
        self._commit = encode_commit(_commit(self._job.job_id))
        self._partial = encode_partial(
            _results(),
            job_id=self._job.job_id,
            schema=decode_schema(self._plan.schema_base64),
        )

    def job_loader(self, draw: random.Random) -> None:
        """A job file, and now and then options of the command line."""
        self._job_path.unlink(missing_ok=True)  # some disks wait when a file is truncated
        self._job_path.write_bytes(mutated(JOB, draw))
        options = []
        if draw.random() < 0.2:
            options = [mutated(b"sampling.stop=[a, b]", draw).decode(errors="surrogateescape")]
        with contextlib.suppress(JobFileError, UnsupportedError):
            load_job(self._job_path, options)
            self.accepted += 1

    def json_lines(self, draw: random.Random) -> None:
        """A file of JSON lines, as a reader of units gets it."""
        data = mutated(LINES, draw)
        if draw.random() < 0.1:
            self._read_file(data, draw)
            return
        columns = draw.choice((None, ["id"], ["text", "none"]))
        num_bad = 0
        for chunk in json_chunks(io.BytesIO(data), columns=columns, row_start=0, byte_start=0):
            for record in chunk.decode(range(chunk.num_rows)):
                if not isinstance(record, BadRecord):
                    assert isinstance(record, dict)
                    str(record).encode()
                else:
                    record.excerpt.encode()
                    num_bad += 1
        self.accepted += num_bad == 0

    def _read_file(self, data: bytes, draw: random.Random) -> None:
        """The same from a store, planned first; compressed ones are damaged afterwards."""
        kind = draw.choice(("jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "arrow", "data"))
        if kind in self._tables:
            data = mutated(self._tables[kind], draw)
        elif kind.endswith("gz"):
            data = mutated(gzip.compress(data), draw)
        elif kind.endswith("zst"):
            data = mutated(pa.Codec("zstd").compress(data, asbytes=True), draw)
        uri = f"memory://fuzz/case.{kind}"
        fsspec.filesystem("memory").pipe_file(uri, data)
        spec = InputSpec(uri=uri)
        try:
            plan = plan_input(spec, 2)
            with UnitReader(spec, plan.files) as reader:
                for unit in plan.units:
                    for row in reader.read(unit):
                        assert isinstance(row, InputRow | RowFailure)
        except BatchgenError:
            pass

    def ledger(self, draw: random.Random) -> None:
        """A file of the ledger; a partial's checksum is made right, to get behind it."""
        kind = draw.randrange(3)
        try:
            if kind == 0:
                decode_job(mutated(self._job_bytes, draw), "job.json")
            elif kind == 1:
                path = "commits/00000001.json"
                decode_commit(mutated(self._commit, draw), self._job, path, path)
            else:
                body = mutated(self._partial[40:], draw)
                data = self._partial[:8] + hashlib.sha256(body).digest() + body
                decode_partial(data, self._job, "x.partial")
            self.accepted += 1
        except BatchgenError:
            pass


def _tables() -> dict[str, bytes]:
    """The same rows as a Parquet and as an Arrow file."""
    rows = [{"id": 1, "text": "one é", "tags": ["a", None]}, {"id": 2, "text": None, "tags": []}]
    table = pa.Table.from_pylist(rows)
    parquet, arrow = pa.BufferOutputStream(), pa.BufferOutputStream()
    pq.write_table(table, parquet)
    with pa.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table)
    return {"parquet": parquet.getvalue().to_pybytes(), "arrow": arrow.getvalue().to_pybytes()}


def _plan() -> LedgerPlan:
    schema = pa.schema([("id", pa.int64()), ("response", pa.list_(pa.string()))])
    return LedgerPlan(
        files=(InputFile(uri="in.jsonl", size_bytes=100, etag="1"),),
        units=(
            Unit(unit_id=0, file_index=0, row_start=0, num_rows=2, byte_start=0, byte_end=50),
            Unit(unit_id=1, file_index=0, row_start=2, num_rows=3, byte_start=50, byte_end=100),
        ),
        schema_base64=encode_schema(schema),
    )


def _commit(job_id: str) -> Commit:
    return Commit(
        job_id=job_id,
        run_id="0123456789abcdef",
        unit_id=1,
        parts=(Part(path="data/part-1.arrow", num_rows=2, size_bytes=9, sha256="0" * 64),),
        dead_letters=DeadLetters(path="dead/1.jsonl", num_rows=1, size_bytes=9, sha256="1" * 64),
        counts=RunCounts(total=3, ok=2, failed=1, prompt_tokens=5, output_tokens=6),
        wall_s=1.5,
    )


def _results() -> list[OutputRow | RowFailure | RowSkip]:
    key = RowKey(unit_id=1, index=0)
    return [
        OutputRow(
            key=key,
            address="in.jsonl:2",
            rows=({"id": 1, "response": ["a", None]}, {"id": 2, "response": []}),
            num_prompt_tokens=3,
            num_output_tokens=4,
        ),
        RowFailure(
            key=RowKey(unit_id=1, index=1), address="in.jsonl:3", kind="bad_record", message="m"
        ),
        RowSkip(key=RowKey(unit_id=1, index=2), address="in.jsonl:4", reason="r"),
    ]


SHARES = {"job_loader": 0.1, "json_lines": 0.5, "ledger": 0.4}  # a job file takes a millisecond


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    num_failed = 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for name, share in SHARES.items():
            feed: Callable[[random.Random], None] = getattr(fuzzer, name)
            began_s = time.monotonic()
            count = round(options.cases * share)
            for case in range(count):
                try:
                    feed(random.Random(f"{name}/{options.seed}/{case}"))
                except Exception as error:  # every case is run, each escape told
                    num_failed += 1
                    sys.stdout.write(f"{name} case {case}: {type(error).__name__}: {error}\n")
            sys.stdout.write(f"{name}: {count} cases in {time.monotonic() - began_s:.0f} s\n")
            sys.stdout.flush()
    sys.exit(1 if num_failed else 0)


if __name__ == "__main__":
    main()
