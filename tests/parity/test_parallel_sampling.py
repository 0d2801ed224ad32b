"""n samples of a prompt are n independent requests with the same seeds, computed together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from batchgen.engine.admission import Admission
from batchgen.engine.config import SamplingOptions
from batchgen.errors import UsageError
from batchgen.records import Prompt, RowKey, SampleOutput
from tests.parity.test_engine import complete, complete_all, engine_for, prompts_for
from tests.parity.tiny_models import save_tiny_model

NUM_SAMPLES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", path)
    return path


def with_samples(prompts: list[Prompt]) -> list[Prompt]:
    return [
        dataclasses.replace(
            prompt, seeds=tuple(prompt.seeds[0] + 1000 * i for i in range(NUM_SAMPLES))
        )
        for prompt in prompts
    ]


def one_by_one(
    folder: Path, sampling: SamplingOptions, prompts: list[Prompt]
) -> list[list[SampleOutput]]:
    """The outputs of a request of its own for each sample."""
    requests = [
        dataclasses.replace(
            prompt,
            key=RowKey(unit_id=0, index=len(prompt.seeds) * prompt.key.index + i),
            seeds=(seed,),
        )
        for prompt in prompts
        for i, seed in enumerate(prompt.seeds)
    ]
    made = complete(engine_for(folder, sampling), requests)
    return [[made[len(p.seeds) * p.key.index + i] for i in range(len(p.seeds))] for p in prompts]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingOptions(temperature=0.8, eos_token_ids=(2,), n=NUM_SAMPLES),
        SamplingOptions(temperature=1.0, top_p=0.9, repetition_penalty=1.3, n=NUM_SAMPLES),
    ],
    ids=["plain", "penalty"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_gpu_blocks": 40, "max_model_len": 200},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 17},
        {"max_num_seqs": NUM_SAMPLES, "decode_window": 16, "block_size": 32},
        {"cpu_swap_bytes": 0, "num_gpu_blocks": 48},
    ],
    ids=["roomy", "swapped", "chunked", "alone", "stalled"],
)
def test_samples_are_independent_requests(
    folder: Path,
    sampling: SamplingOptions,
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "num_gpu_blocks" in options:  # admitted whatever it comes to: there will be no room
        monkeypatch.setattr(Admission, "forecast_peaks", lambda *args: np.zeros(len(args[3])))
    prompts = with_samples(prompts_for(12, max_tokens=24, ignore_eos=False))
    engine = engine_for(folder, sampling, **options)
    completions = complete_all(engine, prompts)
    for prompt, expected in zip(prompts, one_by_one(folder, sampling, prompts), strict=True):
        completion = completions[prompt.key.index]
        assert list(completion.outputs) == expected
        assert completion.num_prompt_tokens == len(prompt.token_ids)
        assert len({tuple(output.token_ids) for output in completion.outputs}) > 1
    stats = engine.stats()
    assert stats.prompt_tokens == sum(len(prompt.token_ids) for prompt in prompts)
    assert stats.num_finished == len(prompts)
    assert stats.output_tokens == sum(c.num_output_tokens for c in completions.values())
    assert stats.copied_blocks > 0
    assert 0 < stats.kv_saved < 1
    if "num_gpu_blocks" in options and "cpu_swap_bytes" not in options:
        assert stats.swapped_out_blocks > 0


def test_more_samples_than_rows_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"sampling\.n is 5, but engine\.max_num_seqs=4"):
        engine_for(folder, SamplingOptions(temperature=1.0, n=5), max_num_seqs=4)


def test_samples_need_a_block_beside_the_longest_sequence(folder: Path) -> None:
    sampling = SamplingOptions(temperature=1.0, n=2)
    with pytest.raises(UsageError, match="the KV cache has room for 256 tokens"):
        engine_for(folder, sampling, num_gpu_blocks=32)
    engine_for(folder, sampling, num_gpu_blocks=33)
