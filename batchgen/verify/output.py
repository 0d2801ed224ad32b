"""The files of the output, each read once, against the commits that name them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchgen.dataset.parts import dataset_problems, find_empty_part, read_part
from batchgen.dataset.schema import SAMPLE_INDEX
from batchgen.dataset.storage import Storage, redact
from batchgen.job.spec import JobSpec
from batchgen.ledger import Commit, RunCounts
from batchgen.ledger.audit import content_problem, read_dead_letters
from batchgen.ledger.files import commit_path
from batchgen.records import InputFile, Part, Unit
from batchgen.verify.receipt import CommittedPart, Difference
from batchgen.verify.unit_rows import UnitRows

_META_COLUMNS = ("row_address", "prompt_tokens", "output_tokens")  # the ones that are checked
_PART = re.compile(r"data/part-[\w.-]+")


class OutputCheck:
    """Reads the output's files and collects what is wrong with them.

    One part is in memory at a time, and the row numbers of one unit.
    """

    def __init__(
        self,
        *,
        spec: JobSpec,
        schema: pa.Schema,
        storage: Storage,
        ledger_storage: Storage,
        files: Sequence[InputFile],
    ) -> None:
        """`schema` is the output's, `files` are the input's."""
        self.differences: list[Difference] = []
        self.parts: list[CommittedPart] = []
        self._spec = spec.output
        self._num_samples = spec.sampling.n
        self._is_exploded = spec.output.n_layout == "explode"
        self._rows_per_row = spec.output_rows_per_row
        self._schema = schema
        self._storage = storage
        self._ledger_storage = ledger_storage
        self._files = files
        self._columns: tuple[str, ...] = ()
        if spec.output.columns.meta:
            self._columns = (*_META_COLUMNS, *([SAMPLE_INDEX] if self._is_exploded else []))
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
        uri = redact(self._files[unit.file_index].uri)
        rows = UnitRows(unit, uri, num_samples=self._rows_per_row)
        num_failed = self._read_failed(commit, rows)
        tokens = Counter[str]()
        num_rows = sum(self._read_part(commit, part, rows, tokens) for part in commit.parts)
        num_ok = num_rows // self._rows_per_row
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
        path = commit_path(unit.unit_id, commit.generation)
        if num_rows % self._rows_per_row:
            self.add(
                path,
                f"names parts of {num_rows} rows, though every row of input that succeeds has "
                f"{self._rows_per_row}",
            )
            return
        found = {"ok": num_ok, "failed": num_failed}
        if self._columns:
            found |= {name: tokens[name] for name in ("prompt_tokens", "output_tokens")}
        wrong = [name for name, number in found.items() if number != getattr(counts, name)]
        if wrong:
            said = ", ".join(f"{getattr(counts, name)} {name}" for name in wrong)
            has = ", ".join(f"{found[name]} {name}" for name in wrong)
            self.add(path, f"says {said}; its files have {has}")

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
            self._decode(empty, None, Counter())
        problems = dataset_problems(self._storage, self._spec, self._schema, self._dataset)
        for path, problem in problems.items():
            self.add(path, problem)

    def leftovers(self) -> list[str]:
        """Files of parts and dead letters that no commit names, which do not exist for anybody."""
        found = [*self._storage.list("data"), *self._ledger_storage.list("dead")]
        return [path for path in found if path not in self._named]

    def _read_failed(self, commit: Commit, rows: UnitRows) -> int:
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

    def _read_part(self, commit: Commit, part: Part, rows: UnitRows, tokens: Counter[str]) -> int:
        """How many rows the part has, 0 if it is not the committed one. Adds to `tokens`."""
        self.parts.append(
            CommittedPart(
                unit_id=commit.unit_id,
                path=part.path,
                num_rows=part.num_rows,
                size_bytes=part.size_bytes,
                sha256=part.sha256,
            )
        )
        self._dataset.append(part)
        if not _PART.fullmatch(part.path):
            path = commit_path(commit.unit_id, commit.generation)
            self.add(path, f"names {part.path!r}, which is no path of a part")
            return 0
        if part.path in self._named:
            self.add(part.path, "is committed a second time")
            return 0
        self._named.add(part.path)
        return self._decode(part, rows, tokens)

    def _decode(self, part: Part, rows: UnitRows | None, tokens: Counter[str]) -> int:
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
                if not self._columns or problem is not None:
                    continue
                self._count_tokens(batch.columns, tokens)
                problem = self._problem_of_samples(batch.columns)
                if rows is not None and problem is None:
                    addresses = batch.columns["row_address"]
                    samples = batch.columns.get(SAMPLE_INDEX, [0] * len(addresses))
                    problem = rows.problem_of(addresses, samples)
        except ValueError as error:
            problem = str(error)
        else:
            if problem is None and num_rows != part.num_rows:
                problem = f"has {num_rows} rows, its commit says {part.num_rows}"
        if problem is not None:
            self.add(part.path, problem)
        return num_rows

    def _count_tokens(self, columns: Mapping[str, Sequence[Any]], tokens: Counter[str]) -> None:
        """Add these rows' tokens to the sums: a prompt's once, an output's of every sample."""
        prompt_tokens, output_tokens = columns["prompt_tokens"], columns["output_tokens"]
        if self._is_exploded:
            samples = columns[SAMPLE_INDEX]
            prompt_tokens = [n for n, i in zip(prompt_tokens, samples, strict=True) if i == 0]
        elif self._num_samples > 1:
            output_tokens = [n for numbers in output_tokens for n in numbers or ()]
        tokens["prompt_tokens"] += sum(number or 0 for number in prompt_tokens)
        tokens["output_tokens"] += sum(number or 0 for number in output_tokens)

    def _problem_of_samples(self, columns: Mapping[str, Sequence[Any]]) -> str | None:
        """What is wrong with the first list that does not have one item for each sample."""
        if self._is_exploded or self._num_samples == 1:
            return None
        for address, numbers in zip(columns["row_address"], columns["output_tokens"], strict=True):
            if len(numbers or ()) != self._num_samples:
                return (
                    f"holds the row {address} with {len(numbers or ())} samples, "
                    f"not {self._num_samples}"
                )
        return None
