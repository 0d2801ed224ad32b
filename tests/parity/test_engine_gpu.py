"""The engine on a GPU, graphs and kernels and all, against transformers on the same GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from batchgen.engine import prefill_groups
from batchgen.engine.config import SamplingOptions
from batchgen.records import Prompt
from tests.parity.test_engine import complete, engine_for, greedy, prompts_for
from tests.parity.tiny_models import FAMILIES, Family, save_tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_greedy_tokens_equal_transformers(family: Family, tmp_path: Path) -> None:
    model = save_tiny_model(family, tmp_path).to("cuda")
    prompts = prompts_for(24, ignore_eos=False)
    engine = engine_for(tmp_path, device="cuda", num_gpu_blocks=70)
    completions = complete(engine, prompts)
    assert engine.stats().swapped_out_blocks > 0
    assert engine.stats().cached_prompt_tokens > 0
    for prompt in prompts:
        assert list(completions[prompt.key.index].token_ids) == greedy(model, prompt)


@torch.inference_mode()
def logit_gaps(model: PreTrainedModel, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    """By how much transformers' logits prefer another token, at each of `tokens`."""
    ids = torch.tensor([[*prompt.token_ids, *tokens]], device=model.device)
    logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1].float()
    chosen = torch.tensor(tokens, device=model.device)
    return logits.max(dim=-1).values - logits.gather(1, chosen[:, None])[:, 0]


@pytest.mark.parametrize("min_prefix_saving_bytes", [None, 1])
def test_bf16_greedy_tokens_agree_with_transformers_to_near_ties(
    tmp_path: Path, min_prefix_saving_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token chosen is the best of transformers' logits, or within bf16's rounding of it."""
    monkeypatch.setattr(prefill_groups, "MERGE_COST_TOKENS", 0)
    model = save_tiny_model(
        "qwen3",
        tmp_path,
        dtype=torch.bfloat16,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=32000,
        initializer_range=0.05,
    ).to("cuda")
    prompts = prompts_for(24, ignore_eos=True)
    engine = engine_for(
        tmp_path,
        device="cuda",
        dtype="bfloat16",
        num_gpu_blocks=600,
        min_prefix_saving_bytes=min_prefix_saving_bytes,
    )
    completions = complete(engine, prompts)
    assert (engine.stats().prefill_blocks_saved > 0) == (min_prefix_saving_bytes is not None)
    gaps = torch.cat(
        [logit_gaps(model, p, list(completions[p.key.index].token_ids)) for p in prompts]
    )
    assert gaps.max() < 0.25, "a token that is no near-tie of the best"
    assert (gaps == 0).float().mean() > 0.95


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_do_not_depend_on_graphs_or_windows(tmp_path: Path, temperature: float) -> None:
    save_tiny_model("llama", tmp_path)
    sampling = SamplingOptions(temperature=temperature, eos_token_ids=(2,), top_p=0.95, top_k=50)
    prompts = prompts_for(40, max_tokens=48, ignore_eos=False)
    base = complete(engine_for(tmp_path, sampling, device="cuda"), prompts)
    variants: list[dict[str, object]] = [
        {"use_cuda_graphs": False, "decode_window": 1},
        {"num_gpu_blocks": 40, "max_model_len": 200},
        {"max_num_seqs": 3, "decode_window": 5, "enable_prefix_caching": False},
    ]
    for variant in variants:
        other = complete(engine_for(tmp_path, sampling, device="cuda", **variant), prompts)
        for index, completion in base.items():
            assert list(other[index].token_ids) == list(completion.token_ids), variant


def test_the_cpu_and_the_gpu_sample_the_same_tokens(tmp_path: Path) -> None:
    """The same seeds, the same noise: in fp32 the devices differ by rounding only."""
    save_tiny_model("llama", tmp_path)
    sampling = SamplingOptions(
        temperature=0.7, top_p=0.9, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3
    )
    prompts = prompts_for(16, max_tokens=24)
    on_cpu = complete(engine_for(tmp_path, sampling, device="cpu"), prompts)
    on_gpu = complete(engine_for(tmp_path, sampling, device="cuda"), prompts)
    same = sum(list(on_gpu[i].token_ids) == list(c.token_ids) for i, c in on_cpu.items())
    assert same >= 15


@pytest.mark.parametrize("num_groups", [1, 5])
def test_shared_prefixes_are_read_once_and_change_no_token(
    tmp_path: Path, num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_groups, "MERGE_COST_TOKENS", 0)
    model = save_tiny_model("qwen3", tmp_path).to("cuda")
    prompts = [
        dataclasses.replace(
            prompt,
            token_ids=[*[45 + index % num_groups, *range(20, 40)] * 8, *prompt.token_ids[-9:]],
        )
        for index, prompt in enumerate(prompts_for(40, max_tokens=32))
    ]
    engine = engine_for(tmp_path, device="cuda", max_num_seqs=24, min_prefix_saving_bytes=1)
    completions = complete(engine, prompts)
    assert engine.stats().prefix_blocks_saved > 0
    assert engine.stats().prefill_blocks_saved > 0
    for prompt in prompts:
        assert list(completions[prompt.key.index].token_ids) == greedy(model, prompt)
