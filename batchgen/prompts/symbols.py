"""Symbols: what stands for the texts of a row while a template is traced (`tracing`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

MAX_TEXT_CHARS = 1 << 20  # of a row that is put together; above, its template's budget counts
_MAX_PARTS = 1 << 18  # of the symbols that a trace makes
# More than one method or filter takes for any text that is put together.
_STEPS_PER_TEXT = MAX_TEXT_CHARS >> 12

_STRIPS = ("strip", "lstrip", "rstrip")
_QUESTIONS: Mapping[str, Callable[..., bool]] = {
    "startswith": str.startswith,
    "endswith": str.endswith,
    "contains": str.__contains__,
    "equals": str.__eq__,
    "is_true": bool,
}

Texts = Sequence[str]


class Untraceable(BaseException):
    """The template asks what cannot be answered for other rows. No filter may catch it."""


@dataclass(frozen=True, slots=True)
class Ref:
    """One of the texts, after strips (method and its arguments), the first one first."""

    index: int
    strips: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def of(self, texts: Texts) -> str:
        text = texts[self.index]
        for method, arguments in self.strips:
            text = getattr(text, method)(*arguments)
        return text


Parts = tuple[str | Ref, ...]


def joined(parts: Parts, texts: Texts) -> str:
    return "".join([part if type(part) is str else part.of(texts) for part in parts])  # type: ignore[union-attr]


class Question(Protocol):
    """What a way through a template depends on. Hashable, with an answer that is, too."""

    def answer(self, texts: Texts) -> Hashable: ...


@dataclass(frozen=True, slots=True)
class _TextQuestion:
    parts: Parts
    name: str
    arguments: tuple[str | tuple[str, ...], ...]

    def answer(self, texts: Texts) -> bool:
        return _QUESTIONS[self.name](joined(self.parts, texts), *self.arguments)


class SpentBudget(Protocol):
    """What is left of a rendering's budget after it."""

    @property
    def steps_left(self) -> int: ...

    @property
    def chars_left(self) -> int: ...


class Trace:
    """One run of a template over symbols."""

    def __init__(self, texts: Texts) -> None:
        """Raises Untraceable for more texts than a trace may have parts."""
        self.asked: list[tuple[Question, Hashable]] = []
        self.num_written = 0
        self.num_made = 0  # parts, of all symbols
        self.num_parts = 0  # that were paid for
        self.num_chars = 0  # of these, those of the template
        self.num_uses = [0] * len(texts)  # and how often each text is among them
        self._texts = texts
        self.symbols = [Symbol(self, (Ref(index),)) for index in range(len(texts))]

    def ask(self, question: Question) -> Any:
        """The answer for this row's texts, noted."""
        answer = question.answer(self._texts)
        self.asked.append((question, answer))
        return answer

    def make(self, num_parts: int) -> None:
        """Note that a symbol of so many parts is made, which may cost a rendering nothing."""
        self.num_made += num_parts
        if self.num_made > _MAX_PARTS:
            raise Untraceable

    def pay(self, parts: Parts) -> None:
        """Note that a rendering makes a text of these parts, and pays for it."""
        self.num_parts += len(parts)
        if self.num_parts > _MAX_PARTS:
            raise Untraceable
        for part in parts:
            if isinstance(part, Ref):
                self.num_uses[part.index] += 1
            else:
                self.num_chars += len(part)

    def joined(self, pieces: Iterable[str | Symbol]) -> str | Symbol:
        """The pieces as one text: a symbol, if there is one among them or has been written."""
        parts: list[str | Ref] = []
        is_symbol = False
        for piece in pieces:
            if type(piece) is Symbol:
                is_symbol = True
                parts += piece._parts
            elif isinstance(piece, Written):
                is_symbol = True
                parts += piece.parts
                self.num_written -= 1
            else:
                parts.append(str.__str__(piece))
            if is_symbol and len(parts) > _MAX_PARTS:
                raise Untraceable
        if not is_symbol:
            return joined(tuple(parts), ())
        symbol = Symbol(self, tuple(parts))
        symbol.pay()
        return symbol

    def max_chars(self, budget: SpentBudget) -> int:
        """Of how long texts, together, a rendering in this way surely stays within the budget."""
        num_scans = self.num_parts + len(self.asked)
        if budget.steps_left < num_scans * _STEPS_PER_TEXT:
            return -1
        return (budget.chars_left - self.num_chars) // max([1, *self.num_uses])


class Written(str):
    """A symbol that has been written: a placeholder among the pieces."""

    parts: Parts

    def __new__(cls, parts: Parts) -> Written:
        written = super().__new__(cls)
        written.parts = parts
        return written

    def __str__(self) -> str:
        return self  # str() in jinja's compiled code must not lose the parts


def _refuse(*_: object, **__: object) -> NoReturn:
    raise Untraceable


class Symbol:
    """A text that a template is traced over: texts of the row, and the template's own between them.

    Deliberately no str: what is not allowed here must fail, and not work on some other text.
    """

    __slots__ = ("_parts", "_trace")

    def __init__(self, trace: Trace, parts: Parts) -> None:
        trace.make(len(parts))
        self._trace = trace
        self._parts = parts

    def pay(self) -> None:
        """Note that a rendering pays for this text."""
        self._trace.pay(self._parts)

    def written(self) -> Written:
        """The placeholder for it in the template's output."""
        self.pay()
        self._trace.num_written += 1
        return Written(self._parts)

    def method(self, name: str) -> Callable[..., object]:
        """A method of the text, by the name that templates know."""
        if name in _STRIPS:
            return _Method(lambda *arguments: self._stripped(name, arguments))
        if name in ("startswith", "endswith"):
            return _Method(lambda *arguments: self._ask(name, *arguments))
        raise Untraceable

    def strip(self) -> Symbol:
        """Without white space at its ends."""
        return self._stripped("strip", ())

    def _stripped(self, method: str, arguments: tuple[Any, ...]) -> Symbol:
        (ref, *others) = self._parts
        if others or not isinstance(ref, Ref) or not all(type(each) is str for each in arguments):
            raise Untraceable
        return Symbol(self._trace, (Ref(ref.index, (*ref.strips, (method, arguments))),))

    def _ask(self, name: str, *arguments: Any) -> bool:
        for each in arguments:
            texts = each if type(each) is tuple else (each,)
            if not all(type(text) is str for text in texts):
                raise Untraceable
        answer: bool = self._trace.ask(_TextQuestion(self._parts, name, arguments))
        return answer

    def __add__(self, other: object) -> Symbol:
        return Symbol(self._trace, (*self._parts, *_parts_of(other)))

    def __radd__(self, other: object) -> Symbol:
        return Symbol(self._trace, (*_parts_of(other), *self._parts))

    def __contains__(self, item: object) -> bool:
        return self._ask("contains", item)

    def __bool__(self) -> bool:
        return self._ask("is_true")

    def __eq__(self, other: object) -> bool:
        if other is None or isinstance(other, bool | int | float | list | tuple | dict):
            return False
        return self._ask("equals", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = __str__ = __repr__ = __format__ = _refuse
    __len__ = __iter__ = __reversed__ = __getitem__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __int__ = __float__ = __index__ = __round__ = __abs__ = __getattr__ = _refuse


class _Method:
    """A symbol's method, to be called and nothing else: two of a text's may be equal."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    __eq__ = __ne__ = __hash__ = __str__ = __repr__ = __format__ = _refuse


def _parts_of(value: object) -> Parts:
    if type(value) is Symbol:
        return value._parts
    if type(value) is str:
        return (value,)
    raise Untraceable
