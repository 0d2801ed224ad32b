import multiprocessing

from ledger_factories import commit_all, local_storage, make_plan, open_ledger

NUM_UNITS = 40


def commit_every_unit(path, barrier, wins):
    """What each process does: opens the same ledger at once, and commits the same units at once."""
    barrier.wait()
    ledger = open_ledger(local_storage(path), make_plan(*[2] * NUM_UNITS))
    for unit_id in range(NUM_UNITS):
        barrier.wait()
        wins.put((unit_id, commit_all(ledger, unit_id)))


def test_processes_commit_each_unit_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, wins = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=commit_every_unit, args=(str(tmp_path), barrier, wins))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    answers = [wins.get(timeout=60) for _ in range(2 * NUM_UNITS)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sorted(unit_id for unit_id, has_won in answers if has_won) == list(range(NUM_UNITS))
    ledger = open_ledger(local_storage(tmp_path))
    assert ledger.is_complete
    assert len(local_storage(tmp_path).list("commits")) == NUM_UNITS
