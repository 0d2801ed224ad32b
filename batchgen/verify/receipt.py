"""What a verification found: a record, its JSON, its text for people, and how the command ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from batchgen.dataset.storage import Storage
from batchgen.errors import BatchgenError, JobChangedError, UsageError, VerifyError
from batchgen.ledger import RunCounts
from batchgen.ledger.files import receipt_path

_MAX_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What is wrong with a file of the output or of the ledger."""

    path: str  # relative to its folder
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCounts:
    """How the rows of an input file ended."""

    uri: str
    rows: RunCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedPart:
    """A part as its commit names it."""

    unit_id: int
    path: str
    num_rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FingerprintCheck:
    """The ledger's fingerprint against that of the job file, its input and its model today."""

    sha256: str  # of the ledger's, as JSON with sorted keys
    differences: Sequence[str]
    not_compared: str | None  # why the input or the model could not be looked up


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a verification found.

    Of `rows` and `files`, `ok` counts the rows of the parts as they were read again and `failed`
    the dead letters. Skipped rows leave nothing to read: they and the tokens are as committed.
    """

    format: Literal["batchgen receipt"] = "batchgen receipt"
    version: str  # of batchgen
    time: str  # UTC
    name: str  # of the job
    job_id: str
    output_uri: str
    ledger_uri: str
    state: Literal["done", "incomplete"]
    is_right: bool  # no differences
    num_units: int
    num_committed: int
    rows: RunCounts
    files: Sequence[FileCounts]
    parts: Sequence[CommittedPart]
    differences: Sequence[Difference]
    leftovers: Sequence[str]  # files of data/ and dead/ that no commit names: no difference
    fingerprint: FingerprintCheck


_RECEIPT = TypeAdapter(Receipt)


def encode_receipt(receipt: Receipt, *, indent: int | None = None) -> str:
    """The receipt as JSON."""
    return _RECEIPT.dump_json(receipt, indent=indent).decode()


def write_receipt(storage: Storage, receipt: Receipt) -> str:
    """Keeps the receipt in the ledger's folder; its path there."""
    path = receipt_path(receipt.time)
    storage.put(path, f"{encode_receipt(receipt, indent=1)}\n".encode())
    return path


def verdict(receipt: Receipt) -> BatchgenError | None:
    """The error that ends the command; None if all is right. The output's counts before the job's.

    A UsageError says that the input or the model could not be looked up, as for any command.
    """
    fingerprint = receipt.fingerprint
    if receipt.differences:
        first = receipt.differences[0]
        return VerifyError(
            f"{receipt.output_uri} is not what its ledger says: {len(receipt.differences)} "
            f"difference(s), the first: {first.path}: {first.problem}"
        )
    if fingerprint.differences:
        lines = "\n".join(f"  {line}" for line in fingerprint.differences)
        return JobChangedError(
            "the output is what its ledger says, but the job or its input changed since the "
            f"ledger in {receipt.ledger_uri} began:\n{lines}"
        )
    if fingerprint.not_compared is not None:
        return UsageError(
            "the output is what its ledger says, but the job cannot be compared with the "
            f"ledger's: {fingerprint.not_compared}"
        )
    return None


def receipt_text(receipt: Receipt) -> str:
    """The receipt for people, a few lines."""
    rows = receipt.rows
    lines = [
        f"{'right' if receipt.is_right else 'WRONG'}: {receipt.state}, "
        f"{receipt.num_committed:,} of {receipt.num_units:,} units committed, "
        f"{len(receipt.parts):,} parts",
        f"rows: {rows.total:,} in {len(receipt.files):,} files, of which {rows.ok:,} ok, "
        f"{rows.failed:,} failed, {rows.skipped:,} skipped",
        f"fingerprint: {receipt.fingerprint.sha256[:16]}",
    ]
    told = {
        "difference": [f"{each.path}: {each.problem}" for each in receipt.differences],
        "leftover": [f"{path}: no commit names it" for path in receipt.leftovers],
    }
    for what, texts in told.items():
        lines += [f"{what}: {text}" for text in texts[:_MAX_SHOWN]]
        if len(texts) > _MAX_SHOWN:
            lines.append(f"... and {len(texts) - _MAX_SHOWN:,} more {what}s in the receipt")
    return "\n".join(lines)
