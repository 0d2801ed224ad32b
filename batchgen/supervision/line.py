"""What a worker is told, and the pipe on which it tells which rows its engine has.

A message is a kind (one byte), the length of its body (8 bytes), and the body: row keys as pairs
of int64, three counts as int64, or a text. A message that a death cut short is none: the engine had
not got those rows.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from batchgen.records import Completion, Prompt, RowKey

_BEGUN, _GIVEN, _ENDED, _FAILED = b"b", b"g", b"e", b"f"
_HEAD_BYTES = 9


class EarlierWork(NamedTuple):
    """What was done when a command began."""

    rows: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a worker is to do of a run."""

    only: tuple[RowKey, ...] | None = None  # these rows, without publishing; None: all of it
    culprits: Mapping[RowKey, str] = field(default_factory=dict)  # rows to set aside first, and why
    is_restart: bool = False  # another worker of this command has run before
    earlier: EarlierWork | None = None  # when the first worker began; None: that is this one


class Worker:
    """The worker's end of the pipe. For the thread that runs the engine."""

    def __init__(self, assignment: Assignment, descriptor: int) -> None:
        self.assignment = assignment
        self._descriptor = descriptor

    def begun(self, earlier: EarlierWork) -> None:
        """Tell what was done before, for the workers that may come."""
        self._send(_BEGUN, array("q", earlier).tobytes())

    def given(self, prompts: Sequence[Prompt]) -> None:
        """Tell that the engine is about to get these."""
        if prompts:
            self._send(_GIVEN, _encode(prompt.key for prompt in prompts))

    def ended(self, completions: Sequence[Completion]) -> None:
        """Tell that the engine has completed these."""
        self._send(_ENDED, _encode(completion.key for completion in completions))

    def failed(self, reason: str) -> None:
        """Tell that the engine has raised an error over the rows that it has."""
        self._send(_FAILED, reason.encode("utf-8", "backslashreplace"))

    def _send(self, kind: bytes, body: bytes) -> None:
        data = memoryview(kind + len(body).to_bytes(_HEAD_BYTES - 1, "big") + body)
        while data:
            data = data[os.write(self._descriptor, data) :]


class WorkerReport:
    """The supervisor's end: which rows the engine has."""

    def __init__(self) -> None:
        self.num_ended = 0
        self.failure: str | None = None  # what the engine raised
        self.earlier: EarlierWork | None = None  # when the worker began
        self._in_engine: dict[RowKey, None] = {}  # in the order in which they were given
        self._buffer = bytearray()

    @property
    def suspects(self) -> tuple[RowKey, ...]:
        """The rows that were given to the engine and not completed, in the order given."""
        return tuple(self._in_engine)

    def feed(self, data: bytes) -> None:
        """Take in what has come through the pipe."""
        self._buffer += data
        start = 0
        while len(self._buffer) >= start + _HEAD_BYTES:
            body = start + _HEAD_BYTES
            end = body + int.from_bytes(self._buffer[start + 1 : body], "big")
            if len(self._buffer) < end:
                break
            self._take(bytes(self._buffer[start : start + 1]), bytes(self._buffer[body:end]))
            start = end
        del self._buffer[:start]

    def _take(self, kind: bytes, body: bytes) -> None:
        if kind == _FAILED:
            self.failure = body.decode()
            return
        if kind == _BEGUN:
            self.earlier = EarlierWork(*array("q", body))
            return
        keys = _decode(body)
        if kind == _GIVEN:
            self._in_engine.update(dict.fromkeys(keys))
            return
        self.num_ended += len(keys)
        for key in keys:
            self._in_engine.pop(key, None)


def _encode(keys: Iterable[RowKey]) -> bytes:
    return array("q", [number for key in keys for number in (key.unit_id, key.index)]).tobytes()


def _decode(body: bytes) -> list[RowKey]:
    numbers = array("q", body)
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [RowKey(unit_id=unit_id, index=index) for unit_id, index in pairs]
