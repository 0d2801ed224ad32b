"""Beams whose tokens are read from blocks that know their content.

Legend: G groups of a step, W beams, B = G * W rows, R rows of the slot table, X blocks of a row,
P blocks, S block size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from batchgen.engine.beam_search import BeamSearch, BeamStep, BeamTables, Hypothesis
from batchgen.engine.config import BeamOptions

CPU = torch.device("cpu")
History = tuple[int, ...]
LogitsOf = Callable[[Sequence[History]], Tensor]


class Blocks:
    """A slot table whose blocks hold, in each slot, the number of the history that ends there.

    Slots never written hold -1. The last group is padding, all of whose rows are the padding row.
    """

    def __init__(self, *, width: int, num_groups: int, block_size: int, max_len: int) -> None:
        rng = np.random.default_rng(0)
        num_rows, self.block_size = num_groups * width, block_size
        self.max_blocks = -(-max_len // block_size)
        self.width = width
        self.tables = BeamTables(
            width=width, num_groups=num_groups, block_size=block_size, device=CPU
        )
        rows = np.append(rng.permutation(num_rows), np.full(width, num_rows))
        self.rows_GW = torch.from_numpy(rows.reshape(num_groups + 1, width))
        self.table_RX = torch.zeros(num_rows + 1, self.max_blocks, dtype=torch.int32)
        num_blocks = num_rows * self.max_blocks
        self.free: list[int] = (rng.permutation(num_blocks) + 1).tolist()  # 0 is the padding's
        self.labels_PS = np.full((num_blocks + 1, block_size), -1)
        self.histories: dict[int, list[History]] = {}
        self.held: dict[int, list[int]] = {}
        self.expected = {"copied": 0, "distinct": 0, "beam": 0}
        self._numbers: dict[History, int] = {}

    def admit(self, group: int, prompt: History, max_len: int) -> None:
        """The prompt stands in the first row; the others have blocks for what follows it alone."""
        self.histories[group] = [prompt] * self.width
        self.held[group] = []
        for beam, row in enumerate(self.rows_GW[group].tolist()):
            self.table_RX[row] = 0
            first = 0 if beam == 0 else len(prompt) // self.block_size
            for column in range(first, -(-max_len // self.block_size)):
                self.held[group].append(self.free.pop())
                self.table_RX[row, column] = self.held[group][-1]
        self.write(group, 0, prompt, 0)

    def release(self, group: int) -> None:
        self.labels_PS[self.held[group]] = -1
        self.free[:0] = self.held.pop(group)
        del self.histories[group]

    def write(self, group: int, beam: int, history: History, start: int) -> None:
        blocks = self.table_RX[self.rows_GW[group, beam]]
        for place in range(start, len(history)):
            number = self._numbers.setdefault(history[: place + 1], len(self._numbers))
            self.labels_PS[blocks[place // self.block_size], place % self.block_size] = number

    def read(self, group: int, beam: int, length: int) -> list[int]:
        slots_T = self.labels_PS[self.table_RX[self.rows_GW[group, beam]]].reshape(-1)
        return slots_T[:length].tolist()  # type: ignore[no-any-return]

    def apply(self, groups: Sequence[int], step: BeamStep) -> None:
        """Forks, copies, checks what every beam reads, and writes the tokens chosen."""
        before_RX = self.table_RX.clone()
        groups_G = torch.tensor(groups)
        rows_B = self.rows_GW[groups_G].flatten()
        forks = self.tables.fork(groups_G, rows_B, self.table_RX, step)
        copied = forks.is_copied_B.nonzero()[:, 0]
        sources, targets = forks.source_B[copied].tolist(), forks.target_B[copied].tolist()
        assert len(set(targets)) == len(targets), "a target occurs twice"
        assert not set(targets) & set(sources), "what is read is written"
        for source, target, count in zip(
            sources, targets, forks.num_slots_B[copied].tolist(), strict=True
        ):
            assert 0 < count < self.block_size, "a full or empty block is copied"
            assert (self.labels_PS[source, :count] >= 0).all(), "an unwritten slot is copied"
            self.labels_PS[target] = -1
            self.labels_PS[target, :count] = self.labels_PS[source, :count]
        for index, group in enumerate(groups):
            if step.is_running_G[index]:
                length = int(step.kv_lens_G[index])
                self._go_on(
                    group, length, step.parents_GW[index].tolist(), step.tokens_GW[index].tolist()
                )
            else:
                rows = self.rows_GW[group]
                assert torch.equal(self.table_RX[rows], before_RX[rows]), "a done group moved"
        assert int(self.tables.copied_blocks) == self.expected["copied"]
        assert int(self.tables.distinct_blocks) == self.expected["distinct"]
        assert int(self.tables.beam_blocks) == self.expected["beam"]

    def _go_on(self, group: int, length: int, parents: list[int], tokens: list[int]) -> None:
        column = length // self.block_size
        table_WX = self.table_RX[self.rows_GW[group]].numpy()
        own = table_WX[:, column:][table_WX[:, column:] > 0]
        assert len(np.unique(own)) == len(own), "two beams would write to one block"
        assert not np.isin(own, table_WX[:, :column]).any(), "a whole block would be written"
        assert set(np.unique(table_WX)) - {0} <= set(self.held[group]), "another group's block"
        old = self.histories[group]
        self.histories[group] = [
            (*old[parent], token) for parent, token in zip(parents, tokens, strict=True)
        ]
        for beam, history in enumerate(self.histories[group]):
            assert len(history) == length + 1
            expected = [self._numbers[history[: place + 1]] for place in range(length)]
            assert self.read(group, beam, length) == expected
        for beam, history in enumerate(self.histories[group]):
            self.write(group, beam, history, length)
        if length % self.block_size:
            self.expected["copied"] += self.width - len(set(parents))
        self.expected["distinct"] += len(np.unique(table_WX[:, : column + 1]))
        self.expected["beam"] += self.width * (column + 1)


def run_beams(
    options: BeamOptions,
    prompts: Sequence[History],
    max_outputs: Sequence[int],
    logits_of: LogitsOf,
    *,
    num_groups: int = 2,
    block_size: int = 4,
) -> tuple[list[list[Hypothesis]], Blocks]:
    """All prompts through `num_groups` slots: the next one enters when a group is done, so that
    groups of all ages share a step, beside groups that are done and padding, whose logits are
    anything and NaN."""
    width = options.width
    stop_lens = [len(p) + m for p, m in zip(prompts, max_outputs, strict=True)]
    search = BeamSearch(
        options, num_groups=num_groups, max_output_tokens=max(max_outputs), device=CPU
    )
    blocks = Blocks(
        width=width, num_groups=num_groups, block_size=block_size, max_len=max(stop_lens)
    )
    results: list[list[Hypothesis]] = [[] for _ in prompts]
    waiting, prompt_of = list(range(len(prompts))), dict[int, int]()
    groups = [*range(num_groups)[::-1], num_groups]
    while waiting or prompt_of:
        entering = [group for group in range(num_groups) if group not in prompt_of][: len(waiting)]
        for group in entering:
            prompt_of[group] = waiting.pop(0)
            blocks.admit(group, prompts[prompt_of[group]], stop_lens[prompt_of[group]])
        if entering:
            new = [prompt_of[group] for group in entering]
            search.enter(
                np.array(entering, dtype=np.int32),
                np.array([len(prompts[i]) for i in new], dtype=np.int32),
                np.array([stop_lens[i] for i in new], dtype=np.int32),
            )
            first_GV = torch.cat([logits_of([prompts[i]]) for i in new])
            blocks.apply(entering, search.step(torch.tensor(entering), first_GV))
        logits_GWV = torch.randn(num_groups + 1, width, first_GV.shape[1])
        logits_GWV[-1] = torch.nan
        for index, group in enumerate(groups):
            if group in prompt_of and not search.is_done_M[group]:
                logits_GWV[index] = logits_of(blocks.histories[group])
        blocks.apply(groups, search.step(torch.tensor(groups), logits_GWV.flatten(0, 1)))
        for group in [group for group in prompt_of if search.is_done_M[group]]:
            results[prompt_of.pop(group)] = search.best([group])[0]
            blocks.release(group)
    return results, blocks
