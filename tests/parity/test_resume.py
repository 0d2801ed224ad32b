"""Rows that a stop cut off go on where they were: the tokens of a run that was not stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from batchgen.engine.completer import SampleCompleter
from batchgen.engine.config import SamplingOptions
from batchgen.engine.engine import Engine
from batchgen.engine.stopping import StopStrings
from batchgen.records import Completion, Prompt, RowKey, SampleProgress, UnfinishedRow
from tests.parity.test_engine import complete_all, engine_for, prompts_for
from tests.parity.tiny_models import save_tiny_model

EOS = (2, 17, 29, 50, 171)  # five ends, so that some rows are short


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", path)
    return path


class StoppingSource:
    """Gives all prompts at once, and stops the engine when it has asked so many times."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], num_calls: int) -> None:
        self._engine = engine
        self._prompts = list(prompts)
        self._calls_left = num_calls

    def take(self, max_prompts: int, *, wait: bool) -> list[Prompt]:
        self._calls_left -= 1
        if self._calls_left == 0:
            self._engine.stop()
        taken, self._prompts = self._prompts[:max_prompts], self._prompts[max_prompts:]
        return taken


def run_in_lives(
    engines: Sequence[Engine], prompts: Sequence[Prompt], num_calls: int
) -> tuple[dict[int, Completion], list[list[UnfinishedRow]]]:
    """Completes the prompts by one engine after another; all but the last are stopped."""
    completed: dict[int, Completion] = {}
    left = list(prompts)
    saved: list[list[UnfinishedRow]] = []
    for engine in engines[:-1]:
        for batch in engine.run(StoppingSource(engine, left, num_calls)):
            completed |= {completion.key.index: completion for completion in batch}
        saved.append(engine.unfinished())
        progress = {row.key: row.samples for row in saved[-1]}
        assert progress.keys().isdisjoint(c.key for c in completed.values())
        left = [
            dataclasses.replace(prompt, resumed=progress.get(prompt.key, ()))
            for prompt in left
            if prompt.key.index not in completed
        ]
    return completed | complete_all(engines[-1], left), saved


def stopping_engine(folder: Path, stop: tuple[str, ...]) -> Engine:
    engine = engine_for(folder)
    assert isinstance(engine._completer, SampleCompleter)
    engine._completer._stop_strings = StopStrings(stop, decode)
    return engine


def decode(token_ids: Sequence[Sequence[int]]) -> list[str]:
    """A text of a letter for each token: stop strings then span tokens."""
    return ["".join(chr(0x100 + token) for token in ids) for ids in token_ids]


SAMPLINGS = {
    "greedy": SamplingOptions(eos_token_ids=EOS),
    "sampled": SamplingOptions(temperature=0.8, top_p=0.95, top_k=50, eos_token_ids=EOS),
    "penalties": SamplingOptions(
        temperature=0.7,
        eos_token_ids=EOS,
        presence_penalty=0.4,
        frequency_penalty=0.6,
        repetition_penalty=1.3,
    ),
    "greedy penalties": SamplingOptions(frequency_penalty=1.5, presence_penalty=1.0),
    "min_tokens": SamplingOptions(temperature=0.9, eos_token_ids=EOS, min_tokens=20),
}
ENGINES: dict[str, dict[str, object]] = {
    "roomy": {},
    "swapped": {"num_gpu_blocks": 30, "max_model_len": 160},
    "no prefix cache, small chunks": {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 17,
    },
}


@pytest.mark.parametrize(
    ("sampled_by", "run_by"),
    [
        ("greedy", "roomy"),
        ("greedy", "no prefix cache, small chunks"),
        ("sampled", "swapped"),
        ("penalties", "no prefix cache, small chunks"),
        ("greedy penalties", "swapped"),
        ("min_tokens", "roomy"),
    ],
)
def test_a_row_goes_on_where_it_was(folder: Path, sampled_by: str, run_by: str) -> None:
    sampling, options = SAMPLINGS[sampled_by], ENGINES[run_by]
    prompts = prompts_for(20, max_tokens=36, ignore_eos=False)
    whole = complete_all(engine_for(folder, sampling), prompts)
    engines = [engine_for(folder, sampling, **options) for _ in range(3)]
    completions, saved = run_in_lives(engines, prompts, num_calls=8)
    assert completions == whole
    first, second = ({row.key: row.num_output_tokens for row in rows} for rows in saved)
    assert any(first.values())
    # What the second life begins with, it has and builds on.
    assert any(second.get(key, 0) > count for key, count in first.items())
    assert engines[1].stats().resumed_tokens > 0
    assert engines[2].stats().resumed_tokens > 0
    generated = sum(engine.stats().output_tokens for engine in engines)
    assert generated == sum(c.num_output_tokens for c in whole.values()), "nothing twice"
    if run_by == "swapped":
        assert engines[0].stats().swapped_out_blocks > 0


