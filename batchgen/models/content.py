"""A file's identity by its content, cheap for files of gigabytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_WHOLE_BYTES: Final = 16 << 20  # files up to this size are read whole
_EDGE_BYTES: Final = 1 << 20
_WINDOW_BYTES: Final = 64 << 10
_WINDOWS: Final = 64


def content_hash(path: Path) -> str:
    """A hash of the size and of the content: whole, or a sample of a large file.

    The sample is the first and the last MiB (the header of safetensors and GGUF is at the start)
    and 64 windows of 64 KiB evenly between, so it takes milliseconds and still differs between two
    fine-tunes of one model. Independent of the path and of times.
    """
    size_bytes = path.stat().st_size
    digest = hashlib.blake2b(str(size_bytes).encode(), digest_size=16)
    with path.open("rb") as file:
        if size_bytes <= _WHOLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        digest.update(file.read(_EDGE_BYTES))
        step = (size_bytes - 2 * _EDGE_BYTES) // _WINDOWS
        for window in range(_WINDOWS):
            file.seek(_EDGE_BYTES + window * step)
            digest.update(file.read(_WINDOW_BYTES))
        file.seek(size_bytes - _EDGE_BYTES)
        digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def combined_hash(paths: Iterable[Path]) -> str:
    """A hash of several files' names and contents, in the order of their names."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        digest.update(f"{path.name}\0{content_hash(path)}\0".encode())
    return digest.hexdigest()
