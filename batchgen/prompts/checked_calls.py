"""What templates call: methods of texts and filters, checked before they make something large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from batchgen.prompts.budget import Budget, TemplateLimitError

_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill"})
CHECKED_METHODS = _PADDING_METHODS | {"expandtabs", "replace", "join"}

_Args = tuple[Any, ...]


class Counted:
    """Something to iterate over, each item a step."""

    def __init__(self, items: Any, budget: Budget, cost: int) -> None:
        self._items = items
        self._budget = budget
        self._cost = cost
        if not hasattr(items, "__len__"):
            # jinja asks by calling, and copies what answers that it has no length.
            self._items = items = list(iter(self))
        self._length: int = len(items)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        step, cost = self._budget.step, self._cost
        for item in self._items:
            step(cost)
            yield item


def checked_method(budget: Budget, method: Any, args: _Args, kwargs: Mapping[str, Any]) -> _Args:
    """Check a text's method before it is called; the arguments to call it with."""
    text, name = method.__self__, method.__name__
    if name in _PADDING_METHODS:
        budget.width(*args)
    elif name == "expandtabs":
        budget.repeated(" " * text.count("\t"), next(iter((*args, *kwargs.values())), 8))
    elif name == "replace" and len(args) > 1:
        budget.replaced(text, *args[:2])
    elif name == "join" and args:
        return (_joined(budget, args[0], text), *args[1:])
    return args


def _joined(budget: Budget, items: Any, separator: object) -> list[Any]:
    """The items, which can be written with the separator between them."""
    found = list(Counted(items, budget, 1))
    budget.tree(found)
    budget.repeated(separator, len(found))
    return found


def _argument(
    args: _Args, kwargs: Mapping[str, Any], position: int, name: str, default: Any
) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _check_widths(budget: Budget, args: _Args, kwargs: Mapping[str, Any]) -> _Args:
    budget.width(*args[1:], *kwargs.values())
    return args


def _check_replace(budget: Budget, args: _Args, kwargs: Mapping[str, Any]) -> _Args:
    old, new = _argument(args, kwargs, 1, "old", ""), _argument(args, kwargs, 2, "new", "")
    budget.replaced(str(args[0]), str(old), str(new))
    return args


def _check_indent(budget: Budget, args: _Args, kwargs: Mapping[str, Any]) -> _Args:
    width = _argument(args, kwargs, 1, "width", 4)
    num_lines = str(args[0]).count("\n") + 1
    if isinstance(width, str):
        budget.repeated(width, num_lines)
    else:
        budget.repeated(" " * num_lines, width)
    return args


def _check_join(budget: Budget, args: _Args, kwargs: Mapping[str, Any]) -> _Args:
    return (_joined(budget, args[0], _argument(args, kwargs, 1, "d", "")), *args[1:])


def _check_json(budget: Budget, args: _Args, kwargs: Mapping[str, Any]) -> _Args:
    size, depth = budget.tree(args[0])
    for width in (*args[1:], *kwargs.values()):  # whichever is the indent
        if isinstance(width, int | str):
            budget.chars(size * depth * (len(width) if isinstance(width, str) else width))
    return args


def _check_format(budget: Budget, args: _Args, kwargs: Mapping[str, Any]) -> _Args:
    budget.format(str(args[0]))
    return args


def _check_sum(budget: Budget, args: _Args, kwargs: Mapping[str, Any]) -> _Args:
    if not isinstance(_argument(args, kwargs, 2, "start", 0), int | float):
        raise TemplateLimitError("sum adds numbers only")
    return args


FILTER_CHECKS: Mapping[str, Callable[[Budget, _Args, Mapping[str, Any]], _Args]] = {
    "batch": _check_widths,
    "center": _check_widths,
    "format": _check_format,
    "indent": _check_indent,
    "join": _check_join,
    "replace": _check_replace,
    "round": _check_widths,
    "slice": _check_widths,
    "sum": _check_sum,
    "tojson": _check_json,
}
