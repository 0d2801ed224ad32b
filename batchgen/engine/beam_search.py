"""Beam search on the device: which tokens the beams go on with, and what that does to their blocks.

A beam group is W consecutive rows of a decode batch, all of one length, in lockstep. All shapes are
fixed and nothing waits for the device, so that a step can be part of a CUDA graph.

Legend: G groups of the step, W beams of a group, B = G * W rows of the batch, M group slots (the
last one, `padding_group`, belongs to nobody and is always done), K candidates of a group,
H beams with logits (1 or W), Y tokens of the longest output, E end tokens, V vocabulary, X blocks
of a row, S block size, R rows of the slot table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchgen.engine.config import BeamOptions
from batchgen.engine.inputs import to_device
from batchgen.engine.step_plan import Int32

_CHUNK = 8192  # logits of a row that are fp32 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A finished beam: its output (the end token included), and its score by length."""

    token_ids: list[int]
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamStep:
    """How each beam of a running group goes on. Where a group does not run, the parents are the
    beams themselves, and tokens and lengths mean nothing (but are within bounds)."""

    tokens_GW: Tensor  # int64
    parents_GW: Tensor  # int64, which of the W beams of the last step it continues
    is_running_G: Tensor  # bool, the group was not done, and is not by this step
    kv_lens_G: Tensor  # int32, tokens of a beam without the one chosen now: those with KV


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockForks:
    """Partly filled blocks to copy before the next KV is written, where `is_copied_B`.

    No block is both a source and a target, and no target occurs twice: any order will do.
    """

    source_B: Tensor  # int32 blocks
    target_B: Tensor  # int32 blocks
    num_slots_B: Tensor  # int32, the filled slots, 1 to S - 1 where a block is copied
    is_copied_B: Tensor  # bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """The best continuations of each group, best first."""

    scores_GK: Tensor  # fp32, summed log-probabilities
    beams_GK: Tensor  # int64
    tokens_GK: Tensor  # int64


