"""Nothing in the package runs code that comes as data."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "batchgen"
FILES = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load",
                   "yaml.full_load", "yaml.unsafe_load"}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            assert not FORBIDDEN_MODULES & {name.split(".")[0] for name in names}, node.lineno
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, node.lineno
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg in ("allow_pickle", "trust_remote_code") and is_true)
            if ast.unparse(node.func).endswith("from_pretrained"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", node.lineno


def test_the_files_are_found() -> None:
    assert len(FILES) > 80
