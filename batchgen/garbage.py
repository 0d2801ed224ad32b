"""Python's cyclic garbage collector, set for a process that holds a window of rows.

A full collection goes through every object that can hold others: the million that the libraries
made when they were imported, and the rows in flight. Left alone it takes a fifth of the time of a
run over small rows, and stops the engine's thread meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# New containers until the young are looked at, rounds of that until the middle-aged, and of those
# until the old. A batch of rows lives for longer than Python's own 700 objects.
_THRESHOLDS = (50_000, 20, 20)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Within this, what exists now is never collected, and the rest seldom."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()  # what is frozen at the interpreter's end is never freed
