"""What the engine did in each run: one small file a run, for `status`. Nothing else reads them.

A run replaces its file at every flush before which the engine has done something, so that a
killed one is counted up to its last flush.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

from pydantic import TypeAdapter

from batchgen.dataset.storage import Storage
from batchgen.errors import BatchgenError
from batchgen.ledger.files import full_name, list_runs, parse_json, read_many
from batchgen.ledger.plan import StoredJob
from batchgen.records import EngineStats

_GAUGES = frozenset({"num_waiting", "num_running", "num_swapped", "blocks_total", "blocks_used"})
_MEANS = frozenset({"kv_waste", "kv_saved"})
_PEAKS = frozenset({"peak_saved_blocks"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The engine's counters of one run, as far as it has come."""

    job_id: str
    run_id: str
    wall_s: float  # from the engine's start to the flush that saw these counters first
    engine: EngineStats


_RUN = TypeAdapter(RunRecord)


def encode_run(run: RunRecord) -> bytes:
    return _RUN.dump_json(run, indent=1) + b"\n"


def read_runs(storage: Storage, job: StoredJob) -> list[RunRecord]:
    """The runs of this job. A file that cannot be understood is left out with a warning."""
    runs = []
    for path, data in read_many(storage, list_runs(storage)):
        try:
            run = parse_json(_RUN, data, full_name(storage, path))
        except BatchgenError as error:
            _log.warning("a run is not counted: %s", error)
            continue
        if run.job_id == job.job_id:
            runs.append(run)
    return runs


def runs_status(runs: Sequence[RunRecord]) -> dict[str, object]:
    """`count`, `wall_s`, and the totals of the engines' counters by their names in EngineStats.

    Means are over all decode steps, peaks are the highest of any run. `engine` is None when no
    run has had one.
    """
    return {
        "count": len(runs),
        "wall_s": sum(run.wall_s for run in runs),
        "engine": _totals([run.engine for run in runs]) if runs else None,
    }


def _totals(engines: Sequence[EngineStats]) -> dict[str, int | float]:
    steps = [engine.decode_steps for engine in engines]
    totals: dict[str, int | float] = {}
    for name in (field.name for field in fields(EngineStats)):
        values = [getattr(engine, name) for engine in engines]
        if name in _PEAKS:
            totals[name] = max(values)
        elif name in _MEANS:
            weighted = sum(value * n for value, n in zip(values, steps, strict=True))
            totals[name] = weighted / max(sum(steps), 1)
        elif name not in _GAUGES:
            totals[name] = sum(values)
    return totals
