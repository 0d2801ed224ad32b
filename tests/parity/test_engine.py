"""The whole engine against transformers on tiny random models: the same greedy tokens.

Batches of ragged lengths, prompts with shared prefixes, chunked prefill, and a KV so small that
sequences are swapped to the host and back.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from batchgen.engine.bench import RequestList
from batchgen.engine.build import build_engine
from batchgen.engine.config import EngineOptions, SamplingOptions
from batchgen.engine.engine import Engine
from batchgen.job.sections import ModelSpec
from batchgen.models.registry import load_config, resolve_model
from batchgen.records import Completion, Prompt, RowKey, SampleOutput
from tests.parity.tiny_models import FAMILIES, VOCAB_SIZE, Family, save_tiny_model, tiny_model

NEW_TOKENS = 64


def engine_for(folder: Path, sampling: SamplingOptions | None = None, **options: object) -> Engine:
    defaults: dict[str, object] = {
        "dtype": "float32",
        "max_num_seqs": 16,
        "max_num_batched_tokens": 128,
        "block_size": 8,
        "num_gpu_blocks": 400,
        "cpu_swap_bytes": 1 << 26,
        "max_model_len": 256,
    }
    files = resolve_model(ModelSpec(name_or_path=str(folder)))
    return build_engine(
        load_config(files),
        files,
        EngineOptions(**(defaults | options)),  # type: ignore[arg-type]
        sampling or SamplingOptions(),
        decode=None,
    )


def prompts_for(
    count: int, *, max_tokens: int = NEW_TOKENS, ignore_eos: bool = True
) -> list[Prompt]:
    """Ragged lengths; half of the prompts begin with one of two shared prefixes."""
    rng = random.Random(7)
    prefixes = [[rng.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in (0, 0, 20, 45)]
    prompts = []
    for index in range(count):
        own = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice([1, 2, 7, 8, 9, 31, 60]))]
        prompts.append(
            Prompt(
                key=RowKey(unit_id=0, index=index),
                token_ids=prefixes[index % 4] + own,
                max_tokens=max_tokens,
                seeds=(index,),
                ignore_eos=ignore_eos,
            )
        )
    return prompts


def complete(engine: Engine, prompts: list[Prompt]) -> dict[int, SampleOutput]:
    """The only sample of each prompt, by the prompt's index."""
    return {index: c.outputs[0] for index, c in complete_all(engine, prompts).items()}


def complete_all(engine: Engine, prompts: list[Prompt]) -> dict[int, Completion]:
    batches = list(engine.run(RequestList(prompts)))
    engine._scheduler.check_integrity()
    completions = {c.key.index: c for batch in batches for c in batch}
    assert len(completions) == sum(len(batch) for batch in batches) == len(prompts)
    return completions


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Prompt) -> list[int]:
    """transformers' own greedy tokens."""
    ids = torch.tensor([list(prompt.token_ids)], device=model.device)
    out = model.generate(
        ids, max_new_tokens=prompt.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_for_64_steps(family: Family, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    model = tiny_model(family)
    prompts = prompts_for(24, ignore_eos=False)  # their lengths are unknown to the engine
    # Room for about a third of what the sixteen rows want.
    engine = engine_for(tmp_path, num_gpu_blocks=70)
    completions = complete(engine, prompts)
    stats = engine.stats()
    assert stats.swapped_out_blocks > 0
    assert stats.cached_prompt_tokens > 0
    for prompt in prompts:
        completion = completions[prompt.key.index]
        assert list(completion.token_ids) == greedy(model, prompt)
        assert completion.finish_reason == "length"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder)
    return folder


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_do_not_depend_on_how_the_engine_runs(llama: Path, temperature: float) -> None:
    sampling = SamplingOptions(temperature=temperature, eos_token_ids=(2,))
    prompts = prompts_for(40, max_tokens=48, ignore_eos=False)
    base = complete(engine_for(llama, sampling), prompts)
    variants: list[dict[str, object]] = [
        {"max_num_seqs": 1},
        {"num_gpu_blocks": 40, "max_model_len": 200},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 17},
        {"block_size": 32, "num_gpu_blocks": 100, "decode_window": 16},
        {"cpu_swap_bytes": 0, "num_gpu_blocks": 48},
    ]
    for variant in variants:
        other = complete(engine_for(llama, sampling, **variant), prompts)
        for index, completion in base.items():
            assert list(other[index].token_ids) == list(completion.token_ids), variant
    if temperature:
        distinct = {tuple(c.token_ids) for c in base.values()}
        assert len(distinct) > 30


def test_equal_prompts_have_equal_completions_and_are_computed_once(llama: Path) -> None:
    once = prompts_for(10, max_tokens=12, ignore_eos=False)
    again = [
        dataclasses.replace(prompt, key=RowKey(unit_id=1, index=10 + i), seeds=(100 + i,))
        for i, prompt in enumerate(once)
    ]
    engine = engine_for(llama, SamplingOptions(eos_token_ids=(2,)))
    both = complete(engine, [*once, *again])
    stats, given = engine.stats(), sum(len(prompt.token_ids) for prompt in once)
    assert stats.merged_prompts == 10
    assert stats.prompt_tokens == 2 * given
    assert stats.prompt_tokens - stats.cached_prompt_tokens <= given
    for index, prompt in enumerate(again):
        assert both[10 + index].token_ids == both[index].token_ids
        assert both[10 + index].seed == prompt.seeds[0]
    drawn = engine_for(llama, SamplingOptions(temperature=0.8))
    complete(drawn, [*once, *again])
    assert drawn.stats().merged_prompts == 0
