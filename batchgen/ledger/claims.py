"""Claims: a runner says that it begins a unit, so that others begin with other units.

They spare runners each other's work, and nothing rests on them: commits alone decide, so that
claims need no clock and no renewal, and one of a dead runner is only passed over for a while.
"""

from __future__ import annotations

from batchgen.dataset.storage import Storage
from batchgen.ledger.files import claim_path
from batchgen.records import Unit


class Claims:
    """The claims of one process. One thread may take them while another one drops them."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage = storage
        self._run_id = run_id
        self._unit_ids: set[int] = set()

    def take(self, unit: Unit) -> bool:
        """Say that this runner begins the unit; False if one, perhaps a dead one, has begun it."""
        try:
            self._storage.create(claim_path(unit.unit_id), self._run_id.encode())
        except FileExistsError:
            return False
        self._unit_ids.add(unit.unit_id)
        return True

    def drop(self, unit: Unit) -> None:
        """The unit is committed: no claim on it means anything now, whoever has it."""
        self._unit_ids.discard(unit.unit_id)
        self._storage.delete([claim_path(unit.unit_id)])

    def give_up(self) -> None:
        """Of all units that are not committed: the next run goes on with them first."""
        self._storage.delete([claim_path(unit_id) for unit_id in list(self._unit_ids)])
