"""An object store that fails as real ones do, behind fsspec's own interface.

A `World` is what lies on the store and outlives every process. A `Life` is what one process sees
of it: its faults, and the moment at which it is killed. `FaultyFileSystem` takes the place of
s3fs under `s3://`, raises what s3fs raises, and takes its faults from the life that was current
when it was made. What a dead life asks of the store has no effect: it raises `Killed` again.
"""

from __future__ import annotations

import io
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError
from fsspec.spec import AbstractFileSystem
from s3fs.errors import translate_boto_error

T = TypeVar("T")
Moment = Literal["before", "after"]
Fault = Literal["refused", "lost_reply", "repeated", "truncated", "delayed"]

FAULTS_OF: dict[str, tuple[Fault, ...]] = {
    "read": ("refused", "lost_reply", "truncated", "delayed"),
    "info": ("refused", "lost_reply", "delayed"),
    "list": ("refused", "lost_reply", "delayed"),
    "put": ("refused", "lost_reply", "delayed"),
    "create": ("refused", "lost_reply", "repeated", "delayed"),
    "delete": ("refused", "lost_reply", "delayed"),
}
STATUSES = {
    429: "TooManyRequests",
    500: "InternalError",
    502: "BadGateway",
    503: "SlowDown",
    504: "GatewayTimeout",
}
LAG_OPERATIONS = 12


class Killed(BaseException):
    """Stands for SIGKILL: nothing of batchgen's may catch it and go on."""


@dataclass
class World:
    """The objects, and for listings that lag, when each came and went."""

    objects: dict[str, bytes] = field(default_factory=dict)
    changes: list[tuple[str, bool]] = field(default_factory=list)  # path, whether it is there
    lock: threading.RLock = field(default_factory=threading.RLock)

    def below(self, folder: str) -> dict[str, bytes]:
        start = f"{folder}/"
        return {path: data for path, data in self.objects.items() if path.startswith(start)}

    def set(self, path: str, data: bytes | None) -> None:
        with self.lock:
            if data is None:
                self.objects.pop(path, None)
            else:
                self.objects[path] = data
            self.changes.append((path, data is not None))

    def listing(self, num_late: int) -> set[str]:
        """The paths as a listing shows them that has not heard of the last changes."""
        with self.lock:
            late = {path for path, _ in self.changes[-num_late:]} if num_late else set()
            before: dict[str, bool] = dict.fromkeys(late, False)
            before.update((path, there) for path, there in self.changes[:-num_late] if path in late)
            return (self.objects.keys() - late) | {path for path, there in before.items() if there}


@dataclass
class Life:
    """One process: where it is killed, where it is paused, and how often the store fails it.

    Operations are counted from 1. `moment` says whether a kill or a pause comes before the
    operation takes effect or after it, and before its reply is heard.
    """

    world: World
    kill_at: int | None = None
    moment: Moment = "before"
    fault_rate: float = 0.0
    fault_at: int | None = None  # one fault at this operation, if it can have one of `faults`
    faults: tuple[Fault, ...] = ("refused", "lost_reply", "repeated", "truncated", "delayed")
    listings_lag: bool = False
    pause_at: int | None = None
    while_paused: Callable[[], None] = lambda: None
    seed: int = 0
    num_operations: int = 0
    is_dead: bool = False
    injected: Counter[tuple[str, Fault]] = field(default_factory=Counter)
    killed_in: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def operate(self, kind: str, effect: Callable[[], T], what: str) -> T:
        """One request: `effect` is what it does on the store."""
        with self.lock:
            self.num_operations += 1
            is_last = self.num_operations == self.kill_at
            is_paused = self.num_operations == self.pause_at
            fault = self._fault(kind)
        if self.is_dead:
            raise Killed
        if is_last:
            self.killed_in = f"{kind} {what}"
            if self.moment == "after":
                self._try(effect)
            self.is_dead = True
            raise Killed
        if is_paused and self.moment == "before":
            self._pause()
        if fault == "delayed":
            time.sleep(0.001)
        elif fault is not None and fault != "truncated":
            if fault != "refused":
                effect()
            raise _already_there(self._random) if fault == "repeated" else self._error()
        result = effect()
        if is_paused and self.moment == "after":
            self._pause()
        if self.is_dead:  # by another thread meanwhile: this reply reaches nobody
            raise Killed
        if fault == "truncated" and isinstance(result, bytes) and result:
            return result[: self._random.randrange(len(result))]  # type: ignore[return-value]
        return result

    def num_late(self) -> int:
        """How many of the last changes a listing misses now."""
        return self._random.randrange(LAG_OPERATIONS) if self.listings_lag else 0

    def _fault(self, kind: str) -> Fault | None:
        is_due = self.num_operations == self.fault_at
        if not is_due and self._random.random() >= self.fault_rate:
            return None
        possible = [fault for fault in FAULTS_OF[kind] if fault in self.faults]
        if not possible:
            return None
        fault = self._random.choice(possible)
        self.injected[kind, fault] += 1
        return fault

    def _pause(self) -> None:
        self.while_paused()
        FaultyFileSystem.life = self

    def _try(self, effect: Callable[[], object]) -> None:
        try:
            effect()
        except OSError:
            return  # the reply, whatever it is, reaches nobody

    def _error(self) -> Exception:
        """What s3fs raises when its own retries have not helped."""
        status = self._random.choice([*STATUSES, "timeout", "closed"])
        if status == "timeout":
            return ReadTimeoutError(endpoint_url="https://store.example")
        if status == "closed":
            return ConnectionClosedError(endpoint_url="https://store.example")
        assert isinstance(status, int)
        return _client_error(STATUSES[status], status)


