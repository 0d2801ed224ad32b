"""Which files `input.uri` names, and how one of them is opened."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from functools import partial
from glob import has_magic
from typing import Any, BinaryIO, cast

from batchgen.dataset.formats import format_of_name
from batchgen.dataset.object_reader import ObjectReader
from batchgen.dataset.storage import (
    hitch,
    local_path,
    open_filesystem,
    protocol_of,
    redact,
    refusal,
    store_errors,
)
from batchgen.errors import InputError, StorageError, UnsupportedError
from batchgen.records import InputFile
from batchgen.redaction import has_secret, redact_message
from batchgen.retries import retrying

_LOCAL = frozenset({"file", "local"})
_HTTP = frozenset({"http", "https"})
_STORES = _LOCAL | _HTTP | {"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "hf"}
_ETAG_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "created")
# What `datasets` writes beside the data of a saved dataset.
_NOT_DATA = frozenset({"dataset_info.json", "dataset_dict.json", "state.json"})
_READ_BLOCK_BYTES = 4 << 20


def resolve_inputs(
    uri: str | Sequence[str], storage_options: Mapping[str, object] | None = None
) -> list[InputFile]:
    """The files behind a uri, a glob, a folder, or a list of these.

    A list keeps its order; a glob's and a folder's files are sorted by name. A folder gives every
    data file below it, hidden ones aside. A file that is named twice is read once.
    Raises InputError when a pattern matches nothing.
    """
    patterns = [uri] if isinstance(uri, str) else list(uri)
    files: dict[str, InputFile] = {}
    for pattern in patterns:
        _refuse_credentials(pattern)
        protocol = protocol_of(pattern)
        if protocol not in _STORES:
            raise UnsupportedError(
                f"{redact(pattern)}: {protocol}:// is not supported as input; "
                f"use one of {', '.join(sorted(_STORES))}"
            )
        filesystem = open_filesystem(pattern, storage_options)
        errors = store_errors(protocol)
        try:
            infos = retrying(
                partial(_matches, filesystem, pattern, protocol),
                errors,
                partial(hitch, "list", pattern),
            )
        except errors as error:
            raise StorageError(refusal("list", pattern, error, storage_options)) from error
        except (ValueError, TypeError) as error:  # of a client that is made at its first use
            why = redact_message(str(error), storage_options)
            raise InputError(
                f"input.uri {redact(pattern)!r} cannot be opened: {why}; "
                "check input.storage_options"
            ) from error
        if not infos:
            place = f" below {os.getcwd()}" if _is_relative(pattern) else ""
            raise InputError(f"input.uri {redact(pattern)!r} matches no data file{place}")
        for info in infos:
            file = _input_file(info, pattern, protocol)
            files.setdefault(file.uri, file)
    return list(files.values())


def open_input(
    file: InputFile,
    storage_options: Mapping[str, object] | None = None,
    *,
    byte_start: int = 0,
    random_access: bool = False,
) -> BinaryIO:
    """The file's bytes from `byte_start` on, seekable. `random_access` reads nothing ahead."""
    protocol = protocol_of(file.uri)
    if protocol in _LOCAL:
        stream: Any = io.BufferedReader(io.FileIO(local_path(file.uri)))
    elif protocol == "memory":
        # fsspec hands out one shared file object with one position: not for two readers.
        stream = io.BytesIO(open_filesystem(file.uri, storage_options).cat_file(file.uri))
    else:
        filesystem = open_filesystem(file.uri, storage_options)
        cache_type = "none" if random_access else "readahead"
        reader = ObjectReader(
            lambda: filesystem.open(
                file.uri, "rb", block_size=_READ_BLOCK_BYTES, cache_type=cache_type
            ),
            uri=file.uri,
            size_bytes=file.size_bytes,
            errors=store_errors(protocol),
        )
        stream = io.BufferedReader(reader)
    stream.seek(byte_start)
    return cast(BinaryIO, stream)


def _matches(filesystem: Any, pattern: str, protocol: str) -> list[dict[str, Any]]:
    filesystem.invalidate_cache()
    path = local_path(pattern) if protocol in _LOCAL else pattern
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        info = None
    if info is not None and info["type"] == "directory":
        found = filesystem.find(path, detail=True)
        root = info["name"].rstrip("/")
        infos = [found[name] for name in sorted(found) if _is_data(name.removeprefix(root))]
    elif info is not None:
        infos = [info]
    elif has_magic(path):
        found = filesystem.glob(path, detail=True)
        # As in a shell, and unlike in fsspec, `*` does not match the dot of a hidden file.
        dots = path.count("/.")
        infos = [found[name] for name in sorted(found) if name.count("/.") <= dots]
    else:
        infos = []
    return [info for info in infos if info["type"] == "file"]


def _is_data(path: str) -> bool:
    parts = path.split("/")
    hidden = any(part.startswith((".", "_")) for part in parts)
    return not hidden and parts[-1] not in _NOT_DATA and format_of_name(path) is not None


def _input_file(info: dict[str, Any], pattern: str, protocol: str) -> InputFile:
    name = str(info["name"])
    if protocol in _LOCAL:
        stat = os.stat(name)
        uri = os.path.relpath(name) if _is_relative(pattern) else name
        if "://" in pattern:
            uri = f"file://{name}"
        etag = f"{stat.st_size}-{stat.st_mtime_ns}"
        return InputFile(uri=uri, size_bytes=stat.st_size, etag=etag)
    uri = name if protocol in _HTTP else f"{protocol}://{name.lstrip('/')}"
    if info.get("size") is None:
        raise InputError(f"{redact(uri)}: its server does not say its size; copy it first")
    etag = next((str(info[key]) for key in _ETAG_KEYS if info.get(key)), "")
    return InputFile(uri=uri, size_bytes=int(info["size"]), etag=etag.strip('"'))


def _is_relative(pattern: str) -> bool:
    return "://" not in pattern and not os.path.isabs(os.path.expanduser(pattern))


def _refuse_credentials(pattern: str) -> None:
    """An input's uri is stored in the ledger and in every row's address."""
    if has_secret(pattern):
        raise InputError(
            f"input.uri {redact(pattern)!r} holds a password or a query, which would be stored "
            "in the output; put credentials into input.storage_options or the environment"
        )
