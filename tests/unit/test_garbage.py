"""The garbage collector's settings while rows are in flight, and afterwards."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest

from batchgen.garbage import rare_collections


class Node:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_is_left_alone_and_what_comes_is_not() -> None:
    old = Node()
    watched = weakref.ref(old)
    with rare_collections():
        del old
        new = weakref.ref(Node())
        gc.collect()
        assert watched() is not None
        assert new() is None
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_the_collector_is_as_before_whatever_ends_it(error: BaseException | None) -> None:
    before = gc.get_threshold()
    with contextlib.suppress(KeyboardInterrupt), rare_collections():
        assert gc.get_threshold()[0] > before[0]
        assert gc.get_freeze_count() > 0
        if error is not None:
            raise error
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