@pytest.mark.parametrize(
    ("num_calls", "run_by"),
    [(5, "roomy"), (9, "no prefix cache, small chunks"), (8, "swapped")],
)
def test_samples_of_which_some_have_ended(folder: Path, num_calls: int, run_by: str) -> None:
    options = ENGINES[run_by]
    sampling = SamplingOptions(
        temperature=0.9, eos_token_ids=EOS, frequency_penalty=0.3, n=4, min_tokens=2
    )
    prompts = [
        dataclasses.replace(prompt, seeds=tuple(100 * prompt.key.index + i for i in range(4)))
        for prompt in prompts_for(7, max_tokens=48, ignore_eos=False)
    ]
    whole = complete_all(engine_for(folder, sampling), prompts)
    engines = [engine_for(folder, sampling, **options) for _ in range(3)]
    completions, saved = run_in_lives(engines, prompts, num_calls)
    assert completions == whole
    if run_by == "roomy":
        reasons = [{s.finish_reason for s in row.samples} for rows in saved for row in rows]
        assert any({None, "stop"} <= each for each in reasons), "no row with ended samples"


def test_a_stop_string_spans_the_border(folder: Path) -> None:
    prompts = prompts_for(8, max_tokens=40)
    free = complete_all(engine_for(folder), prompts)
    engine = engine_for(folder)
    _, saved = run_in_lives([engine, engine_for(folder)], prompts, num_calls=6)
    # Two tokens before each border and two after it.
    borders = {row.key.index: len(row.samples[0].token_ids) for row in saved[0]}
    index, border = max(borders.items(), key=lambda pair: pair[1])
    across = free[index].outputs[0].token_ids[border - 2 : border + 2]
    assert len(across) == 4
    stop = (decode([across])[0],)
    engines = [stopping_engine(folder, stop) for _ in range(2)]
    completions, again = run_in_lives(engines, prompts, num_calls=6)
    assert {row.key.index: len(row.samples[0].token_ids) for row in again[0]} == borders
    output = completions[index].outputs[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == free[index].outputs[0].token_ids[: border + 2]
    whole = stopping_engine(folder, stop)
    assert completions == complete_all(whole, prompts)


def test_equal_prompts_are_saved_and_resumed_together(folder: Path) -> None:
    once = prompts_for(6, max_tokens=40)
    prompts = once + [
        dataclasses.replace(prompt, key=RowKey(unit_id=0, index=prompt.key.index + 6), seeds=(99,))
        for prompt in once
    ]
    whole = complete_all(engine_for(folder), prompts)
    engines = [engine_for(folder) for _ in range(2)]
    completions, saved = run_in_lives(engines, prompts, num_calls=5)
    assert completions == whole
    assert len(saved[0]) == 12
    assert engines[1].stats().merged_prompts == 6


def test_a_row_with_one_token_left(folder: Path) -> None:
    prompts = prompts_for(4, max_tokens=30)
    whole = complete_all(engine_for(folder), prompts)
    left = [
        dataclasses.replace(
            prompt,
            resumed=(
                SampleProgress(
                    token_ids=tuple(whole[prompt.key.index].outputs[0].token_ids[:29]),
                    finish_reason=None,
                ),
            ),
        )
        for prompt in prompts
    ]
    engine = engine_for(folder)
    assert complete_all(engine, left) == whole
    assert engine.stats().output_tokens == 4
    assert engine.stats().decode_steps == 0


def test_nothing_is_saved_of_a_run_that_ends(folder: Path) -> None:
    engine = engine_for(folder)
    complete_all(engine, prompts_for(4, max_tokens=8))
    assert engine.unfinished() == []
