"""Whether a unit's rows of output are its rows of input: each once, in order, with all samples."""

from __future__ import annotations

import re
from collections.abc import Iterable

from batchgen.records import Unit

_ROW = re.compile(r"0|[1-9][0-9]{0,17}")


class UnitRows:
    """Follows the row addresses of a unit through its parts.

    Rows rise within a unit, and no two units share one: so no row of the whole output comes twice
    and all are in input order, and only one unit's rows need to be remembered.
    """

    def __init__(self, unit: Unit, uri: str, *, num_samples: int) -> None:
        """`uri` is the input file's, as addresses have it. A row of input has `num_samples` rows
        of output, which follow each other."""
        self._unit = unit
        self._uri = uri
        self._num_samples = num_samples
        self._failed: set[int] = set()
        self._seen: set[int] = set()
        self._last = unit.row_start - 1
        self._next_sample = 0

    def problem_of_failed(self, addresses: Iterable[str]) -> str | None:
        """Note the dead letters, which come before the parts; what is wrong with the first."""
        for address in addresses:
            row = self._row_of(address)
            if row is None:
                return self._foreign(address)
            if row in self._failed:
                return f"holds the row {address} a second time"
            self._failed.add(row)
        return None

    def problem_of(self, addresses: Iterable[str | None], samples: Iterable[object]) -> str | None:
        """Note the unit's next rows of output; what is wrong with the first that is wrong.

        `samples` are their sample indices.
        """
        for address, sample in zip(addresses, samples, strict=True):
            row = self._row_of(address)
            if row is None:
                return self._foreign(address)
            if sample != self._next_sample or (self._next_sample and row != self._last):
                place = f" of row {self._last}" if self._next_sample else ""
                return (
                    f"holds sample {sample} of the row {address} where sample "
                    f"{self._next_sample}{place} should be"
                )
            if self._next_sample == 0 and (problem := self._problem_of_row(row, address)):
                return problem
            self._next_sample = (self._next_sample + 1) % self._num_samples
        return None

    def _problem_of_row(self, row: int, address: str | None) -> str | None:
        """Note a row of input that has not come before; what is wrong with it."""
        if row in self._seen:
            return f"holds the row {address} a second time"
        if row < self._last:
            return f"holds the row {address} out of order, after row {self._last}"
        if row in self._failed:
            return f"holds the row {address}, which is a dead letter too"
        self._seen.add(row)
        self._last = row
        return None

    def _row_of(self, address: str | None) -> int | None:
        uri, _, number = (address or "").rpartition(":")
        if uri != self._uri or not _ROW.fullmatch(number):
            return None
        row = int(number)
        start = self._unit.row_start
        return row if start <= row < start + self._unit.num_rows else None

    def _foreign(self, address: str | None) -> str:
        start = self._unit.row_start
        return (
            f"holds the row {address!r}, which is not of its unit: rows {start} to "
            f"{start + self._unit.num_rows - 1} of {self._uri}"
        )
