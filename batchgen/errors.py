"""The error tree, each with the exit code of the command line (DESIGN section 5).

    BatchgenError                 1   unexpected failure, resumable
    ├── EngineError               1   the engine failed over the rows that it was given
    ├── NoProgressError           1   the watchdog's: every stage waits
    ├── UsageError                2   the command line or its surroundings are wrong
    │   ├── JobFileError          2   the job file is wrong: says file, line, column, key
    │   ├── InputError            2   the input matches nothing, or cannot be read as what it is
    │   ├── ModelError            2   the model cannot be loaded
    │   └── UnsupportedError      2   a known feature that is not built: refused by name
    ├── ErrorRateExceeded         4   too many rows failed, resumable
    ├── JobChangedError           5   the job or its input differs from the ledger's
    ├── VerifyError               6   the output is not what the ledger says
    ├── BudgetReached             7   resumable
    ├── Preempted                75   drained and flushed, resumable
    └── Interrupted             130   the user stopped it, after a clean drain

A message has four parts: what, the value, the limit, and what to do about it.
A row that fails is not an exception that crosses modules: it is a `records.RowFailure`.
"""

from __future__ import annotations

from typing import ClassVar


class BatchgenError(Exception):
    """Anything that batchgen raises on purpose; the run can be resumed."""

    exit_code: ClassVar[int] = 1


class StorageError(BatchgenError):
    """The output's store refused a write or a read (read-only, full, gone); resumable."""


class EngineError(BatchgenError):
    """The engine raised something that batchgen did not; its cause is that error."""


class NoProgressError(BatchgenError):
    """Nothing has happened for `errors.watchdog`. The message says what every stage waits for."""


class UsageError(BatchgenError):
    """The user asked for something that cannot be done as asked."""

    exit_code: ClassVar[int] = 2


class JobFileError(UsageError):
    """The job file is wrong. The message starts with `file:line:column`."""


class InputError(UsageError):
    """The input matches nothing, or cannot be read as the format that it claims."""


class ModelError(UsageError):
    """The model, its tokenizer or its chat template cannot be loaded."""


class UnsupportedError(UsageError):
    """A feature that exists in the field but not (yet) here. The message names it."""


class ErrorRateExceeded(BatchgenError):
    """More rows failed within the window than `errors.max_error_rate` allows."""

    exit_code: ClassVar[int] = 4


class JobChangedError(BatchgenError):
    """The job or its input changed since the ledger began. The message names the difference."""

    exit_code: ClassVar[int] = 5


class VerifyError(BatchgenError):
    """The output differs from what the ledger says."""

    exit_code: ClassVar[int] = 6


class BudgetReached(BatchgenError):
    """A limit of the job's `budget` was reached; the run can be resumed."""

    exit_code: ClassVar[int] = 7


class Preempted(BatchgenError):
    """The machine is going away; finished rows are flushed, the run can be resumed."""

    exit_code: ClassVar[int] = 75


class Interrupted(BatchgenError):
    """The user interrupted the run; finished rows are flushed, the run can be resumed."""

    exit_code: ClassVar[int] = 130
