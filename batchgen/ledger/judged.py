"""How the last rows fared that earlier runs have judged: `errors.max_error_rate` goes on there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchgen.ledger.ledger import Ledger
from batchgen.records import RowFailure, RowResult


def judged_rows(
    ledger: Ledger, recovered: Mapping[int, Sequence[RowResult]], max_rows: int
) -> list[RowFailure | None]:
    """The last `max_rows` rows up to the last one that has ended, in input order; None if a row
    did not fail.

    `recovered` are the rows of uncommitted units that have ended, by unit. Others before the last
    one had become prompts: rows are judged in input order.
    """
    units = ledger.plan.units
    begun = [u.unit_id for u in units if u.unit_id in ledger.committed or u.unit_id in recovered]
    rows: list[RowFailure | None] = []
    for unit_id in range(max(begun, default=-1), -1, -1):
        results = recovered.get(unit_id, ())
        if unit_id in ledger.committed:
            results = ledger.failures(unit_id)
        failures = {row.key.index: row for row in results if isinstance(row, RowFailure)}
        num_judged = units[unit_id].num_rows
        if unit_id == begun[-1] and unit_id not in ledger.committed:
            num_judged = 1 + max(row.key.index for row in results)
        rows = [*(failures.get(index) for index in range(num_judged)), *rows]
        if len(rows) >= max_rows:
            break
    return rows[-max_rows:]
