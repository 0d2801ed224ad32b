"""The files of the output, each read once, against the commits that name them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pyarrow as pa

from batchgen.dataset.parts import dataset_problems, find_empty_part, read_part
from batchgen.dataset.storage import Storage, redact
from batchgen.job.spec import OutputSpec
from batchgen.ledger import Commit, RunCounts
from batchgen.ledger.audit import content_problem, read_dead_letters
from batchgen.ledger.files import commit_path
from batchgen.records import InputFile, Part, Unit
from batchgen.verify.receipt import CommittedPart, Difference

_CHECKED_COLUMNS = ("row_address", "prompt_tokens", "output_tokens")  # of the meta columns
_PART = re.compile(r"data/part-[\w.-]+")
_ROW = re.compile(r"0|[1-9][0-9]{0,17}")


class OutputCheck:
    """Reads the output's files and collects what is wrong with them.

    One part is in memory at a time, and the row numbers of one unit.
    """

    def __init__(
        self,
        *,
        spec: OutputSpec,
        schema: pa.Schema,
        storage: Storage,
        ledger_storage: Storage,
        files: Sequence[InputFile],
    ) -> None:
        """`schema` is the output's, `files` are the input's."""
        self.differences: list[Difference] = []
        self.parts: list[CommittedPart] = []
        self._spec = spec
        self._schema = schema
        self._storage = storage
        self._ledger_storage = ledger_storage
        self._files = files
        self._columns = _CHECKED_COLUMNS if spec.columns.meta else ()
        self._counts: defaultdict[int, list[RunCounts]] = defaultdict(list)  # by input file
        self._named: set[str] = set()  # files that commits name
        self._dataset: list[Part] = []

    def add(self, path: str, problem: str) -> None:
        """Note that something is wrong with a file."""
        self.differences.append(Difference(path=path, problem=redact(problem)))

    def counts_of_file(self, file_index: int) -> Sequence[RunCounts]:
        """How the rows of each of the input file's units ended, as read again."""
        return self._counts[file_index]

    def check_unit(self, unit: Unit, commit: Commit) -> None:
        """Read the dead letters and the parts of a commit. Units come in input order."""
        num_known = len(self.differences)
        rows = _UnitRows(unit, redact(self._files[unit.file_index].uri))
        num_failed = self._read_failed(commit, rows)
        tokens: dict[str, int] = dict.fromkeys(self._columns[1:], 0)
        num_ok = sum(self._read_part(unit, part, rows, tokens) for part in commit.parts)
        counts = commit.counts
        self._counts[unit.file_index].append(
            RunCounts(
                total=unit.num_rows,
                ok=num_ok,
                failed=num_failed,
                skipped=counts.skipped,
                prompt_tokens=counts.prompt_tokens,
                output_tokens=counts.output_tokens,
            )
        )
        if len(self.differences) > num_known:
            return  # sums over rows that are not there would say the same again
        found = {"ok": num_ok, "failed": num_failed, **tokens}
        wrong = [name for name, number in found.items() if number != getattr(counts, name)]
        if wrong:
            said = ", ".join(f"{getattr(counts, name)} {name}" for name in wrong)
            has = ", ".join(f"{found[name]} {name}" for name in wrong)
            self.add(commit_path(unit.unit_id), f"says {said}; its files have {has}")

    def check_dataset(self) -> None:
        """Whether the dataset's own files name the parts of all commits, in input order."""
        if not self.parts:
            empty = find_empty_part(self._storage)
            if empty is None:
                self.add(
                    "data", "has no part, and the file of an empty dataset is missing or wrong"
                )
                return
            self._named.add(empty.path)
            self._dataset.append(empty)
            self._decode(empty, None, {})
        problems = dataset_problems(self._storage, self._spec, self._schema, self._dataset)
        for path, problem in problems.items():
            self.add(path, problem)

    def leftovers(self) -> list[str]:
        """Files of parts and dead letters that no commit names, which do not exist for anybody."""
        found = [*self._storage.list("data"), *self._ledger_storage.list("dead")]
        return [path for path in found if path not in self._named]

    def _read_failed(self, commit: Commit, rows: _UnitRows) -> int:
        """How many dead letters the unit has. Their rows are noted."""
        letters = commit.dead_letters
        if letters is None:
            return 0
        self._named.add(letters.path)
        try:
            addresses = read_dead_letters(self._ledger_storage, letters)
        except ValueError as error:
            self.add(letters.path, str(error))
            return 0
        if problem := rows.problem_of_failed(addresses):
            self.add(letters.path, problem)
        return len(addresses)

    def _read_part(self, unit: Unit, part: Part, rows: _UnitRows, tokens: dict[str, int]) -> int:
        """How many rows the part has, 0 if it is not the committed one. Adds to `tokens`."""
        self.parts.append(
            CommittedPart(
                unit_id=unit.unit_id,
                path=part.path,
                num_rows=part.num_rows,
                size_bytes=part.size_bytes,
                sha256=part.sha256,
            )
        )
        self._dataset.append(part)
        if not _PART.fullmatch(part.path):
            self.add(commit_path(unit.unit_id), f"names {part.path!r}, which is no path of a part")
            return 0
        if part.path in self._named:
            self.add(part.path, "is committed a second time")
            return 0
        self._named.add(part.path)
        return self._decode(part, rows, tokens)

    def _decode(self, part: Part, rows: _UnitRows | None, tokens: dict[str, int]) -> int:
        """The number of rows of a part, whose addresses go to `rows` and sums to `tokens`."""
        try:
            data = self._storage.read(part.path)
        except FileNotFoundError:
            self.add(part.path, "is missing")
            return 0
        if problem := content_problem(data, part.size_bytes, part.sha256):
            self.add(part.path, problem)
            return 0
        num_rows = 0
        problem = None
        try:
            for batch in read_part(part.path, data, self._schema, self._columns):
                num_rows += batch.num_rows
                for name in tokens:
                    tokens[name] += sum(number or 0 for number in batch.columns[name])
                if rows is not None and self._columns and problem is None:
                    problem = rows.problem_of(batch.columns["row_address"])
        except ValueError as error:
            problem = str(error)
        else:
            if problem is None and num_rows != part.num_rows:
                problem = f"has {num_rows} rows, its commit says {part.num_rows}"
        if problem is not None:
            self.add(part.path, problem)
        return num_rows


class _UnitRows:
    """Follows the row addresses of a unit through its parts.

    Rows rise within a unit, and no two units share one: so no row of the whole output comes twice
    and all are in input order, and only one unit's rows need to be remembered.
    """

    def __init__(self, unit: Unit, uri: str) -> None:
        """`uri` is the input file's, as addresses have it."""
        self._unit = unit
        self._uri = uri
        self._failed: set[int] = set()
        self._seen: set[int] = set()
        self._last = unit.row_start - 1

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

    def problem_of(self, addresses: Iterable[str | None]) -> str | None:
        """Note the unit's next rows of output; what is wrong with the first that is wrong."""
        for address in addresses:
            row = self._row_of(address)
            if row is None:
                return self._foreign(address)
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
