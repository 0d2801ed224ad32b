"""The one door to fsspec: a folder on a store, with an exclusive and durable `create`.

Every write is whole or absent after a crash, and nothing relies on append or on a store's listing
cache. On local disk that is a temporary file, fsync, and a hard link to the final name; on object
stores one conditional PUT. Stores that cannot create exclusively are refused as an output.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

from batchgen.errors import StorageError, UnsupportedError, UsageError
from batchgen.redaction import has_secret, redact_message
from batchgen.redaction import redact as redact
from batchgen.retries import error_code, retrying

_TEMPORARY_PREFIX = ".tmp-"
_LOCAL = frozenset({"file", "local"})
_S3 = frozenset({"s3", "s3a"})
_GCS = frozenset({"gs", "gcs"})
_EXTRAS = dict.fromkeys(_S3, "batchgen[s3]") | dict.fromkeys(_GCS, "batchgen[gcs]")
_STORE_ERRORS = (  # beside OSError
    (
        _S3,
        (
            "botocore.exceptions.BotoCoreError",
            "botocore.exceptions.ClientError",
            "aiohttp.ClientError",
        ),
    ),
    (
        _GCS,
        (
            "gcsfs.retry.HttpError",
            "google.auth.exceptions.GoogleAuthError",
            "aiohttp.ClientError",
        ),
    ),
    (frozenset({"http", "https"}), ("aiohttp.ClientError",)),
)

T = TypeVar("T")

# fsspec's memory store is one per process and its exclusive open looks before it writes, so the
# lock that makes the two steps one is per process as well.
_memory_lock = threading.Lock()


class Storage:
    """A folder on a store. Paths are relative to it, with forward slashes.

    Every method raises StorageError when the store refuses (full, read-only, no permission,
    unreachable); the message says what, where and what to do.
    """

    def __init__(self, uri: str, root: str, store: _Store) -> None:
        self.uri = uri
        self._root = root
        self._store = store

    @classmethod
    def open(cls, uri: str, storage_options: Mapping[str, object] | None = None) -> Storage:
        """The folder at `uri` (local path, file, memory, s3, gs), which need not exist yet."""
        protocol = protocol_of(uri)
        if has_secret(uri):  # it is stored in the output, and printed
            raise UsageError(
                f"the output {redact(uri)!r} holds a password or a signature; put credentials "
                "into the environment"
            )
        uri = uri.rstrip("/")
        if protocol in _LOCAL:
            return cls(uri, local_path(uri), _LocalStore())
        if protocol not in _S3 | _GCS | {"memory"}:
            raise UnsupportedError(
                f"{redact(uri)}: an output on {protocol}:// is not supported, since that store "
                "is not known to create a file exclusively; use a local folder, s3:// or gs://"
            )
        filesystem = open_filesystem(uri, storage_options)
        root = str(filesystem._strip_protocol(uri)).rstrip("/")
        return cls(uri, root, _ObjectStore(filesystem, protocol))

    def child(self, path: str) -> Storage:
        """The folder `path` below this one."""
        return Storage(f"{self.uri}/{path}", self._full(path), self._store)

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError when it is absent."""
        return self._request("read", path, self._store.read, passing=(FileNotFoundError,))

    def exists(self, path: str) -> bool:
        """Whether the file is there now."""
        return self._request("look up", path, self._store.exists)

    def list(self, prefix: str = "") -> list[str]:
        """Paths of all files below the folder `prefix`, sorted; empty when it is absent."""
        found = self._request("list", prefix, self._store.list)
        return sorted(f"{prefix}/{name}" if prefix else name for name in found)

    def create(self, path: str, data: bytes) -> None:
        """Write a new file, whole and durable. Raises FileExistsError when it is there already.

        Of any number of callers in any processes exactly one succeeds. On an object store a lost
        reply can make the winner's own retry report FileExistsError: compare what is there.
        """
        self._request(
            "write", path, lambda full: self._store.create(full, data), passing=(FileExistsError,)
        )

    def put(self, path: str, data: bytes) -> None:
        """Write a file, whole and durable, in place of one that may be there."""
        self._request("write", path, lambda full: self._store.put(full, data))

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files. Absent ones are fine."""
        for path in paths:
            self._request("delete", path, self._store.delete)

    def _full(self, path: str) -> str:
        """Raises StorageError for a path that leads out of the folder: a ledger's may be forged."""
        if path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise StorageError(f"{redact(self.uri)}: the path {path!r} leads out of this folder")
        return f"{self._root}/{path}" if path else self._root

    def _request(
        self,
        action: str,
        path: str,
        request: Callable[[str], T],
        *,
        passing: tuple[type[OSError], ...] = (),
    ) -> T:
        """What `request` makes of the store's own path, tried again while the store is busy."""
        where = f"{self.uri}/{path}" if path else self.uri
        errors = self._store.errors
        try:
            return retrying(
                partial(request, self._full(path)), errors, partial(hitch, action, where)
            )
        except passing:
            raise
        except errors as error:
            raise StorageError(refusal(action, where, error)) from error


class _Store(Protocol):
    """What Storage needs from a store. Paths are the store's own."""

    errors: tuple[type[Exception], ...]

    def read(self, path: str) -> bytes: ...
    def exists(self, path: str) -> bool: ...
    def list(self, folder: str) -> list[str]: ...
    def create(self, path: str, data: bytes) -> None: ...
    def put(self, path: str, data: bytes) -> None: ...
    def delete(self, path: str) -> None: ...


