"""apply_penalties against its reference; the reference against transformers and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import ROUNDINGS, random_tensor
from batchgen.kernels.penalties import apply_penalties

DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY = 5000
SLOTS = [6, 0, -1, 3]


def tables(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Slot ids (one is padding), output counts and prompt masks of a few seen tokens."""
    random = cases.generator("cpu", 3)
    counts_RV = torch.zeros(8, VOCABULARY, dtype=torch.int16)
    seen = torch.randint(0, VOCABULARY, (8, 300), generator=random)
    counts_RV.scatter_(1, seen, torch.randint(1, 900, (8, 300), generator=random).short())
    mask_RV = torch.rand(8, VOCABULARY, generator=random) < 0.05
    return torch.tensor(SLOTS).to(device), counts_RV.to(device), mask_RV.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "penalties",
    [
        {"presence": 0.5, "frequency": 0.0, "repetition": 1.0},
        {"presence": 0.0, "frequency": -0.01, "repetition": 1.0},
        {"presence": 0.0, "frequency": 0.0, "repetition": 1.3},
        {"presence": -1.5, "frequency": 0.02, "repetition": 0.8},
    ],
    ids=str,
)
def test_apply_penalties(penalties: dict[str, float], dtype: torch.dtype, device: str) -> None:
    memory = random_tensor(4, VOCABULARY + 40, dtype=dtype, device=device, scale=4.0)
    expected = memory.clone()
    arguments = tables(device)
    reference.apply_penalties(expected[:, 8 : 8 + VOCABULARY], *arguments, **penalties)
    apply_penalties(memory[:, 8 : 8 + VOCABULARY], *arguments, **penalties)
    bounds = ROUNDINGS[dtype]
    torch.testing.assert_close(memory, expected, rtol=bounds.rtol, atol=bounds.atol)


def test_reference_repeats_as_transformers_does(device: str) -> None:
    logits_BV = random_tensor(3, 100, dtype=torch.float32, device=device, scale=4.0)
    prompt = torch.randint(0, 100, (3, 12), generator=cases.generator("cpu")).to(device)
    output = torch.randint(0, 100, (3, 9), generator=cases.generator("cpu", 1)).to(device)
    processor = RepetitionPenaltyLogitsProcessor(1.4)
    expected = processor(torch.cat((prompt, output), dim=1), logits_BV.clone())
    counts_RV = torch.zeros(3, 100, dtype=torch.int16, device=device)
    counts_RV.scatter_add_(1, output, torch.ones_like(output, dtype=torch.int16))
    mask_RV = torch.zeros(3, 100, dtype=torch.bool, device=device).scatter_(1, prompt, True)
    slot_ids_B = torch.arange(3, device=device)
    reference.apply_penalties(
        logits_BV, slot_ids_B, counts_RV, mask_RV, presence=0.0, frequency=0.0, repetition=1.4
    )
    torch.testing.assert_close(logits_BV, expected)


def test_presence_and_frequency_by_hand(device: str) -> None:
    """mu_j - c_j * frequency - [c_j > 0] * presence (OpenAI); the prompt does not count."""
    logits_BV = torch.tensor([[2.0, -1.0, 0.5, 3.0]], device=device)
    counts_RV = torch.tensor([[0, 1, 3, 0]], dtype=torch.int16, device=device)
    mask_RV = torch.tensor([[True, False, True, False]], device=device)
    slot_ids_B = torch.zeros(1, dtype=torch.int32, device=device)
    apply_penalties(
        logits_BV, slot_ids_B, counts_RV, mask_RV, presence=0.5, frequency=0.25, repetition=1.0
    )
    assert logits_BV.tolist() == [[2.0, -1.75, -0.75, 3.0]]
