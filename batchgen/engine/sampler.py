"""From logits to the next token of each row, on the device.

Legend: B sequences of the step, R rows of the slot table, V vocabulary, E stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from batchgen.engine.config import SamplingOptions
from batchgen.engine.inputs import SlotState, to_device
from batchgen.engine.ops import SamplingOps
from batchgen.engine.step_plan import Int32, NewSequences


class Sampler:
    """Owns the token counts that penalties need (allocated only when the job has penalties)."""

    def __init__(
        self,
        options: SamplingOptions,
        ops: SamplingOps,
        *,
        num_rows: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.options = options
        self._ops = ops
        self._device = device
        self._eos_E = _token_tensor(options.eos_token_ids, device)
        self._stop_E = _token_tensor(options.stop_token_ids, device)
        self._any_E = torch.cat([self._eos_E, self._stop_E])
        self._counts_RV: Tensor | None = None
        self._in_prompt_RV: Tensor | None = None
        if options.has_penalties:
            shape = (num_rows + 1, vocab_size)
            self._counts_RV = torch.zeros(shape, dtype=torch.int16, device=device)
            self._in_prompt_RV = torch.zeros(shape, dtype=torch.bool, device=device)

    def enter(self, new: NewSequences) -> None:
        """Forgets the rows' former occupants and notes the tokens of the new prompts, and of their
        outputs what an earlier run has generated."""
        if self._counts_RV is None or self._in_prompt_RV is None or len(new.rows) == 0:
            return
        rows = to_device(new.rows.astype(np.int64), self._device)
        # An assigned scalar would be copied from the host, and the copy waited for.
        self._counts_RV.index_fill_(0, rows, 0)
        self._in_prompt_RV.index_fill_(0, rows, False)
        self._in_prompt_RV.view(-1).index_fill_(0, self._cells(new.rows, new.prompts), True)
        if any(map(len, new.outputs)):
            cells_T = self._cells(new.rows, new.outputs)
            one = torch.ones((), dtype=torch.int16, device=self._device)
            self._counts_RV.view(-1).index_add_(0, cells_T, one.expand(len(cells_T)))

    def _cells(self, rows: Int32, token_ids: Sequence[Int32]) -> Tensor:
        """Where the tokens of each row are counted: int64, into a flat table of rows."""
        assert self._counts_RV is not None
        lengths = np.array([len(ids) for ids in token_ids])
        rows_T = np.repeat(rows, lengths).astype(np.int64)
        cells_T = rows_T * self._counts_RV.shape[1] + np.concatenate(token_ids)
        return to_device(cells_T, self._device)

    def sample_and_advance(
        self, state: SlotState, rows_B: Tensor, kv_lens_B: Tensor, logits_BV: Tensor
    ) -> Tensor:
        """Samples a token for each active row, updates its state, and ends it where it must end.

        `kv_lens_B` counts the tokens with KV, so the sampled token stands at that position.
        `logits_BV` may be changed. Returns int32 tokens_B: see kernels.slots.advance_slots.
        """
        options = self.options
        if self._counts_RV is not None and self._in_prompt_RV is not None:
            self._ops.apply_penalties(
                logits_BV,
                rows_B,
                self._counts_RV,
                self._in_prompt_RV,
                presence=options.presence_penalty,
                frequency=options.frequency_penalty,
                repetition=options.repetition_penalty,
            )
        if options.min_tokens and len(self._any_E):
            num_generated_B = kv_lens_B - state.prompt_lens_R[rows_B]
            too_early_B1 = (num_generated_B < options.min_tokens)[:, None]
            # Added, so that NaN stays NaN.
            logits_BV[:, self._any_E] += torch.where(too_early_B1, float("-inf"), 0.0)
        tokens_B = self._ops.sample(
            logits_BV,
            state.seeds_R[rows_B],
            kv_lens_B,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
        )
        if self._counts_RV is not None:
            self._counts_RV.view(-1).index_add_(
                0,
                rows_B.to(torch.int64) * self._counts_RV.shape[1] + tokens_B,
                state.active_R[rows_B].to(torch.int16),
            )
        return self._ops.advance_slots(
            rows_B,
            kv_lens_B,
            tokens_B,
            logits_BV,
            self._eos_E,
            self._stop_E,
            state,
        )


def _token_tensor(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(sorted(set(ids)), dtype=torch.int64, device=device)