class _LocalStore:
    errors: tuple[type[Exception], ...] = (OSError,)

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def exists(self, path: str) -> bool:
        return os.path.isfile(path)

    def list(self, folder: str) -> list[str]:
        return [
            os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")
            for parent, folders, names in os.walk(folder, onerror=_raise_unless_absent)
            # A link to a folder is listed as what it is: one thing, which is not ours.
            for name in (*names, *(f for f in folders if os.path.islink(os.path.join(parent, f))))
            if not name.startswith(_TEMPORARY_PREFIX)
        ]

    def create(self, path: str, data: bytes) -> None:
        with _durable_temporary(path, data) as temporary:
            os.link(temporary, path)
        _sync_folder(os.path.dirname(path))

    def put(self, path: str, data: bytes) -> None:
        with _durable_temporary(path, data) as temporary:
            os.replace(temporary, path)
        _sync_folder(os.path.dirname(path))

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


class _ObjectStore:
    """A store in which a PUT is atomic: memory, S3, Google Cloud Storage."""

    def __init__(self, filesystem: Any, protocol: str) -> None:
        self._filesystem = filesystem
        self._is_memory = protocol == "memory"
        self.errors = store_errors(protocol)

    def read(self, path: str) -> bytes:
        return bytes(self._filesystem.cat_file(path))

    def exists(self, path: str) -> bool:
        self._filesystem.invalidate_cache()
        try:  # fsspec's own isfile() takes every error for absence
            return bool(self._filesystem.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def list(self, folder: str) -> list[str]:
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.find(folder)
        except FileNotFoundError:
            return []
        start = f"{folder}/"
        return [
            name.removeprefix(start)
            for name in found
            if name.startswith(start) and not name.endswith("/")
        ]

    def create(self, path: str, data: bytes) -> None:
        if self._is_memory:
            with _memory_lock:
                self._filesystem.pipe_file(path, data, mode="create")
            return
        try:
            self._filesystem.pipe_file(path, data, mode="create")
        except OSError as error:
            if error_code(error) in {"PreconditionFailed", "412"}:
                raise FileExistsError(errno.EEXIST, "exists already", path) from error
            raise

    def put(self, path: str, data: bytes) -> None:
        self._filesystem.pipe_file(path, data)

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(path)


@contextlib.contextmanager
def _durable_temporary(path: str, data: bytes) -> Iterator[str]:
    """A synced temporary file beside `path`, which is gone afterwards."""
    folder = os.path.dirname(path)
    _make_folder(folder)
    temporary = os.path.join(folder, f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _make_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, "a file is in the place of this folder", folder)
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def protocol_of(uri: str) -> str:
    """`file` for plain paths, else the part before `://`. Chained urls are refused."""
    if "::" in uri:
        raise UnsupportedError(f"{redact(uri)}: chained urls (a::b) are not supported")
    protocol, separator, _ = uri.partition("://")
    return protocol.lower() if separator else "file"


def local_path(uri: str) -> str:
    """The absolute path of a local uri."""
    path = re.sub(r"^(file|local)://", "", uri)
    return os.path.abspath(os.path.expanduser(path))


def open_filesystem(uri: str, storage_options: Mapping[str, object] | None) -> Any:
    """The fsspec file system of a uri, with listing caches off."""
    import fsspec

    protocol = protocol_of(uri)
    options = {**(storage_options or {}), "use_listings_cache": False}
    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        package = _EXTRAS.get(protocol)
        install = f"pip install '{package}'" if package else str(error)
        raise UsageError(f"{redact(uri)}: {protocol}:// needs a package: {install}") from error
    except store_errors(protocol) as error:
        raise StorageError(refusal("open", uri, error, storage_options)) from error
    except (ValueError, TypeError) as error:
        why = redact_message(str(error), storage_options)
        raise UsageError(f"{redact(uri)}: {why}") from error


def store_errors(protocol: str) -> tuple[type[Exception], ...]:
    """What a store raises when it refuses or cannot be reached. Needs the store's package."""
    names = [name for protocols, names in _STORE_ERRORS if protocol in protocols for name in names]
    parts = [name.rpartition(".") for name in names]
    return (OSError, *(getattr(importlib.import_module(module), name) for module, _, name in parts))


def refusal(
    action: str,
    where: str,
    error: Exception,
    storage_options: Mapping[str, object] | None = None,
) -> str:
    """One line that says what could not be done, where, why, and what to do.

    Secrets of the `storage_options` that were in use are masked.
    """
    reason = redact_message(_reason(error), storage_options)
    number = error.errno if isinstance(error, OSError) else None
    again = "then run the same command again: what is committed is kept"
    if number in {errno.ENOSPC, errno.EDQUOT}:
        why = f"the disk is full ({os.strerror(number)}); free some space, {again}"
    elif number == errno.EFBIG:
        why = f"the file is larger than the process or the disk may have ({reason}), {again}"
    elif number == errno.ENOTDIR:
        why = f"a part of this path is a file and no folder ({reason}); choose another, {again}"
    elif number == errno.EROFS:
        why = f"the disk is read-only; make it writable or choose another folder, {again}"
    elif isinstance(error, PermissionError):
        why = f"permission denied ({reason}); check the rights or credentials, {again}"
    elif isinstance(error, FileNotFoundError):
        why = f"it does not exist ({reason}); create the folder or bucket, {again}"
    elif number in {errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}:
        why = f"this disk has no hard links ({reason}); choose a folder on another disk"
    else:
        why = f"{type(error).__name__}: {reason}; check the store, {again}"
    return f"cannot {action} {redact(where)}: {why}"


def hitch(action: str, where: str, error: Exception) -> str:
    """One line on an error that may pass by itself."""
    return (
        f"cannot {action} {redact(where)}: {type(error).__name__}: {redact_message(_reason(error))}"
    )


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(str(text).split())
