"""Repetition, frequency and presence penalties, applied to logits in place.

With c_v the times that token v was generated: where v is in the prompt or c_v > 0, a positive logit
is divided by `repetition` and another one multiplied; then frequency * c_v, and presence where
c_v > 0, are subtracted. B sequences, R slots, V vocabulary.
Source: vLLM's definitions; repetition from CTRL (arXiv 1909.05858).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _apply_penalties_kernel(
    logits_ptr,
    slot_ids_ptr,
    output_counts_ptr,
    prompt_mask_ptr,
    stride_logits,
    presence,
    frequency,
    repetition,
    V: tl.constexpr,
    USE_REPETITION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS_PER_ROW: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS_PER_ROW).to(tl.int64)
    ids = (tl.program_id(0) % BLOCKS_PER_ROW) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_ids_ptr + row).to(tl.int64)
    if slot >= 0:
        mask = ids < V
        counts = tl.load(output_counts_ptr + slot * V + ids, mask=mask, other=0)
        is_seen = counts > 0
        if USE_REPETITION:
            in_prompt = tl.load(prompt_mask_ptr + slot * V + ids, mask=mask, other=0)
            is_seen = is_seen | (in_prompt != 0)
        # Few tokens are seen: the rest of the logits is neither read nor written.
        logits_ptrs = logits_ptr + row * stride_logits + ids
        logits = tl.load(logits_ptrs, mask=is_seen, other=0.0)
        x = logits.to(tl.float32)
        if USE_REPETITION:
            x = tl.where(x > 0, x / repetition, x * repetition)
        x -= frequency * counts.to(tl.float32)
        x -= tl.where(counts > 0, presence, 0.0)
        tl.store(logits_ptrs, x.to(logits.dtype), mask=is_seen)


def apply_penalties(
    logits_BV: Tensor,
    slot_ids_B: Tensor,
    output_counts_RV: Tensor,
    prompt_mask_RV: Tensor,
    *,
    presence: float,
    frequency: float,
    repetition: float,
) -> None:
    """Changes logits_BV in place (bf16, fp16 or fp32; rows may be strided).

    slot_ids_B: int32 or int64, the slot whose counts a row reads; a negative one leaves the row.
    output_counts_RV: int16, contiguous. prompt_mask_RV: bool, contiguous.
    """
    batch, vocabulary = logits_BV.shape
    assert logits_BV.dtype in _DTYPES, f"no kernel for {logits_BV.dtype}"
    assert logits_BV.stride(1) == 1, "rows of logits must be contiguous"
    assert slot_ids_B.shape == (batch,), "one slot a row"
    assert slot_ids_B.dtype in (torch.int32, torch.int64), "slot ids must be integers"
    assert slot_ids_B.is_contiguous(), "slot ids must be contiguous"
    assert output_counts_RV.dtype == torch.int16, "output counts must be int16"
    assert prompt_mask_RV.dtype == torch.bool, "the prompt mask must be bool"
    for table in (output_counts_RV, prompt_mask_RV):
        assert table.shape[1] == vocabulary, "counts and mask must have a column a token"
        assert table.is_contiguous(), "counts and mask must be contiguous"
        assert table.device == slot_ids_B.device == logits_BV.device, "not all on one device"
    if batch == 0:
        return
    _apply_penalties_kernel[(batch * triton.cdiv(vocabulary, _BLOCK),)](
        logits_BV,
        slot_ids_B,
        output_counts_RV,
        prompt_mask_RV,
        logits_BV.stride(0),
        presence,
        frequency,
        repetition,
        V=vocabulary,
        USE_REPETITION=repetition != 1.0,
        BLOCK=_BLOCK,
        num_warps=4,
    )
