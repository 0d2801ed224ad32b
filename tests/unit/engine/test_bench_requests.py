"""The requests of `bench`, and the floor of their time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchgen.engine.bench import read_requests, run_bench
from batchgen.engine.config import BeamOptions, EngineOptions, SamplingOptions
from batchgen.engine.roofline import Ceilings, floor_seconds
from batchgen.errors import UsageError
from batchgen.models.config import parse_config
from tests.benchmarks.workloads import LLAMA_8B

REQUEST = {"prompt_token_ids": [1, 2, 3], "max_tokens": 4}


def write(path: Path, *requests: object) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def test_a_request_says_how_many_samples(tmp_path: Path) -> None:
    one, four = read_requests(write(tmp_path / "r.jsonl", REQUEST, REQUEST | {"n": 4}))
    assert len(one.seeds) == 1
    assert len(set(four.seeds)) == 4
    assert one.seeds[0] not in four.seeds


@pytest.mark.parametrize("n", [0, "2", None])
def test_a_number_of_samples_that_is_none(tmp_path: Path, n: object) -> None:
    with pytest.raises(UsageError, match=r"r\.jsonl:1: n must be at least 1"):
        read_requests(write(tmp_path / "r.jsonl", REQUEST | {"n": n}))


def test_the_floor_counts_the_prompt_of_samples_once() -> None:
    model = parse_config(LLAMA_8B, source="test")
    ceilings = Ceilings(bytes_per_s=1e12, flops_per_s=1e14)
    prompt, lengths = list(range(1000)), [10, 20, 30]
    together = floor_seconds(model, [(prompt, lengths)], ceilings)
    # The prefix that all prompts share is counted once as well, but for its own attention.
    apart = floor_seconds(model, [(prompt, [length]) for length in lengths], ceilings)
    attention_s = 4 * 32 * 32 * 128 * 1000**2 / 2 / ceilings.flops_per_s
    assert together.compute_s == pytest.approx(apart.compute_s + attention_s, rel=1e-9)
    assert together.memory_s == pytest.approx(apart.memory_s, rel=1e-9)


TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}


def test_beams_of_requests(tmp_path: Path) -> None:
    """They run to max_tokens, if the requests ignore the end token; and all must or none."""
    model = parse_config(LLAMA_8B | TINY, source="test")
    options = EngineOptions(device="cpu", load_format="dummy", dtype="float32")
    sampling = SamplingOptions(beams=BeamOptions(width=4, end_token_ids=list(range(9))))
    exact = [REQUEST | {"ignore_eos": True, "max_tokens": length} for length in (4, 9)]
    result = run_bench(write(tmp_path / "r.jsonl", *exact), model, None, options, sampling)
    assert result["output_tokens"] == 4 + 9
    assert result["decode_steps"] == 8
    with pytest.raises(UsageError, match="ignore_eos must be the same in all requests"):
        run_bench(write(tmp_path / "r.jsonl", *exact, REQUEST), model, None, options, sampling)
