"""An input file on a store over a network, read to its end whatever the connection does."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

from batchgen.dataset.storage import hitch
from batchgen.retries import TruncatedReadError, retrying


class ObjectReader(io.RawIOBase):
    """The bytes of an object whose size is known. After an error it is opened anew.

    A reader that took the end of a broken answer for the end of the file would make a bad record
    of the line that it cuts: here the end is where the object's size says. Only for reading; opened
    at the first read. Raises what the store raises, and TruncatedReadError.
    """

    def __init__(
        self,
        open_object: Callable[[], Any],
        *,
        uri: str,
        size_bytes: int,
        errors: tuple[type[Exception], ...],
    ) -> None:
        """`open_object` gives a seekable binary file; `errors` are what the store raises."""
        self._open_object = open_object
        self._uri = uri
        self._size_bytes = size_bytes
        self._errors = errors
        self._object: Any = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}
        self._position = start[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the start of `buffer`; 0 at the end of the object and nowhere else."""
        wanted_bytes = min(len(buffer), self._size_bytes - self._position)
        if wanted_bytes <= 0:
            return 0
        data = retrying(
            lambda: self._read(wanted_bytes),
            self._errors,
            partial(hitch, "read", self._uri),
        )
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, wanted_bytes: int) -> bytes:
        try:
            if self._object is None:
                self._object = self._open_object()
            self._object.seek(self._position)
            data = bytes(self._object.read(wanted_bytes))
            if not data:
                raise TruncatedReadError(f"it ends at byte {self._position} of {self._size_bytes}")
        except self._errors:
            self._drop()
            raise
        return data

    def _drop(self) -> None:
        if self._object is not None:
            self._object.close()
            self._object = None
