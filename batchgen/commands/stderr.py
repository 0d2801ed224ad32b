"""A stderr that a run outlives."""

from __future__ import annotations

import io
import os
import sys


def keep_stderr() -> None:
    """From now on, what is written to stderr when nobody can read it any more is dropped.

    A terminal was closed, or Ctrl-C has ended the `tee` behind the run, too: that must neither end
    the run nor change its exit code. A stderr that is not the process' own stays as it is.
    """
    if sys.stderr is not sys.__stderr__ or not isinstance(sys.stderr, io.TextIOWrapper):
        return
    sys.stderr.flush()
    raw = _KeptFile(sys.stderr.fileno(), "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=sys.stderr.encoding,
        errors=sys.stderr.errors,
        line_buffering=True,
    )


class _KeptFile(io.FileIO):
    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:  # EPIPE, EIO of a terminal that is gone, a log's full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)
