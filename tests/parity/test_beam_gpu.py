"""Beam search on a GPU, graphs and kernels and all, against transformers on the same GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from batchgen.engine.beam_scheduler import BeamScheduler
from batchgen.engine.config import BeamOptions
from batchgen.records import Completion
from tests.parity.test_beam_engine import (
    CASES,
    END_TOKENS,
    beam_engine_for,
    beam_model,
    beam_prompts,
    hypotheses_of,
    transformers_on,
)
from tests.parity.test_engine import complete_all
from tests.parity.tiny_models import FAMILIES, Family
from tests.unit.engine.beam_device import admit_all

pytestmark = pytest.mark.gpu
SCORE_TOLERANCE = 1e-3  # fp32 sums of up to 20 tokens in two orders; scores are about -3 to -60


def assert_close(
    actual: dict[int, Completion], expected: dict[int, Any], *, min_same: float
) -> None:
    """The same sequences, but where rounding decides between candidates; then their scores are
    all but equal."""
    same = 0
    for index, hypotheses in expected.items():
        ours = hypotheses_of(actual[index])
        same += [h.token_ids for h in ours] == [h.token_ids for h in hypotheses]
        for mine, theirs in zip(ours, hypotheses, strict=True):
            assert mine.score == pytest.approx(theirs.score, rel=1e-4, abs=SCORE_TOLERANCE)
    assert same >= min_same * len(expected)


@pytest.mark.parametrize(("family", "beams"), [*zip(FAMILIES, CASES, strict=True)])
def test_fp32_sequences_and_scores_are_those_of_transformers(
    family: Family, beams: BeamOptions, tmp_path: Path
) -> None:
    model = beam_model(family, tmp_path).to("cuda")
    prompts = beam_prompts(24, n=beams.width)
    engine = beam_engine_for(
        tmp_path,
        beams,
        n=beams.width,
        device="cuda",
        max_num_seqs=8 * beams.width,
        max_model_len=126,
        num_gpu_blocks=20 + 5 * beams.width,
    )
    scheduler = engine._scheduler
    assert isinstance(scheduler, BeamScheduler)
    admit_all(scheduler)
    completions = complete_all(engine, prompts)
    assert engine.stats().copied_blocks > 0
    expected = {p.key.index: transformers_on(model, p, beams) for p in prompts}
    assert_close(completions, expected, min_same=0.95)


def test_outputs_do_not_depend_on_graphs_or_windows(tmp_path: Path) -> None:
    beam_model("llama", tmp_path)
    beams = BeamOptions(width=4, end_token_ids=END_TOKENS)
    prompts = beam_prompts(40, n=4)
    base = complete_all(beam_engine_for(tmp_path, beams, n=4, device="cuda"), prompts)
    expected = {index: hypotheses_of(completion) for index, completion in base.items()}
    variants: list[dict[str, object]] = [
        {"use_cuda_graphs": False, "decode_window": 1},
        {"num_gpu_blocks": 60, "max_model_len": 200},
        {"max_num_seqs": 12, "decode_window": 5, "enable_prefix_caching": False},
        {"max_num_seqs": 96, "min_prefix_saving_bytes": 1},
    ]
    for variant in variants:
        engine = beam_engine_for(tmp_path, beams, n=4, device="cuda", **variant)
        assert_close(complete_all(engine, prompts), expected, min_same=0.95)
        if "min_prefix_saving_bytes" in variant:
            assert engine.stats().prefix_blocks_saved > 0


@pytest.mark.parametrize("num_prefixes", [1, 5])
def test_prompts_that_beams_and_rows_share_are_read_once(tmp_path: Path, num_prefixes: int) -> None:
    model = beam_model("qwen3", tmp_path).to("cuda")
    beams = BeamOptions(width=4, end_token_ids=END_TOKENS)
    prompts = [
        dataclasses.replace(
            prompt,
            token_ids=[*[45 + index % num_prefixes, *range(20, 40)] * 4, *prompt.token_ids[-9:]],
        )
        for index, prompt in enumerate(beam_prompts(24, n=4))
    ]
    engine = beam_engine_for(
        tmp_path, beams, n=4, device="cuda", max_num_seqs=64, min_prefix_saving_bytes=1
    )
    completions = complete_all(engine, prompts)
    assert engine.stats().prefix_blocks_saved > 0
    expected = {p.key.index: transformers_on(model, p, beams) for p in prompts}
    assert_close(completions, expected, min_same=0.95)
