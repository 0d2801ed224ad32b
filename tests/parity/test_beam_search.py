"""Beam search against transformers: sequences and scores, the tokens read through block tables."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from batchgen.engine.beam_search import BeamSearch, Hypothesis
from batchgen.engine.config import BeamOptions
from tests.parity.tiny_models import Family, tiny_model
from tests.unit.engine.labelled_blocks import CPU, History, LogitsOf, run_beams

VOCAB_SIZE = 96
END_TOKENS = [2, 5, 11, 17]
WIDTHS = (2, 4, 5, 16)


@functools.cache
def model_of(family: Family) -> Any:
    """With end tokens that are often among the best: their logits are 2.5 times as wide."""
    model = tiny_model(family, vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight[END_TOKENS] *= 2.5
    model.generation_config.eos_token_id = None  # what `generate` would fall back on
    return model


class TableModel(PreTrainedModel, GenerationMixin):
    """Logits from a table, by the length so far and the last token: any course can be set up."""

    config_class = PreTrainedConfig

    def __init__(self, logits_LVV: Tensor) -> None:
        super().__init__(PreTrainedConfig(vocab_size=VOCAB_SIZE))
        self.logits_LVV = torch.nn.Parameter(logits_LVV)

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits_LVV[input_ids.shape[1]][input_ids])

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> dict[str, Tensor]:
        return {"input_ids": input_ids}


def model_logits(model: Any) -> LogitsOf:
    """Recomputed from scratch, so that no cache of transformers takes part."""

    def logits_of(histories: Sequence[History]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(torch.tensor(histories), use_cache=False).logits[:, -1]
        return logits.clone()

    return logits_of


def transformers_beams(
    model: Any, prompt: History, max_outputs: int, *, num_returned: int, **options: Any
) -> list[Hypothesis]:
    config = GenerationConfig(
        max_new_tokens=max_outputs,
        num_return_sequences=num_returned,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        use_cache=not isinstance(model, TableModel),
        **options,
    )
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    return [
        Hypothesis(token_ids=ids[len(prompt) : len(prompt) + length].tolist(), score=float(score))
        for ids, length, score in zip(out.sequences, lengths, out.sequences_scores, strict=True)
    ]


def random_prompts(rng: np.random.Generator, count: int) -> list[History]:
    lengths = rng.choice(np.arange(1, 14), count, replace=False)
    return [tuple(rng.integers(6, VOCAB_SIZE, length).tolist()) for length in lengths]


def assert_same(actual: list[Hypothesis], expected: list[Hypothesis]) -> None:
    """Scores within 1e-5; but at length_penalty -1 they are hundreds, where neighbouring fp32
    numbers are 6e-5 apart: there within 1e-6 of the score."""
    assert [h.token_ids for h in actual] == [h.token_ids for h in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert math.isclose(ours.score, theirs.score, rel_tol=1e-6, abs_tol=1e-5)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sequences_and_scores_are_those_of_transformers(
    family: Family, width: int, length_penalty: float, early_stopping: bool | Literal["never"]
) -> None:
    model = model_of(family)
    rng = np.random.default_rng([width, int(length_penalty) + 2, str(early_stopping) == "never"])
    prompts = random_prompts(rng, 4)
    max_outputs = rng.integers(1, 21, 4).tolist()
    ends = END_TOKENS[: int(rng.integers(1, 5))]
    options = BeamOptions(
        width=width,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        end_token_ids=ends,
    )
    results, _ = run_beams(options, prompts, max_outputs, model_logits(model))
    for prompt, limit, actual in zip(prompts, max_outputs, results, strict=True):
        expected = transformers_beams(
            model,
            prompt,
            limit,
            num_returned=width,
            num_beams=width,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=ends,
        )
        assert len(actual) == width
        assert_same(actual, expected)


@pytest.mark.parametrize("limit", range(1, 21))
def test_every_output_length(limit: int) -> None:
    """With the options that end hypotheses early and late; and the best one alone."""
    prompt = random_prompts(np.random.default_rng(limit), 1)[0]
    options = BeamOptions(width=4, early_stopping="never", end_token_ids=END_TOKENS)
    [actual], _ = run_beams(options, [prompt], [limit], model_logits(model_of("llama")))
    same = {"num_beams": 4, "early_stopping": "never", "eos_token_id": END_TOKENS}
    for count in (4, 1):
        expected = transformers_beams(model_of("llama"), prompt, limit, num_returned=count, **same)
        assert_same(actual[:count], expected)


def test_without_end_tokens() -> None:
    prompt = random_prompts(np.random.default_rng(0), 1)[0]
    [actual], _ = run_beams(BeamOptions(width=5), [prompt], [9], model_logits(model_of("llama")))
    expected = transformers_beams(model_of("llama"), prompt, 9, num_returned=5, num_beams=5)
    assert_same(actual, expected)
    assert {len(h.token_ids) for h in actual} == {9}


def test_the_cases_above_have_early_and_late_ends() -> None:
    """Else the comparison would not see how hypotheses of different lengths compete."""
    rng = np.random.default_rng(1)
    prompts = random_prompts(rng, 12)
    ends = END_TOKENS[:2]
    kinds = set()
    for early_stopping in (True, False):
        options = BeamOptions(width=4, early_stopping=early_stopping, end_token_ids=ends)
        results, _ = run_beams(options, prompts, [20] * 12, model_logits(model_of("llama")))
        for hypotheses in results:
            lengths = {len(h.token_ids) for h in hypotheses}
            kinds.add((early_stopping, max(lengths) == 20, len(lengths) > 1))
    assert {(True, False, True), (False, False, True), (False, True, True)} <= kinds


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, -0.3, 0.0, 0.7, 1.0, 2.0])
def test_random_courses(length_penalty: float, early_stopping: bool | Literal["never"]) -> None:
    """How likely an end is changes from step to step, so that groups end in all ways."""
    for seed in range(10):
        rng = np.random.default_rng([seed, int(length_penalty * 10) + 10])
        width, limit = int(rng.integers(2, 9)), int(rng.integers(1, 21))
        logits_LVV = rng.normal(0, rng.uniform(1, 4), (24, VOCAB_SIZE, VOCAB_SIZE))
        ends = END_TOKENS[: int(rng.integers(1, 5))]
        logits_LVV[:, :, ends] += rng.normal(1, 4, (24, 1, 1))
        model = TableModel(torch.from_numpy(logits_LVV).float())
        same: dict[str, Any] = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        options = BeamOptions(width=width, end_token_ids=ends, **same)
        [actual], _ = run_beams(options, [(7, 8, 9)], [limit], model_logits(model))
        same |= {"num_beams": width, "eos_token_id": ends}
        assert_same(actual, transformers_beams(model, (7, 8, 9), limit, num_returned=width, **same))


def test_never_with_a_negative_penalty_looks_one_token_ahead_only() -> None:
    """The end is second best twice, then best: [t, t, end] beats what ended before it."""
    logits_LVV = torch.full((24, VOCAB_SIZE, VOCAB_SIZE), -12.0)
    logits_LVV[:3, :, 10], logits_LVV[3:, :, 10] = 2.0, 0.0
    logits_LVV[:3, :, 2], logits_LVV[3:, :, 2] = 0.5, 5.0
    model = TableModel(logits_LVV)
    same: dict[str, Any] = {"length_penalty": -1.0, "early_stopping": "never"}
    options = BeamOptions(width=2, end_token_ids=[2], **same)
    [actual], _ = run_beams(options, [(7,)], [20], model_logits(model))
    same |= {"num_beams": 2, "eos_token_id": [2]}
    assert_same(actual, transformers_beams(model, (7,), 20, num_returned=2, **same))
    assert [h.token_ids for h in actual] == [[10, 10, 2], [2]]


def test_a_nan_ends_its_group_alone() -> None:
    """Also when the group has hypotheses already: they are not the best ones of its prompt."""
    prompts = [(7, 8, 9), (10, 11)]
    clean = model_logits(model_of("llama"))
    options = BeamOptions(width=4, early_stopping="never", end_token_ids=END_TOKENS)

    def logits_of(histories: Sequence[History]) -> Tensor:
        logits = clean(histories)
        if histories[0][0] == 7 and len(histories[0]) == 3 + 8:
            logits[2, 40] = torch.nan
        return logits

    expected, _ = run_beams(options, prompts, [12, 12], clean)
    assert min(len(h.token_ids) for h in expected[0]) < 8
    actual, _ = run_beams(options, prompts, [12, 12], logits_of)
    assert actual == [[], expected[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_over_a_large_vocabulary(dtype: torch.dtype) -> None:
    """Several chunks, the last one short; rounded logits tie, so scores alone are compared."""
    logits_GV = (torch.randn(3, 20_001, generator=torch.manual_seed(0)) * 4).to(dtype)
    search = BeamSearch(BeamOptions(width=4), num_groups=3, max_output_tokens=1, device=CPU)
    search.enter(*(np.array(x, dtype=np.int32) for x in ([0, 1, 2], [5, 6, 7], [6, 7, 8])))
    search.step(torch.arange(3), logits_GV)
    expected = logits_GV.double().log_softmax(1).topk(4).values
    actual = torch.tensor([[h.score for h in found] for found in search.best(range(3))])
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)