class BeamSearch:
    """Owns the beams of M groups: scores, and a lattice of (token, parent) a step and beam.

    A hypothesis is an edge of the lattice, so that no step moves histories; the host walks back
    once, at the end. Of a group that is done nothing is written until another one enters.
    Source: the algorithm of transformers' `_beam_search` (5.23) with one prompt a batch.
    """

    def __init__(
        self, options: BeamOptions, *, num_groups: int, max_output_tokens: int, device: torch.device
    ) -> None:
        self.options = options
        self.padding_group = num_groups
        self._device = device
        size, width = num_groups + 1, options.width
        self._beams_W = torch.arange(width, device=device)
        ends = options.end_token_ids
        self._ends_E = torch.tensor(ends, dtype=torch.int64, device=device)
        self._num_candidates = options.num_candidates
        lengths = torch.arange(max_output_tokens + 1, dtype=torch.float64)
        self._penalties = (lengths**options.length_penalty).float().to(device)  # by output length
        self.prompt_lens_M = torch.zeros(size, dtype=torch.int32, device=device)
        self.max_outputs_M = torch.ones(size, dtype=torch.int64, device=device)
        self.num_outputs_M = torch.zeros(size, dtype=torch.int64, device=device)
        self.is_done_M = torch.ones(size, dtype=torch.bool, device=device)
        self._scores_MW = torch.zeros(size, width, device=device)
        lattice = (size, max_output_tokens, width)
        self._tokens_MYW = torch.zeros(lattice, dtype=torch.int32, device=device)
        self._parents_MYW = torch.zeros(lattice, dtype=torch.int32, device=device)
        # Hypotheses, best first; there is one where the score is above -inf.
        self._final_scores_MW = torch.zeros(size, width, device=device)
        self._final_edges_MW3 = torch.zeros(size, width, 3, dtype=torch.int64, device=device)

    def enter(self, groups: Int32, prompt_lens: Int32, stop_lens: Int32) -> None:
        """Begins these groups; `stop_lens` count prompt and output together, as for a sequence."""
        max_outputs = (stop_lens - prompt_lens).astype(np.int64)
        assert max_outputs.min() > 0, "a group without room for a token"
        assert max_outputs.max() <= self._tokens_MYW.shape[1], "an output beyond max_output_tokens"
        groups_G = to_device(groups.astype(np.int64), self._device)
        self.prompt_lens_M[groups_G] = to_device(prompt_lens, self._device)
        self.max_outputs_M[groups_G] = to_device(max_outputs, self._device)
        # An assigned scalar would be copied from the host, and the copy waited for.
        self.num_outputs_M.index_fill_(0, groups_G, 0)
        self.is_done_M.index_fill_(0, groups_G, False)
        self._scores_MW.index_fill_(0, groups_G, 0.0)
        self._final_scores_MW.index_fill_(0, groups_G, float("-inf"))

    def step(self, groups_G: Tensor, logits_BV: Tensor) -> BeamStep:
        """Goes on by a token. Each slot but the padding group's occurs once in groups_G (int64).

        `logits_BV` are of all beams; in the groups' first step, where all beams are alike, of the
        first beam alone: [G, V]. They have at least K columns. A group with a NaN logit ends
        without hypotheses.
        """
        was_running_G = ~self.is_done_M[groups_G]
        max_outputs_G = self.max_outputs_M[groups_G]
        # The token chosen now is counted; a group that is done stays within its tables.
        num_outputs_G = torch.minimum(self.num_outputs_M[groups_G] + 1, max_outputs_G)
        found = self._candidates(logits_BV, self._scores_MW[groups_G])
        has_ended_GK = (found.tokens_GK[..., None] == self._ends_E).any(-1)
        has_ended_GK |= (num_outputs_G >= max_outputs_G)[:, None]
        # The first W, in their order, that go on.
        width = self.options.width
        chosen_GW = has_ended_GK.to(torch.uint8).sort(dim=1, stable=True).indices[:, :width]
        scores_GW = found.scores_GK.gather(1, chosen_GW)
        tokens_GW = found.tokens_GK.gather(1, chosen_GW)
        parents_GW = found.beams_GK.gather(1, chosen_GW)

        # Slots that must not change are written in the padding group's place.
        into_G = torch.where(was_running_G, groups_G, self.padding_group)
        is_full_G, worst_G = self._finish(groups_G, into_G, num_outputs_G, found, has_ended_GK)
        is_open_G = self._can_improve(scores_GW[:, 0], worst_G, num_outputs_G, max_outputs_G)
        if self.options.early_stopping is True:
            is_open_G &= ~is_full_G
        is_running_G = was_running_G & is_open_G & (num_outputs_G < max_outputs_G)

        self._scores_MW[into_G] = scores_GW
        self._tokens_MYW[into_G, num_outputs_G - 1] = tokens_GW.int()
        self._parents_MYW[into_G, num_outputs_G - 1] = parents_GW.int()
        self.num_outputs_M[into_G] = num_outputs_G
        self.is_done_M[into_G] = ~is_running_G
        return BeamStep(
            tokens_GW=tokens_GW,
            parents_GW=torch.where(is_running_G[:, None], parents_GW, self._beams_W),
            is_running_G=is_running_G,
            kv_lens_G=self.prompt_lens_M[groups_G] + (num_outputs_G - 1).int(),
        )

    def best(self, groups: Sequence[int]) -> list[list[Hypothesis]]:
        """The W hypotheses of each of these groups, which are done, best first; none if a logit was
        NaN.

        Waits for the current stream. A group that is done is not written: so this may run on a
        stream of its own, beside later steps of other groups.
        """
        groups_G = torch.tensor(groups, device=self._device)
        tokens_GYW = self._tokens_MYW[groups_G].cpu().numpy()
        parents_GYW = self._parents_MYW[groups_G].cpu().numpy()
        scores_GW = self._final_scores_MW[groups_G].cpu().numpy()
        edges_GW3 = self._final_edges_MW3[groups_G].cpu().numpy()
        # Each hypothesis walks back from its end, all of them at once.
        beams_GW, index_G1 = edges_GW3[..., 1].copy(), np.arange(len(groups))[:, None]
        ids_GWY = np.zeros((*beams_GW.shape, tokens_GYW.shape[1]), dtype=np.int32)
        for place in range(int(edges_GW3[..., 0].max()) - 2, -1, -1):
            ids_GWY[..., place] = tokens_GYW[index_G1, place, beams_GW]
            is_begun_GW = place <= edges_GW3[..., 0] - 2
            parents_GW = parents_GYW[index_G1, place, beams_GW]
            beams_GW = np.where(is_begun_GW, parents_GW, beams_GW)
        return [
            [
                Hypothesis(token_ids=[*ids_WY[i, : edge[0] - 1].tolist(), int(edge[2])], score=s)
                for i, (edge, s) in enumerate(zip(edges_W3, scores_W.tolist(), strict=True))
                if s > float("-inf")
            ]
            for ids_WY, edges_W3, scores_W in zip(ids_GWY, edges_GW3, scores_GW, strict=True)
        ]

    def _candidates(self, logits_BV: Tensor, scores_GW: Tensor) -> _Candidates:
        """A group's K best are among the K best of each beam, whose order the logits decide."""
        count, num_groups = self._num_candidates, len(scores_GW)
        assert logits_BV.shape[1] >= count, "a vocabulary smaller than the candidates of a beam"
        logits_BK, tokens_BK = logits_BV.topk(count)
        logits_BK = logits_BK.float() - logits_BK[:, :1].float()
        log_probs_BK = logits_BK - _log_sums(logits_BV, tokens_BK[:, :1])
        log_probs_GHK = log_probs_BK.view(num_groups, -1, count)
        scores_GHK = log_probs_GHK + scores_GW[:, : log_probs_GHK.shape[1], None]
        scores_GK, places_GK = scores_GHK.flatten(1).topk(count)
        return _Candidates(
            scores_GK=scores_GK,
            beams_GK=places_GK // count,
            tokens_GK=tokens_BK.view(num_groups, -1).gather(1, places_GK),
        )

    def _finish(
        self,
        groups_G: Tensor,
        into_G: Tensor,
        num_outputs_G: Tensor,
        found: _Candidates,
        has_ended_GK: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Keeps the W best hypotheses, old and new. Returns whether there are W, and the worst's
        score (-inf if there are not)."""
        width = self.options.width
        # Candidates beyond the W best stand by for beams that ended; they do not end themselves.
        counts_GW = has_ended_GK[:, :width]
        new_GW = found.scores_GK[:, :width] / self._penalties[num_outputs_G][:, None]
        new_GW = new_GW.masked_fill(~counts_GW, float("-inf"))
        edges_GW3 = torch.stack(
            [
                num_outputs_G[:, None].expand(-1, width),
                found.beams_GK[:, :width],
                found.tokens_GK[:, :width],
            ],
            dim=2,
        )
        all_scores = torch.cat([self._final_scores_MW[groups_G], new_GW], dim=1)
        all_edges = torch.cat([self._final_edges_MW3[groups_G], edges_GW3], dim=1)
        scores_GW, kept_GW = all_scores.topk(width)
        # NaN is the greatest candidate; it leaves no hypothesis, and nothing that can be improved.
        has_nan_G1 = found.scores_GK[:, :1].isnan()
        scores_GW = scores_GW.masked_fill(has_nan_G1, float("-inf"))
        self._final_scores_MW[into_G] = scores_GW
        self._final_edges_MW3[into_G] = all_edges.gather(1, kept_GW[..., None].expand(-1, -1, 3))
        worst_G = scores_GW[:, -1]
        return worst_G > float("-inf"), worst_G

    def _can_improve(
        self, best_running_G: Tensor, worst_G: Tensor, num_outputs_G: Tensor, max_outputs_G: Tensor
    ) -> Tensor:
        """Whether the best beam's score, at the length assumed for it, beats the worst hypothesis.

        A heuristic: the score falls as the beam grows, but what it is divided by may grow faster.
        """
        options = self.options
        is_longest = options.early_stopping == "never" and options.length_penalty > 0.0
        length_G = max_outputs_G if is_longest else num_outputs_G
        return best_running_G / self._penalties[length_G] > worst_G


def _log_sums(logits_BV: Tensor, argmax_B1: Tensor) -> Tensor:
    """log(sum(exp(logits - max))), [B, 1] in fp32, with no fp32 copy of all logits."""
    max_B1 = logits_BV.gather(1, argmax_B1).float()
    sums_B1 = torch.zeros_like(max_B1)
    for start in range(0, logits_BV.shape[1], _CHUNK):
        chunk_BC = logits_BV[:, start : start + _CHUNK].float()
        sums_B1 += (chunk_BC - max_B1).exp_().sum(dim=1, keepdim=True)
    return sums_B1.log_()


class BeamTables:
    """Moves the rows of the block table as beams fork, and counts what that shares and copies.

    The host gives every beam's row its own blocks for all columns that a window may fill; a fork
    touches none of them but the column in use. In it, one child of each parent goes on in its
    parent's block, and every other child takes the block of a beam that nobody continues, into
    which the parent's filled slots are copied. There are as many such beams as other children, so
    no block is set aside for forks, a mere exchange of beams copies nothing, and what is read is
    never written in one step. A block that is full is shared by its table entry.

    What no row refers to any more (a full block of a lost beam) is found by the host between
    windows: the group owns it still.
    """

    def __init__(self, *, width: int, num_groups: int, block_size: int, device: torch.device):
        self._block_size = block_size
        self._beams_W = torch.arange(width, device=device)
        self._is_earlier_WW = self._beams_W[None, :] < self._beams_W[:, None]  # [i, j]: j < i
        # [i, j]: leading blocks that both rows have. Those shared are whole, and first in a row.
        shape = (num_groups + 1, width, width)
        self._common_MWW = torch.zeros(shape, dtype=torch.int64, device=device)
        # Sums over steps and running groups.
        self.copied_blocks = torch.zeros((), dtype=torch.int64, device=device)
        self.distinct_blocks = torch.zeros((), dtype=torch.int64, device=device)
        self.beam_blocks = torch.zeros((), dtype=torch.int64, device=device)  # without sharing

    def fork(
        self, groups_G: Tensor, rows_B: Tensor, block_table_RX: Tensor, step: BeamStep
    ) -> BlockForks:
        """Makes row i of each group the continuation of its parent's row.

        In a group's first step only its first row need hold the prompt's blocks, and the others
        their own from the block on that takes the next token.
        """
        num_groups, width = step.parents_GW.shape
        parents_GW = step.parents_GW
        kv_lens_G1 = step.kv_lens_G[:, None].long()
        # A group at its stop length may stand one past its last block; it does not run.
        column_G1 = (kv_lens_G1 // self._block_size).clamp_(max=block_table_RX.shape[1] - 1)
        num_slots_G1 = kv_lens_G1 % self._block_size
        is_other_GW, owners_GW = self._owners(parents_GW)

        table_GWX = block_table_RX[rows_B].view(num_groups, width, -1)
        index_GWX = parents_GW[..., None].expand_as(table_GWX)
        columns_X = torch.arange(table_GWX.shape[2], device=rows_B.device)
        is_full_G1X = (columns_X < column_G1)[:, None]
        new_GWX = torch.where(is_full_G1X, table_GWX.gather(1, index_GWX), table_GWX)
        column_GW1 = column_G1[..., None].expand(-1, width, -1)
        tails_GW = table_GWX.gather(2, column_GW1)[..., 0]
        target_GW = tails_GW.gather(1, owners_GW)
        new_GWX.scatter_(2, column_GW1, target_GW[..., None])
        block_table_RX[rows_B] = new_GWX.view(len(rows_B), -1)

        is_copied_GW = is_other_GW & (num_slots_G1 > 0)
        self._count(groups_G, parents_GW, column_G1, step.is_running_G, is_copied_GW)
        return BlockForks(
            source_B=tails_GW.gather(1, parents_GW).flatten(),
            target_B=target_GW.flatten(),
            num_slots_B=num_slots_G1.int().repeat(1, width).flatten(),
            is_copied_B=is_copied_GW.flatten(),
        )

    def _owners(self, parents_GW: Tensor) -> tuple[Tensor, Tensor]:
        """Which children are not the first of their parent, and in whose last block each child goes
        on: its parent's if it is the first, else, in order, a beam's without children."""
        is_parent_GWW = parents_GW[..., None] == self._beams_W  # [child, parent]
        is_sibling_GWW = parents_GW[..., None] == parents_GW[:, None, :]
        is_other_GW = (is_sibling_GWW & self._is_earlier_WW).any(2)
        is_lost_GW = ~is_parent_GWW.any(1)
        rank_GW, lost_rank_GW = is_other_GW.cumsum(1), is_lost_GW.cumsum(1)
        takes_GWW = is_lost_GW[:, None, :] & (rank_GW[..., None] == lost_rank_GW[:, None, :])
        owners_GW = torch.where(is_other_GW, takes_GWW.to(torch.uint8).argmax(2), parents_GW)
        return is_other_GW, owners_GW

    def _count(
        self,
        groups_G: Tensor,
        parents_GW: Tensor,
        column_G1: Tensor,
        is_running_G: Tensor,
        is_copied_GW: Tensor,
    ) -> None:
        """Adds what the step copied, and the blocks of its beams with the one that it will fill."""
        width = len(self._beams_W)
        common_GWW = self._common_MWW[groups_G]
        index_GWW = parents_GW[..., None].expand(-1, -1, width)
        common_GWW = common_GWW.gather(1, index_GWW).gather(2, index_GWW.transpose(1, 2))
        # Children of one parent have all whole blocks in common.
        is_sibling_GWW = parents_GW[..., None] == parents_GW[:, None, :]
        common_GWW = torch.where(is_sibling_GWW, column_G1[..., None], common_GWW)
        self._common_MWW[groups_G] = common_GWW
        shared_GW = (common_GWW * self._is_earlier_WW).amax(2)  # with any earlier row
        distinct_GW = (column_G1 + 1 - shared_GW) * is_running_G[:, None]
        self.copied_blocks += is_copied_GW.sum()
        self.distinct_blocks += distinct_GW.sum()
        self.beam_blocks += ((column_G1 + 1) * width * is_running_G[:, None]).sum()