def _client_error(code: str, status: int, **details: str) -> Exception:
    error = ClientError(
        {
            "Error": {"Code": code, "Message": code, **details},  # type: ignore[typeddict-item]
            "ResponseMetadata": {"HTTPStatusCode": status},  # type: ignore[typeddict-item]
        },
        "Request",
    )
    translated: Exception = translate_boto_error(error)
    return translated


def _already_there(moments: random.Random) -> Exception:
    """412 as Amazon says it, and as other servers do, without the condition's name."""
    details = {"Condition": "If-None-Match"} if moments.random() < 0.5 else {}
    return _client_error("PreconditionFailed", 412, **details)


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """What batchgen uses of s3fs."""

    protocol = "s3"
    cachable = False
    life: ClassVar[Life]  # of the process that is running

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._life = FaultyFileSystem.life
        self._world = self._life.world

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        return self._life.operate("info", lambda: self._info(path), path)

    def find(self, path: str, detail: bool = False, **options: Any) -> Any:
        """Every object below `path`."""
        folder = self._strip_protocol(path)
        names = self._life.operate("list", self._listing, folder)
        found = [name for name in names if name.startswith(f"{folder}/")]
        if not detail:
            return found
        return {name: self._info(name) for name in found if name in self._world.objects}

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        path = self._strip_protocol(path)
        return self._life.operate("read", lambda: self._get(path)[start:end], path)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        path = self._strip_protocol(path)
        if mode == "create":
            self._life.operate("create", lambda: self._create(path, value), path)
        else:
            self._life.operate("put", lambda: self._world.set(path, value), path)

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        self._life.operate("delete", lambda: self._world.set(path, None), path)

    def open(self, path: str, mode: str = "rb", **options: Any) -> io.RawIOBase:
        size = self.info(path)["size"]
        return _RangeReader(self, path, size)

    def _info(self, path: str) -> dict[str, Any]:
        if path in self._world.objects:
            data = self._world.objects[path]
            return {
                "name": path,
                "type": "file",
                "size": len(data),
                "ETag": f"{zlib.crc32(data):08x}",
            }
        if self._world.below(path):
            return {"name": path, "type": "directory", "size": 0}
        raise _client_error("404", 404)

    def _listing(self) -> list[str]:
        return sorted(self._world.listing(self._life.num_late()))

    def _get(self, path: str) -> bytes:
        if path not in self._world.objects:
            raise _client_error("NoSuchKey", 404)
        return self._world.objects[path]

    def _create(self, path: str, value: bytes) -> None:
        with self._world.lock:
            if path in self._world.objects:
                raise _already_there(random.Random(path))
            self._world.set(path, value)


class _RangeReader(io.RawIOBase):
    """An open object: every read is a request."""

    def __init__(self, filesystem: FaultyFileSystem, path: str, size: int) -> None:
        self._filesystem = filesystem
        self._path = path
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._position + size, self._size)
        if self._position >= end:
            return b""
        data = self._filesystem.cat_file(self._path, self._position, end)
        self._position += len(data)
        return data
