"""The cache of converted models: whole or not there, whoever is killed, damages or races."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchgen.errors import ModelError
from batchgen.models.cache import cache_root, cached_folder


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Fill:
    """Writes two files, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, folder: Path) -> None:
        self.count += 1
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_bytes(b"\1" * 100_000)


def test_a_folder_is_filled_once(root: Path) -> None:
    fill = Fill()
    folder = cached_folder("key", fill)
    assert folder == root / "key"
    assert cached_folder("key", fill) == folder
    assert (folder / "weights").stat().st_size == 100_000
    assert fill.count == 1


@pytest.mark.parametrize(
    "damage", ["truncated", "changed", "missing", "no manifest", "bad manifest"]
)
def test_a_damaged_folder_is_filled_again(damage: str) -> None:
    fill = Fill()
    folder = cached_folder("key", fill)
    match damage:
        case "truncated":
            (folder / "weights").write_bytes(b"\1" * 99_999)
        case "changed":
            (folder / "weights").write_bytes(b"\2" + b"\1" * 99_999)
        case "missing":
            (folder / "config.json").unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "bad manifest":
            (folder / "manifest.json").write_text('{"config.j')
    cached_folder("key", fill)
    assert fill.count == 2
    assert (folder / "weights").read_bytes() == b"\1" * 100_000
    assert cached_folder("key", fill) == folder
    assert fill.count == 2


def test_what_a_killed_process_left_is_cleared(root: Path) -> None:
    code = (
        "import time; from batchgen.models.cache import cached_folder\n"
        "def fill(folder):\n"
        "    (folder / 'weights').write_bytes(b'half'); print('half', flush=True); time.sleep(60)\n"
        "cached_folder('key', fill)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert not (root / "key").exists()
    folder = cached_folder("key", Fill())
    assert sorted(os.listdir(folder)) == ["config.json", "manifest.json", "weights"]
    assert sorted(os.listdir(root)) == ["key", "key.lock"]


def _fill_slowly(log: str) -> None:
    def fill(folder: Path) -> None:
        with open(log, "a") as file:
            file.write("filled\n")
        time.sleep(0.3)
        Fill()(folder)

    assert (cached_folder("key", fill) / "weights").exists()


def test_processes_that_ask_at_once_fill_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = str(tmp_path / "log")
    processes = [context.Process(target=_fill_slowly, args=(log,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert Path(log).read_text() == "filled\n"


def test_a_failed_fill_leaves_nothing_complete(root: Path) -> None:
    def fail(folder: Path) -> None:
        Fill()(folder)
        raise ModelError("broken file")

    with pytest.raises(ModelError, match="broken file"):
        cached_folder("key", fail)
    assert not (root / "key").exists()


def test_a_cache_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="set BATCHGEN_CACHE to a folder with room"):
        cached_folder("key", Fill())


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/batchgen")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_root() == Path("/home/user/.cache/batchgen")
