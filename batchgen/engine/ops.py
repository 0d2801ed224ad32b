"""What the engine asks of a device beside what a decoder asks (`models.ops`)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from batchgen.engine.inputs import StepBatch
from batchgen.kernels.reference import SlotInputs, SlotTable
from batchgen.models.ops import Ops


class SamplingOps(Protocol):
    """Legend: B sequences, R rows of the slot table, V vocabulary."""

    def apply_penalties(
        self,
        logits_BV: Tensor,
        rows_B: Tensor,
        counts_RV: Tensor,
        in_prompt_RV: Tensor,
        *,
        presence: float,
        frequency: float,
        repetition: float,
    ) -> None:
        """Changes `logits_BV` in place."""
        ...

    def sample(
        self,
        logits_BV: Tensor,
        seeds_B: Tensor,
        positions_B: Tensor,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
    ) -> Tensor:
        """int64 tokens_B, a function of logits, seed and position alone."""
        ...

    def advance_slots(
        self,
        rows_B: Tensor,
        seq_lens_B: Tensor,
        sampled_B: Tensor,
        logits_BV: Tensor,
        eos_E: Tensor,
        stops_E: Tensor,
        table: SlotTable,
    ) -> Tensor:
        """See kernels.slots.advance_slots."""
        ...


class EngineOps(Ops[StepBatch], SamplingOps, Protocol):
    """One backend: all the device operations of the engine."""

    def read_slots(
        self,
        rows_B: Tensor,
        table: SlotTable,
        prefix_lens_B: Tensor | None,
        *,
        block_size: int,
    ) -> SlotInputs:
        """See kernels.slots.read_slots."""
        ...

    def copy_block_starts(
        self,
        kv_PL2KSH: Tensor,
        source_F: Tensor,
        target_F: Tensor,
        num_slots_F: Tensor,
        is_copied_F: Tensor,
    ) -> None:
        """See kernels.copy_block_starts.copy_block_starts."""
        ...

    def begin_step(self, batch: StepBatch) -> None:
        """Prepares what all layers of the step share. Runs inside the captured step."""
        ...
