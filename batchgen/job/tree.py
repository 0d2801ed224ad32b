"""The plain values of a job, of its file and of the command line, and where each was set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchgen.errors import JobFileError
from batchgen.job.problems import Problem, describe_value, nearest_text
from batchgen.job.yaml_tree import KeyPath, YamlError, parse_yaml

_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class _Origin:
    """Where a key was set; the command line sorts before the file."""

    line: int
    column: int
    text: str


class JobTree:
    """The values to be validated. `override` and `set_param` change them."""

    def __init__(self, path: str) -> None:
        """Read the file. Raises: JobFileError."""
        try:
            tree = parse_yaml(_read_text(path))
        except YamlError as error:
            raise JobFileError(f"{path}:{error.line}:{error.column}: {error}") from error
        if tree.value is None:
            raise JobFileError(f"{path}:1:1: the file is empty; `batchgen init` writes a first job")
        if not isinstance(tree.value, dict):
            raise JobFileError(
                f"{path}:1:1: a job file should be a mapping (got {describe_value(tree.value)})"
            )
        self.values: dict[str, Any] = tree.value
        self._origins = {
            key: _Origin(line, column, f"{path}:{line}:{column}")
            for key, (line, column) in tree.places.items()
        }

    def override(self, text: str) -> None:
        """Set a key by `a.b=value`. A list's item goes by its index. Raises: JobFileError."""
        key, source = _split_option("-o", text, example="sampling.temperature=0.7")
        origin = _Origin(0, 0, f"-o {key}")
        try:
            value = parse_yaml(source).value
        except YamlError as error:
            raise JobFileError(
                f"{origin.text}: the value is read as YAML; put it in quotes to mean text: {error}"
            ) from error
        node: Any = self.values
        path: KeyPath = ()
        *parents, last = key.split(".")
        for part in parents:
            path = (*path, _child_key(node, part, path, origin))
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
                self._origins[path] = origin
            node = node[path[-1]]
        path = (*path, _child_key(node, last, path, origin))
        node[path[-1]] = value
        for old in [old for old in self._origins if old[: len(path)] == path]:
            del self._origins[old]
        self._origins[path] = origin

    def set_param(self, text: str) -> None:
        """Set a param that the file declares by `name=value`. Raises: JobFileError."""
        name, value = _split_option("-p", text, example="date=2026-01-01")
        params = self.values.get("params")
        declared = params if isinstance(params, dict) else {}
        if name not in declared:
            raise JobFileError(
                f"-p {name}: the job declares no such param; {nearest_text(name, list(declared))}"
            )
        declared[name] = value
        self._origins["params", name] = _Origin(0, 0, f"-p {name}")

    def describe(self, problems: Sequence[Problem]) -> str:
        """One line a problem, `origin: key.path: text`, in the order of the file."""
        lines = []
        for problem in problems:
            origin = self._origin_of(problem.path)
            key = ".".join(str(part) for part in problem.path)
            lines.append((origin, f"{origin.text}: {key}: {problem.text}"))
        return "\n".join(line for _, line in sorted(lines))

    def _origin_of(self, path: KeyPath) -> _Origin:
        """Where `path` was set; for what is missing, where the mapping around it was."""
        while path not in self._origins:
            path = path[:-1]
        return self._origins[path]


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise JobFileError(f"{path}: the job file cannot be read: {error.strerror}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise JobFileError(f"{path}: is no job file: it is larger than {_MAX_FILE_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        lines = error.object[: error.start].split(b"\n")
        raise JobFileError(
            f"{path}:{len(lines)}:{len(lines[-1]) + 1}: is not UTF-8; save the file as UTF-8"
        ) from error


def _split_option(flag: str, text: str, *, example: str) -> tuple[str, str]:
    """The key and the value of `key=value`. A malformed text is not quoted: it may be a secret."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", key):
        raise JobFileError(f"{flag}: should be key=value, such as {flag} {example}")
    return key, value


def _child_key(node: object, part: str, path: KeyPath, origin: _Origin) -> str | int:
    """What `part` of an override's key names in `node`, the value at `path`."""
    if isinstance(node, dict):
        return part
    parent = ".".join(str(part) for part in path)
    if not isinstance(node, list):
        raise JobFileError(f"{origin.text}: {parent} holds no keys (got {describe_value(node)})")
    if part not in [str(index) for index in range(len(node))]:
        raise JobFileError(
            f"{origin.text}: {parent} is a list of {len(node)}; name an item by its index, from 0"
        )
    return int(part)
