"""Which rows are done: units, partials, commits and dead letters, as files and nothing else."""

from batchgen.ledger.additions import add_files, read_job
from batchgen.ledger.commits import Commit, DeadLetters, RunCounts
from batchgen.ledger.failures import read_failures, read_job_failures
from batchgen.ledger.files import decoded
from batchgen.ledger.judged import judged_rows
from batchgen.ledger.ledger import Ledger
from batchgen.ledger.plan import (
    LedgerPlan,
    StoredJob,
    check_fingerprint,
    decode_schema,
    encode_schema,
)
from batchgen.ledger.status import read_status

__all__ = [
    "Commit",
    "DeadLetters",
    "Ledger",
    "LedgerPlan",
    "RunCounts",
    "StoredJob",
    "add_files",
    "check_fingerprint",
    "decode_schema",
    "decoded",
    "encode_schema",
    "judged_rows",
    "read_failures",
    "read_job",
    "read_job_failures",
    "read_status",
]
