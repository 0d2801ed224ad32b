"""A cache of folders that are filled once, complete or not there, whoever asks and is killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from batchgen.errors import ModelError
from batchgen.models.content import content_hash

_MANIFEST: Final = "manifest.json"  # content hash by file name; written last


def cache_root() -> Path:
    """$BATCHGEN_CACHE, or batchgen/ in $XDG_CACHE_HOME, or ~/.cache/batchgen."""
    if chosen := os.environ.get("BATCHGEN_CACHE"):
        return Path(chosen).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "batchgen"


def cached_folder(key: str, fill: Callable[[Path], None]) -> Path:
    """The folder of this key, after `fill(folder)` if it is absent, incomplete or damaged.

    Processes that ask at once wait for one of them to fill it. The folder appears by a rename, so
    a killed process leaves nothing that looks complete; the next one clears what it left.
    Raises `ModelError` where the cache cannot be written.
    """
    root = cache_root()
    folder = root / key
    if _is_complete(folder):
        return folder
    unfinished = root / f"{key}.unfinished"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system when the process dies
            if not _is_complete(folder):
                for leftover in (unfinished, folder):
                    if leftover.exists():
                        shutil.rmtree(leftover)
                unfinished.mkdir()
                fill(unfinished)
                _write_manifest(unfinished)
                unfinished.replace(folder)
    except OSError as error:
        raise ModelError(
            f"cannot write the cache folder {root}: {error}; "
            "set BATCHGEN_CACHE to a folder with room"
        ) from error
    return folder


def _write_manifest(folder: Path) -> None:
    hashes = {path.name: content_hash(path) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there with its content."""
    try:
        hashes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(hashes) and all(
            content_hash(folder / name) == expected for name, expected in hashes.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return False
