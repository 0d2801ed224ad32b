from __future__ import annotations

import os
import random

from batchgen.records import Completion, Prompt, RowKey
from batchgen.supervision.line import Assignment, Worker, WorkerReport


def prompt(unit_id: int, index: int) -> Prompt:
    key = RowKey(unit_id=unit_id, index=index)
    return Prompt(key=key, token_ids=[1], max_tokens=1, seeds=(0,))


def completion(unit_id: int, index: int) -> Completion:
    return Completion(key=RowKey(unit_id=unit_id, index=index), outputs=(), num_prompt_tokens=1)


def told() -> bytes:
    """What a worker tells of five rows, two of which it completes before it fails."""
    read, write = os.pipe()
    worker = Worker(Assignment(), write)
    worker.given([prompt(0, index) for index in range(3)])
    worker.given([])
    worker.ended([completion(0, 1)])
    worker.given([prompt(2**33, 2**40), prompt(1, 0)])
    worker.ended([completion(1, 0)])
    worker.failed("RuntimeError: é \ud800")
    os.close(write)
    data = os.read(read, 1 << 16)
    os.close(read)
    return data


def test_suspects_are_the_rows_that_were_given_and_not_completed() -> None:
    report = WorkerReport()
    report.feed(told())
    keys = [(key.unit_id, key.index) for key in report.suspects]
    assert keys == [(0, 0), (0, 2), (2**33, 2**40)]
    assert report.num_ended == 2
    assert report.failure == "RuntimeError: é \\ud800"


def test_messages_may_come_in_pieces() -> None:
    data = told()
    cuts = random.Random(1)
    for _ in range(50):
        report = WorkerReport()
        position = 0
        while position < len(data):
            size = cuts.randint(1, 20)
            report.feed(data[position : position + size])
            position += size
        assert (len(report.suspects), report.num_ended) == (3, 2)


def test_a_message_that_was_cut_short_counts_for_nothing() -> None:
    data = told()
    report = WorkerReport()
    report.feed(data[:9] + data[9:50])
    assert report.suspects == ()
