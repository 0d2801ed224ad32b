"""What ends a row and what shapes its tokens, against transformers where it has the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from batchgen.engine.build import build_engine
from batchgen.engine.config import EngineOptions, SamplingOptions
from batchgen.engine.engine import Engine
from batchgen.errors import BatchgenError
from batchgen.job.spec import ModelSpec
from batchgen.models.registry import load_config, load_tokenizer, resolve_model
from batchgen.records import Prompt
from tests.parity.test_engine import complete, prompts_for
from tests.parity.tiny_models import save_tiny_model, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model("llama", path)
    return path


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def engine(folder: Path, sampling: SamplingOptions) -> Engine:
    files = resolve_model(ModelSpec(name_or_path=str(folder)))
    tokenizer = load_tokenizer(files)
    options = EngineOptions(device="cpu", dtype="float32", max_num_seqs=8, max_model_len=256)
    return build_engine(
        load_config(files), files, options, sampling, lambda ids: tokenizer.batch_decode(ids)
    )


def generate(model: PreTrainedModel, prompt: Prompt, **options: object) -> list[int]:
    ids = torch.tensor([list(prompt.token_ids)])
    with torch.inference_mode():
        out = model.generate(
            ids, do_sample=False, max_new_tokens=prompt.max_tokens, pad_token_id=0, **options
        )
    return out[0, ids.shape[1] :].tolist()


def frequent_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that greedy rows do produce, so that ending at them is seen."""
    rows = [generate(model, p, eos_token_id=None) for p in prompts_for(8, max_tokens=24)]
    return tuple({row[7] for row in rows} | {row[13] for row in rows})


def test_repetition_penalty_is_that_of_transformers(folder: Path, model: PreTrainedModel) -> None:
    prompts = prompts_for(8, max_tokens=24)
    made = complete(engine(folder, SamplingOptions(repetition_penalty=1.4)), prompts)
    for prompt in prompts:
        expected = generate(model, prompt, eos_token_id=None, repetition_penalty=1.4)
        assert list(made[prompt.key.index].token_ids) == expected


@pytest.mark.parametrize("min_tokens", [0, 11])
def test_eos_and_min_tokens_are_those_of_transformers(
    folder: Path, model: PreTrainedModel, min_tokens: int
) -> None:
    eos = frequent_tokens(model)
    prompts = prompts_for(8, max_tokens=24, ignore_eos=False)
    sampling = SamplingOptions(eos_token_ids=eos, min_tokens=min_tokens)
    made = complete(engine(folder, sampling), prompts)
    reasons = set()
    for prompt in prompts:
        expected = generate(model, prompt, eos_token_id=list(eos), min_new_tokens=min_tokens)
        completion = made[prompt.key.index]
        assert list(completion.token_ids) == expected
        assert completion.finish_reason == ("stop" if expected[-1] in eos else "length")
        reasons.add(completion.finish_reason)
    assert "stop" in reasons


def test_stop_tokens_end_rows_that_ignore_eos(folder: Path, model: PreTrainedModel) -> None:
    stop = frequent_tokens(model)
    prompts = prompts_for(8, max_tokens=24, ignore_eos=True)
    made = complete(
        engine(folder, SamplingOptions(stop_token_ids=stop, eos_token_ids=(5,))), prompts
    )
    for prompt in prompts:
        assert list(made[prompt.key.index].token_ids) == generate(
            model, prompt, eos_token_id=list(stop)
        )


@pytest.mark.parametrize("window", [1, 5])
def test_stop_strings_end_rows_across_token_borders(folder: Path, window: int) -> None:
    files = resolve_model(ModelSpec(name_or_path=str(folder)))
    tokenizer = load_tokenizer(files)
    prompts = prompts_for(12, max_tokens=32)
    free = complete(engine(folder, SamplingOptions()), prompts)
    # The end of one token and the start of the next, of a row's own text.
    pieces = {}
    for index, completion in free.items():
        texts = [tokenizer.decode([token]) for token in completion.token_ids]
        pair = texts[9][-1:] + texts[10][:1]
        if "\ufffd" not in pair and len(pair) == 2:
            pieces[index] = pair
    stops = tuple(pieces.values())
    assert stops
    options = EngineOptions(
        device="cpu", dtype="float32", max_num_seqs=8, max_model_len=256, decode_window=window
    )
    stopping = build_engine(
        load_config(files),
        files,
        options,
        SamplingOptions(stop=stops),
        lambda ids: tokenizer.batch_decode(ids),
    )
    made = complete(stopping, prompts)
    ended = 0
    for index, completion in free.items():
        tokens = list(completion.token_ids)
        ends = [n for n in range(1, 33) if any(s in tokenizer.decode(tokens[:n]) for s in stops)]
        kept = tokens[: ends[0]] if ends else tokens
        assert list(made[index].token_ids) == kept
        assert made[index].finish_reason == ("stop" if ends else "length")
        ended += bool(ends)
    assert ended >= len(pieces)


def test_presence_and_frequency_penalties_keep_tokens_from_returning(folder: Path) -> None:
    prompts = prompts_for(6, max_tokens=40)
    for sampling in (
        SamplingOptions(presence_penalty=1000.0),
        SamplingOptions(frequency_penalty=1000.0),
    ):
        for completion in complete(engine(folder, sampling), prompts).values():
            assert len(set(completion.token_ids)) == len(completion.token_ids)


def test_nan_logits_stop_the_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BatchgenError, match="NaN"):
        complete(engine(tmp_path, SamplingOptions()), prompts_for(2))
