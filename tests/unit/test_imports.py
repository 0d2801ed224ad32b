"""Who may import whom, and what importing the package may import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "batchgen"

# Rooms from the bottom up: a room imports what is below it, and never one beside it.
RANKS = (
    ("__init__", "errors", "records", "redaction", "retries", "garbage"),
    ("kernels", "job", "dataset.storage"),
    ("dataset", "prompts", "ledger", "models", "monitor", "supervision"),
    ("engine",),
    ("units", "verify"),
    ("pipeline",),
    ("startup",),
    ("retry", "generating", "publishing"),
    ("runner",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANK_OF = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
HEAVY = ("torch", "triton", "transformers", "datasets")


def python_files(folder: Path) -> Iterator[Path]:
    # Path.rglob does not follow the link batchgen/kernels before Python 3.13.
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from python_files(path)
        elif path.suffix == ".py":
            yield path


def module_of(path: Path) -> str:
    """batchgen.job.spec for batchgen/job/spec.py; batchgen.job for its __init__."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in python_files(PACKAGE)}


def room_of(module: str) -> str:
    """job for batchgen.job.spec; the package itself is `__init__`."""
    parts = module.split(".")[1:]
    if parts[:2] == ["dataset", "storage"]:
        return "dataset.storage"
    return parts[0] if parts else "__init__"


def imported_modules(path: Path, module: str) -> Iterator[str]:
    """Every absolute module name that the file imports, also inside functions."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else base for name in names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_ranks(module):
    room = room_of(module)
    assert room in RANK_OF, f"{room} has no rank: give it its place in RANKS"
    for imported in imported_modules(MODULES[module], module):
        if imported.split(".")[0] != "batchgen" or room_of(imported) == room:
            continue
        assert RANK_OF[room_of(imported)] < RANK_OF[room], f"{module} imports {imported}"


def test_nothing_imports_bare_kernels():
    """The name belongs to another package, which transformers imports from."""
    folders = ("batchgen", "tests")
    paths = [path for folder in folders for path in python_files(ROOT / folder)]
    assert len(paths) > 20
    for path in paths:
        top_level = {name.split(".")[0] for name in imported_modules(path, path.stem)}
        assert "kernels" not in top_level, path


def modules_after(code: str, folder: Path = ROOT) -> set[str]:
    """The top-level modules that a new Python has imported after `code`."""
    tail = "\nimport json as _json, sys as _sys\nprint(_json.dumps(sorted(_sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def command(*arguments: str) -> str:
    return (
        "import sys\n"
        "from batchgen.cli import main\n"
        f"sys.argv = {['batchgen', *arguments]!r}\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
    )


def test_importing_the_package_imports_nothing_heavy():
    assert modules_after("import batchgen").isdisjoint({*HEAVY, "pydantic", "pyarrow", "fsspec"})


def test_loading_a_job_imports_nothing_heavy():
    loaded = modules_after("import batchgen.job.loading, batchgen.job.fingerprint")
    assert loaded.isdisjoint({*HEAVY, "pyarrow", "fsspec"})


def test_scheduling_imports_no_torch():
    names = ("block_pool", "kv_cache", "prefix_plan", "scheduler", "step_plan")
    imports = ", ".join(f"batchgen.engine.{name}" for name in names)
    assert modules_after(f"import {imports}").isdisjoint(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["schema"]])
def test_help_imports_nothing_heavy(arguments):
    assert modules_after(command(*arguments)).isdisjoint(HEAVY)


def test_validate_imports_nothing_heavy(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "Hello."}\n')
    (tmp_path / "job.yaml").write_text(
        "input: {uri: rows.jsonl}\n"
        "prompt: {messages: [{role: user, content: '{{ text }}'}]}\n"
        "model: {name_or_path: absent/model}\n"
        "output: {uri: out, columns: {keep: [text]}}\n"
    )
    assert modules_after(command("validate", "job.yaml"), tmp_path).isdisjoint(HEAVY)


@pytest.mark.slow
def test_transformers_models_import_beside_our_kernels():
    """From the checkout, where a folder named `kernels` lies on the path."""
    code = "import batchgen, transformers.models.llama.modeling_llama"
    assert "transformers" in modules_after(code, ROOT)
