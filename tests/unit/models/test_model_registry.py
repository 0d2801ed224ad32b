"""Finding a model by every form of its name, and its identity for the fingerprint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batchgen.errors import ModelError, UnsupportedError
from batchgen.job.sections import ModelSpec
from batchgen.models.content import content_hash
from batchgen.models.registry import (
    ModelFiles,
    load_config,
    load_tokenizer,
    read_config,
    resolve_model,
)
from tests.parity.tiny_models import CHATML, END_TOKEN_ID, save_tiny_model


def resolve(name: str | Path, revision: str | None = None) -> ModelFiles:
    return resolve_model(ModelSpec(name_or_path=str(name), revision=revision))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model("llama", tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_gives_config_and_tokenizer(folder: Path) -> None:
    files = resolve(folder)
    assert files.folder == folder
    assert load_config(files).family == "llama"
    assert load_config(files).eos_token_ids == (END_TOKEN_ID,)
    tokenizer = load_tokenizer(files)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.decode(tokenizer("a restaurant")["input_ids"]) == "a restaurant"


def test_identity_is_the_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    identity = resolve(folder).identity
    assert set(identity) == {"config", "tokenizer", "weights"}
    shutil.copytree(folder, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").iterdir():
        os.utime(path, (1, 1))
    assert resolve(tmp_path / "elsewhere").identity == identity


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("config.json", "config"),
        ("generation_config.json", "config"),
        ("chat_template.jinja", "tokenizer"),
        ("model.safetensors", "weights"),
    ],
)
def test_identity_tells_what_changed(folder: Path, file: str, changed: str) -> None:
    before = resolve(folder).identity
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-2] + b" " + content[-1:])
    after = resolve(folder).identity
    assert [key for key in before if before[key] != after[key]] == [changed]


def test_a_sampled_hash_sees_size_edges_and_windows(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(20 << 20))
    hashes = {content_hash(path)}
    for offset in (0, (20 << 20) - 1, (1 << 20) + 5):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\1")
        hashes.add(content_hash(path))
    with path.open("ab") as file:
        file.write(b"\0")
    hashes.add(content_hash(path))
    assert len(hashes) == 5


def test_a_package_resource_is_found_without_importing_the_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "a_model_package"
    shutil.copytree(folder, package / "data" / "tiny")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    files = resolve("pkg://a_model_package/data/tiny")
    assert files.folder == package / "data" / "tiny"
    assert "a_model_package" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pkg://no_such_package/x.gguf", "no_such_package is not installed; pip install"),
        ("pkg://json/x.gguf", "holds no x.gguf"),
        ("pkg://json", "expected pkg://package/resource"),
        ("pkg://json/../os.py", "expected pkg://package/resource"),
        ("./no/such/folder", "there is no such file or folder"),
        ("no-such-file.gguf", "there is no such file or folder"),
        (__file__, "a model is a folder with safetensors or a .gguf file"),
    ],
)
def test_names_that_lead_nowhere_say_so(name: str, message: str) -> None:
    with pytest.raises(ModelError) as error:
        resolve(name)
    assert name in str(error.value)
    assert message in str(error.value)


def test_a_hub_model_is_taken_from_the_local_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline_hub(tmp_path, monkeypatch)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    files = resolve("someone/tiny")
    assert files.folder == repository / "snapshots" / commit
    assert files.identity["revision"] == commit
    assert resolve("someone/tiny", revision=commit) == files


def test_a_hub_model_that_cannot_be_had_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline_hub(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match=r"someone/other at revision v2 is no local folder and "):
        resolve("someone/other", revision="v2")


def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, tokenizer=False)
    with pytest.raises(ModelError, match=r"no tokenizer: .* holds no tokenizer\.json") as error:
        load_tokenizer(resolve(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(resolve(folder))


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.Q4_0.gguf").write_bytes(b"")


def _with_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without_weight_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def _with_weights_of(name: object) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        index = {"weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return forge


def _with_deep_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("break_folder", "message"),
    [
        (_with_weights_of("../other/model.safetensors"), "no safetensors file of this folder"),
        (_with_weights_of("/etc/model.safetensors"), "no safetensors file of this folder"),
        (_with_weights_of("pytorch_model.bin"), "no safetensors file of this folder"),
        (_with_weights_of(["x"]), "no safetensors file of this folder"),
        (_with_deep_index, "cannot be read as JSON"),
        (_without_config, r"holds no config\.json; name the GGUF file itself: .*Q4_0\.gguf"),
        (
            _with_pickle,
            r"model\.safetensors are missing; pytorch_model\.bin is a pickle, which is never read",
        ),
        (_without_weight_map, "holds no weight_map"),
    ],
)
def test_a_folder_that_is_no_model_says_why(
    folder: Path, break_folder: Callable[[Path], None], message: str
) -> None:
    break_folder(folder)
    with pytest.raises(ModelError, match=message):
        resolve(folder)


def test_an_architecture_that_is_not_supported_is_named(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel is not supported"):
        load_config(resolve(folder))


def test_a_lone_config_is_read_for_benchmarks(folder: Path) -> None:
    assert read_config(folder / "config.json") == load_config(resolve(folder))
    with pytest.raises(ModelError, match="no such model config"):
        read_config(folder / "missing.json")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        read_config(folder / "config.json")


def test_a_revision_of_what_is_not_on_the_hub_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.revision is main"):
        resolve_model(ModelSpec(name_or_path=str(folder), revision="main"))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_a_pickle_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=r"is a pickle, which is never read.*safetensors"):
        resolve(path)


def test_a_tokenizer_that_brings_code_runs_none(folder: Path) -> None:
    marker = folder / "it-ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text()) if config.exists() else {}
    auto = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config.write_text(json.dumps({**values, "tokenizer_class": "Evil", "auto_map": auto}))
    with contextlib.suppress(ModelError):
        load_tokenizer(resolve(folder))
    assert not marker.exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc123", "g" * 40])
def test_code_of_a_model_needs_a_commit(revision: str | None) -> None:
    with pytest.raises(ValueError, match="trust_remote_code needs a revision that is a commit"):
        ModelSpec(name_or_path="o/n", revision=revision, trust_remote_code=True)
    assert ModelSpec(name_or_path="o/n", revision="0a" * 20, trust_remote_code=True)
