"""A stand-in for the device of a beam search: random forks, and blocks that know their content.

Legend: R rows of the device's table, X blocks of a row, P blocks, S block size, W beams, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from batchgen.engine.beam_runner import BeamCounts, BeamWindow
from batchgen.engine.beam_scheduler import BeamScheduler
from batchgen.engine.beam_search import BeamStep, BeamTables, Hypothesis
from batchgen.engine.sequences import Admissible
from batchgen.engine.step_plan import PrefillPlan, StepPlan
from tests.unit.engine.labelled_blocks import CPU


def admit_all(scheduler: BeamScheduler) -> None:
    """Whatever the forecast says, so that only the rule against deadlocks holds prompts back."""

    def admissible() -> Admissible:
        count = len(scheduler.admission.candidates()[0])
        return Admissible(count=count, num_rows=count, num_tokens=1 << 30)

    scheduler._admissible = admissible  # type: ignore[method-assign]


class BeamDevice:
    """Stands in for `BeamRunner`: moves the table with the device's own `BeamTables`.

    A slot is labelled with the number of the history that ends there; a beam that reads another
    label than its own fails. A group ends when `length_of[prompt]` tokens are made. Of a group
    that has ended nothing is read or written, whoever holds its blocks.
    """

    def __init__(
        self,
        scheduler: BeamScheduler,
        length_of: dict[tuple[int, ...], int],
        seed: int,
        forks: float,
    ) -> None:
        """`forks`: the chance of a step in which beams fork, and do not only change places."""
        self.scheduler = scheduler
        self.length_of = length_of
        self.forks = forks
        self.rng = np.random.default_rng(seed)
        width, groups = scheduler.width, scheduler.num_groups
        self.size, self.width = scheduler.config.block_size, width
        self.tables = BeamTables(width=width, num_groups=groups, block_size=self.size, device=CPU)
        columns = scheduler.kv.table_RX.shape[1]
        self.table_RX = torch.zeros(groups * width + 1, columns, dtype=torch.int32)
        self.labels_PS = np.full((scheduler.config.gpu_blocks, self.size), -1)
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.histories: dict[int, np.ndarray] = {}  # labels, [W, tokens with KV]
        self.newest: dict[int, np.ndarray] = {}  # labels of the tokens without KV yet
        self.num_outputs = np.zeros(groups, dtype=np.int64)
        self.active = np.zeros(groups, dtype=np.bool_)
        self.num_steps = self.num_unread = 0
        self._labels: dict[tuple[int, int], int] = {}

    def launch(self, plan: StepPlan) -> _Unread:
        """Runs the plan at once, as what was launched before has run by then."""
        if plan.table is not None:
            rows, columns = (
                torch.from_numpy(x).long() for x in (plan.table.rows, plan.table.columns)
            )
            self.table_RX[rows, columns] = torch.from_numpy(plan.table.blocks)
        self.scheduler.check_integrity()
        max_blocks = 0
        if plan.prefill is not None:
            self._prefill(plan.prefill, plan.rows.tolist())
        else:
            assert plan.beams is not None
            max_blocks = plan.beams.max_blocks
            if self.num_unread == 0:
                self._check_nothing_is_lost(plan.beams.groups.tolist())
            for _ in range(plan.beams.num_steps):
                self._decode(plan.beams.groups.tolist())
        rows_B = torch.from_numpy(plan.rows).long()[:, None] * self.width + torch.arange(self.width)
        self.num_unread += 1
        window = BeamWindow(
            active_G=self.active[plan.rows],
            num_outputs_G=self.num_outputs[plan.rows],
            table_GWX=self.table_RX[rows_B, :max_blocks].numpy(),
            counts=BeamCounts(
                copied_blocks=int(self.tables.copied_blocks),
                distinct_blocks=int(self.tables.distinct_blocks),
                beam_blocks=int(self.tables.beam_blocks),
            ),
        )
        return _Unread(self, window)

    def hypotheses(self, groups: Sequence[int]) -> list[list[Hypothesis]]:
        return [
            [Hypothesis(token_ids=[7] * int(self.num_outputs[group]), score=0.0)] * self.width
            for group in groups
        ]

    def _label(self, before: int, token: int) -> int:
        return self._labels.setdefault((before, token), len(self._labels))

    def _prefill(self, plan: PrefillPlan, ended: Sequence[int]) -> None:
        new = zip(plan.new.rows.tolist(), plan.new.prompts, strict=True)
        for row, tokens in new:
            assert row % self.width == 0
            self.prompts[row // self.width] = tuple(tokens.tolist())
            self.active[row // self.width] = True
            self.num_outputs[row // self.width] = 0
        spans = zip(
            plan.rows.tolist(), plan.query_lens.tolist(), plan.seq_lens.tolist(), strict=True
        )
        spans = list(spans)
        for row, count, end in spans:
            labels = self._prompt_labels(row // self.width)
            for place in range(end - count, end):
                self._write(row, place, int(labels[place]))
        if plan.slot_copies is not None:
            flat = self.labels_PS.reshape(-1)
            flat[plan.slot_copies.target] = flat[plan.slot_copies.source]
        for row, _, end in spans:
            assert self._read(row, end) == self._prompt_labels(row // self.width)[:end].tolist()
        for group in ended:
            self.histories[group] = np.tile(self._prompt_labels(group), (self.width, 1))
        if ended:
            self._fork(ended, is_first=True)

    def _prompt_labels(self, group: int) -> np.ndarray:
        labels = [-1]
        for token in self.prompts[group]:
            labels.append(self._label(labels[-1], token))
        return np.array(labels[1:])

    def _decode(self, groups: Sequence[int]) -> None:
        self.num_steps += 1
        for group in groups:
            if not self.active[group]:
                continue
            length = self.histories[group].shape[1]
            joined = np.concatenate([self.histories[group], self.newest[group][:, None]], axis=1)
            self.histories[group] = joined
            for beam, labels in enumerate(joined):
                self._write(group * self.width + beam, length, int(labels[-1]))
            for beam, labels in enumerate(joined):
                row = group * self.width + beam
                assert self._read(row, length + 1) == labels.tolist(), "a beam reads a wrong KV"
        self._fork(groups, is_first=False)

    def _fork(self, groups: Sequence[int], *, is_first: bool) -> None:
        parents = np.array([self._parents(group, is_first=is_first) for group in groups])
        for group in groups:
            if self.active[group]:
                self.num_outputs[group] += 1
                stop = self.scheduler.table.occupants[group].max_tokens
                length = min(stop, self.length_of[self.prompts[group]])
                self.active[group] = self.num_outputs[group] < length
        runs = self.active[groups]
        parents[~runs] = np.arange(self.width)
        kv_lens = [self.histories[group].shape[1] for group in groups]
        step = BeamStep(
            tokens_GW=torch.zeros(parents.shape, dtype=torch.int64),
            parents_GW=torch.from_numpy(parents),
            is_running_G=torch.from_numpy(runs),
            kv_lens_G=torch.tensor(kv_lens, dtype=torch.int32),
        )
        rows = np.array(groups)[:, None] * self.width + np.arange(self.width)
        forks = self.tables.fork(
            torch.tensor(groups), torch.from_numpy(rows.ravel()), self.table_RX, step
        )
        for index in forks.is_copied_B.nonzero()[:, 0].tolist():
            count = int(forks.num_slots_B[index])
            source, target = int(forks.source_B[index]), int(forks.target_B[index])
            self.labels_PS[target, :count] = self.labels_PS[source, :count]
        for group, chosen in zip(groups, parents, strict=True):
            if self.active[group]:
                self.histories[group] = self.histories[group][chosen]
                last = self.histories[group][:, -1].tolist()
                labels = [self._label(before, 1000 + beam) for beam, before in enumerate(last)]
                self.newest[group] = np.array(labels)

    def _parents(self, group: int, *, is_first: bool) -> np.ndarray:
        """All different, or few of them, or all the first one at a group's start."""
        if is_first:
            return np.zeros(self.width, dtype=np.int64)
        if self.rng.random() >= self.forks:
            return self.rng.permutation(self.width)
        return self.rng.integers(0, self.rng.integers(1, self.width + 1), self.width)

    def _check_nothing_is_lost(self, groups: Sequence[int]) -> None:
        """All results are read: a group holds just the blocks that its rows refer to."""
        blocks = self.scheduler.blocks
        for group in groups:
            first = group * self.width
            columns = int(blocks.num_columns_M[group])
            used = set(self.table_RX[first : first + self.width, :columns].flatten().tolist())
            held = set(np.flatnonzero(blocks._owner_P == group).tolist())
            count = self.scheduler.kv.num_blocks_R[group]
            assert used == held | set(self.scheduler.kv.table_RX[group, :count].tolist())

    def _write(self, row: int, place: int, label: int) -> None:
        self.labels_PS[self.table_RX[row, place // self.size], place % self.size] = label

    def _read(self, row: int, length: int) -> list[int]:
        labels: list[int] = self.labels_PS[self.table_RX[row]].reshape(-1)[:length].tolist()
        return labels


class _Unread:
    """A window that the host has not read yet."""

    def __init__(self, device: BeamDevice, window: BeamWindow) -> None:
        self._device, self._window = device, window

    def wait(self) -> BeamWindow:
        self._device.num_unread -= 1
        return self._window
