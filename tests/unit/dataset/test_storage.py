"""Storage on a real disk, on fsspec's memory store and on a real S3 server process."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from batchgen import retries
from batchgen.dataset.storage import Storage, redact
from batchgen.errors import StorageError, UnsupportedError


@pytest.fixture(params=["local", "file_url", "memory", "s3"])
def folder_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    if request.param == "file_url":
        return f"file://{tmp_path}/out/"
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/out"
    return f"{request.getfixturevalue('s3_bucket')}/some/out"


@pytest.fixture
def storage(folder_uri: str) -> Storage:
    return Storage.open(folder_uri)


def test_a_missing_folder_is_empty(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.list("data") == []
    assert not storage.exists("a")
    with pytest.raises(FileNotFoundError):
        storage.read("a")


def test_create_writes_once(storage: Storage) -> None:
    storage.create("commits/00000001.json", b"first")
    with pytest.raises(FileExistsError):
        storage.create("commits/00000001.json", b"second")
    assert storage.read("commits/00000001.json") == b"first"
    assert storage.exists("commits/00000001.json")
    assert not storage.exists("commits")


def test_list_is_recursive_sorted_and_never_stale(storage: Storage) -> None:
    for path in ("b/2", "b/1", "b/c/3", "bb/4", "5"):
        storage.put(path, path.encode())
    assert storage.list() == ["5", "b/1", "b/2", "b/c/3", "bb/4"]
    assert storage.list("b") == ["b/1", "b/2", "b/c/3"]
    other = Storage.open(storage.uri)
    other.put("b/6", b"")
    other.delete(["b/1", "b/absent", "nowhere/at/all"])
    assert storage.list("b") == ["b/2", "b/6", "b/c/3"]
    assert storage.read("b/6") == b""


def test_put_replaces(storage: Storage) -> None:
    storage.put("card", b"old and longer")
    storage.put("card", b"new")
    assert storage.read("card") == b"new"


def test_child_is_the_folder_below(storage: Storage) -> None:
    child = storage.child(".batchgen")
    child.create("job.json", b"{}")
    assert storage.list() == [".batchgen/job.json"]
    assert child.list() == ["job.json"]
    assert child.uri == f"{storage.uri}/.batchgen"


def test_of_many_threads_one_creates(storage: Storage) -> None:
    barrier = threading.Barrier(8)
    winners: list[int] = []

    def attempt(number: int) -> None:
        barrier.wait()
        try:
            storage.create("commits/0", str(number).encode())
            winners.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read("commits/0") == str(winners[0]).encode()
    assert len(winners) == 1


def _create_all(uri: str, content: bytes, count: int) -> int:
    storage = Storage.open(uri)
    created = 0
    for number in range(count):
        try:
            storage.create(f"commits/{number:04d}", content)
            created += 1
        except FileExistsError:
            pass
    return created


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_of_two_processes_one_creates(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path) if kind == "local" else f"{request.getfixturevalue('s3_bucket')}/out"
    jobs = [(uri, b"a" * 50_000, 40), (uri, b"b" * 50_000, 40)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        created = pool.starmap(_create_all, jobs)
    storage = Storage.open(uri)
    assert sum(created) == 40
    assert len(storage.list("commits")) == 40
    contents = {storage.read(path) for path in storage.list("commits")}
    assert contents <= {b"a" * 50_000, b"b" * 50_000}


def test_leftovers_of_a_killed_process_are_not_listed(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    script = f"""
        import os, signal
        from batchgen.dataset.storage import Storage
        os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        Storage.open({str(tmp_path)!r}).create("commits/0", b"x" * 100_000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -9
    assert len(os.listdir(tmp_path / "commits")) == 1
    assert storage.list() == []
    storage.create("commits/0", b"again")
    assert storage.list() == ["commits/0"]


def test_a_relative_folder_stays_where_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage.open("out")
    monkeypatch.chdir("/")
    storage.create("a", b"1")
    assert (tmp_path / "out" / "a").read_bytes() == b"1"
    assert storage.uri == "out"


def _in_a_mounted_folder(
    tmp_path: Path, mount: str, script: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a mount namespace of its own, after the `mount` command."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare")
    inner = f"{mount} || exit 99; exec {sys.executable} -c '{textwrap.dedent(script)}'"
    done = subprocess.run(
        [unshare, "-Urm", "sh", "-c", inner],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr}")
    return done


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = """
        import os
        from batchgen.dataset.storage import Storage
        from batchgen.errors import StorageError
        storage = Storage.open("disk/out")
        storage.create("small", b"kept")
        for write in (storage.create, storage.put):
            try:
                write("big", b"x" * 1_000_000)
            except StorageError as error:
                print(error)
        print(storage.list(), storage.read("small"), os.listdir("disk/out"))
    """
    done = _in_a_mounted_folder(tmp_path, "mount -t tmpfs -o size=64k none disk", script)
    first, second, state = done.stdout.splitlines()
    assert first == second
    assert first.startswith("cannot write disk/out/big: the disk is full (No space left on device)")
    assert "run the same command again" in first
    assert state == "['small'] b'kept' ['small']"


def test_a_read_only_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = """
        from batchgen.dataset.storage import Storage
        from batchgen.errors import StorageError
        for attempt in (lambda s: s.create("a", b""), lambda s: s.put("a", b"")):
            try:
                attempt(Storage.open("disk/out"))
            except StorageError as error:
                print(error)
    """
    done = _in_a_mounted_folder(tmp_path, "mount -t tmpfs -o ro none disk", script)
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.startswith("cannot write disk/out/a: the disk is read-only")


def test_a_file_in_the_place_of_a_folder_above(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a part of this path is a file and no folder"):
        Storage.open(str(tmp_path / "file" / "out")).put("a", b"")


def test_a_file_that_is_larger_than_the_process_may_write(tmp_path: Path) -> None:
    script = f"""
        import resource, signal
        from batchgen.dataset.storage import Storage
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        Storage.open({str(tmp_path)!r}).put("a", bytes(2000))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert "the file is larger than the process or the disk may have" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(StorageError, match="permission denied"):
        Storage.open(str(tmp_path)).create("a", b"")


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(StorageError, match="a file is in the place of this folder"):
        Storage.open(str(tmp_path / "out")).create("data/a", b"")


def _create(storage: Storage) -> None:
    storage.create("a", b"")


def _put(storage: Storage) -> None:
    storage.put("a", b"")


@pytest.mark.parametrize("write", [_create, _put])
def test_a_missing_bucket(s3_bucket: str, write: Callable[[Storage], None]) -> None:
    storage = Storage.open(f"{s3_bucket}-not/out")
    assert storage.list() == []
    with pytest.raises(StorageError, match=r"it does not exist .* create the folder or bucket"):
        write(storage)


def test_an_unreachable_s3_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    options = {
        "endpoint_url": "http://user:hunter2@127.0.0.1:9/?token=hunter2",
        "key": "a",
        "secret": "b",
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }
    storage = Storage.open("s3://bucket/out", options)
    with pytest.raises(StorageError, match="cannot write s3://bucket/out/a") as caught:
        storage.create("a", b"")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", ["https://x.org/out", "ftp://x/out", "simplecache::s3://b/out"])
def test_stores_without_an_exclusive_create_are_refused(uri: str) -> None:
    with pytest.raises(UnsupportedError, match="not supported"):
        Storage.open(uri)


def test_redact() -> None:
    text = "GET https://me:secret@host.org/a/b?X-Amz-Signature=abc failed, see s3://bucket/k@v?"
    assert redact(text) == "GET https://host.org/a/b failed, see s3://bucket/k@v?"
