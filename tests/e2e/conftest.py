"""Fixtures of the end-to-end tests: a tiny model that any engine can load, finished outputs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trial_counts import Trials
    from verify_outputs import Output

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))  # tiny_models
pytest.register_assert_rewrite("trial_counts")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and its tokenizer."""
    from tiny_models import save_tiny_model

    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    """Counts the test's trials, of which there must be as many as are announced."""
    from trial_counts import LEAST_TRIALS, Trials

    counted = Trials()
    yield counted
    assert counted.num_compared >= LEAST_TRIALS[request.node.name]


@pytest.fixture(scope="session")
def make_output(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Callable[..., Output]:
    """Finished outputs of any kind, run once and copied for each test."""
    from verify_outputs import Output, run_stand_in, write_verify_job

    from batchgen.dataset.storage import Storage

    folder = tmp_path_factory.mktemp("verify")
    job = write_verify_job(folder, tiny_model)

    def make(target: Path, kind: tuple[str, str | None] = ("arrow", "zstd")) -> Output:
        output_format, codec = kind
        options = [f"output.format={output_format}", f"output.compression={codec or 'null'}"]
        finished = folder / f"{output_format}-{codec}"
        if not finished.exists():
            run_stand_in(job, *options, f"output.uri={finished}")
        shutil.copytree(finished, target / "out")
        uri = str(target / "out")
        overrides = [*options, f"output.uri={uri}"]
        return Output(job=job, overrides=overrides, storage=Storage.open(uri))

    return make


@pytest.fixture
def output(tmp_path: Path, make_output: Callable[[Path], Output]) -> Output:
    return make_output(tmp_path)
