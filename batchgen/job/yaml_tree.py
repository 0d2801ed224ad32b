"""YAML into plain values that remember where each key stood.

Scalars follow YAML 1.2, not PyYAML's 1.1: `no`, `on` and `1:30` are text, `1e-3` is a number, and
a bare date is text. Tags are refused, aliases are expanded up to a limit, keys are texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import yaml

KeyPath = tuple[str | int, ...]

_MAX_DEPTH = 50
_MAX_VALUES = 100_000  # counted after aliases are expanded, so that a bomb stays small

_TAG = "tag:yaml.org,2002:"
_MAP, _SEQ, _STR = f"{_TAG}map", f"{_TAG}seq", f"{_TAG}str"


class YamlError(Exception):
    """Text that is no YAML, or YAML that a job file may not hold. Lines and columns from 1."""

    def __init__(self, problem: str, line: int, column: int) -> None:
        super().__init__(problem)
        self.line = line
        self.column = column


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlTree:
    """The values of a document, and the line and column (from 1) of each key and list item."""

    value: object
    places: Mapping[KeyPath, tuple[int, int]]


def parse_yaml(text: str) -> YamlTree:
    """The one document of `text`; its value is None when there is none.

    Raises: YamlError, whose text never quotes the document: it may hold secrets.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        if mark is not None and mark.buffer is not None and mark.buffer[mark.pointer] == "\t":
            problem += "; indent with spaces"
        raise YamlError(f"not readable as YAML: {problem}", *_place(mark)) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        column = error.position - (before.rfind("\n") + 1) + 1
        raise YamlError(
            f"the character U+{error.character:04X} is not allowed", before.count("\n") + 1, column
        ) from error
    except (ValueError, OverflowError) as error:  # PyYAML does not catch its own
        problem = "holds an escape or a number that is out of range"
        raise YamlError(problem, *_place(loader.get_mark())) from error
    builder = _Builder()
    value = None if node is None else builder.build(node, ())
    return YamlTree(value=value, places=builder.places)


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with YAML 1.2's scalars and a limit on depth."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  PyYAML's own way: filled by add_implicit_resolver
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = f"nested deeper than {_MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _parse_int(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_SCALARS: dict[str, tuple[str, str, Callable[[str], object]]] = {
    # tag: (pattern of YAML 1.2's core schema, first characters, value)
    f"{_TAG}null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    f"{_TAG}bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text[0] in "tT"),
    f"{_TAG}int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _parse_int),
    f"{_TAG}float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
        "-+.0123456789",
        float,
    ),
}
for _tag, (_pattern, _first, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})\Z"), [*_first, ""])


class _Builder:
    """Turns nodes into values; counts them, for an alias multiplies what it names."""

    def __init__(self) -> None:
        self.places: dict[KeyPath, tuple[int, int]] = {}
        self._num_values = 0

    def build(self, node: yaml.Node, path: KeyPath) -> object:
        self._num_values += 1
        if self._num_values > _MAX_VALUES or len(path) > _MAX_DEPTH:
            raise YamlError("its aliases expand to too much", *_place(node.start_mark))
        self.places.setdefault(path, _place(node.start_mark))
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return self._build_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return _build_scalar(node)
        raise _tag_refused(node)

    def _build_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        mapping: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = _build_key(key_node)
            if key in mapping:
                first_line, _ = self.places[*path, key]
                name = ".".join(str(part) for part in (*path, key))
                raise YamlError(
                    f"{name}: the key is given twice, first in line {first_line}",
                    *_place(key_node.start_mark),
                )
            self.places[*path, key] = _place(key_node.start_mark)
            mapping[key] = self.build(value_node, (*path, key))
        return mapping


def _build_key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag != _STR:
        raise YamlError("a key should be text; put it in quotes", *_place(node.start_mark))
    return _check_text(node)


def _build_scalar(node: yaml.ScalarNode) -> object:
    if node.tag == _STR:
        return _check_text(node)
    if node.tag not in _SCALARS:
        raise _tag_refused(node)
    pattern, _, convert = _SCALARS[node.tag]
    if not re.fullmatch(pattern, node.value):  # an explicit tag, such as !!int "x"
        raise _tag_refused(node)
    try:
        return convert(node.value)
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise YamlError("the number is too long", *_place(node.start_mark)) from error


def _check_text(node: yaml.ScalarNode) -> str:
    """The text, unless an escape such as "\\ud800" made it one that cannot be written."""
    text: str = node.value
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise YamlError("holds an escape that is no character", *_place(node.start_mark))
    return text


def _tag_refused(node: yaml.Node) -> YamlError:
    return YamlError(f"the tag {node.tag!r} is not allowed here", *_place(node.start_mark))


def _place(mark: yaml.Mark | None) -> tuple[int, int]:
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)
