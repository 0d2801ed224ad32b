"""What a template makes of its texts, learned from examples and not computed anew for each row.

Most of what a template does is the same for every row. So it is run once with `Symbol`s in the
place of texts. A symbol may be written, joined, stripped, and asked the questions below, which this
row's text answers; the questions and answers are noted, and so are the pieces that come out, in
terms of the texts. For a row whose texts answer alike the template would do the same, so its pieces
are put together without it. Whatever else is asked of a symbol ends the trace, and the template is
run for every such row.

This is concolic execution (Sen, Marinov, Agha: CUTE, 2005) used as tracing compilers do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

MAX_TEXT_CHARS = 1 << 20  # of a row that is put together; above, its template's budget counts
_MAX_WAYS = 256  # through a template, of one key; with more, it decides by the text
_MAX_KEYS = 1024
_MAX_FAILURES = 8  # rows whose trace ended, of one key

_STRIPS = ("strip", "lstrip", "rstrip")
_QUESTIONS: Mapping[str, Callable[..., bool]] = {
    "startswith": str.startswith,
    "endswith": str.endswith,
    "contains": str.__contains__,
    "equals": str.__eq__,
    "is_true": bool,
}

Texts = Sequence[str]
MakeContext = Callable[[Sequence[Any]], Mapping[str, object]]


class Untraceable(BaseException):
    """The template asks what cannot be answered for other rows. No filter may catch it."""


@dataclass(frozen=True, slots=True)
class _Ref:
    """One of the texts, after strips (method and its arguments), the first one first."""

    index: int
    strips: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def of(self, texts: Texts) -> str:
        text = texts[self.index]
        for method, arguments in self.strips:
            text = getattr(text, method)(*arguments)
        return text


_Parts = tuple[str | _Ref, ...]


def _joined(parts: _Parts, texts: Texts) -> str:
    return "".join([part if type(part) is str else part.of(texts) for part in parts])  # type: ignore[union-attr]


class Question(Protocol):
    """What a way through a template depends on. Hashable, with an answer that is, too."""

    def answer(self, texts: Texts) -> Hashable: ...


@dataclass(frozen=True, slots=True)
class _TextQuestion:
    parts: _Parts
    name: str
    arguments: tuple[str | tuple[str, ...], ...]

    def answer(self, texts: Texts) -> bool:
        return _QUESTIONS[self.name](_joined(self.parts, texts), *self.arguments)


class Trace:
    """One run of a template over symbols."""

    def __init__(self, texts: Texts) -> None:
        self.symbols = [Symbol(self, (_Ref(index),)) for index in range(len(texts))]
        self.asked: list[tuple[Question, Hashable]] = []
        self.num_written = 0
        self._texts = texts

    def ask(self, question: Question) -> Any:
        """The answer for this row's texts, noted."""
        answer = question.answer(self._texts)
        self.asked.append((question, answer))
        return answer


class Written(str):
    """A symbol that has been written: a placeholder among the pieces."""

    parts: _Parts

    def __new__(cls, parts: _Parts) -> Written:
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

    def __init__(self, trace: Trace, parts: _Parts) -> None:
        self._trace = trace
        self._parts = parts

    def written(self) -> Written:
        """The placeholder for it in the template's output."""
        self._trace.num_written += 1
        return Written(self._parts)

    def method(self, name: str) -> Callable[..., object]:
        """A method of the text, by the name that templates know."""
        if name in _STRIPS:
            return lambda *arguments: self._stripped(name, arguments)
        if name in ("startswith", "endswith"):
            return lambda *arguments: self._ask(name, *arguments)
        raise Untraceable

    def strip(self) -> Symbol:
        """Without white space at its ends."""
        return self._stripped("strip", ())

    def _stripped(self, method: str, arguments: tuple[Any, ...]) -> Symbol:
        (ref, *others) = self._parts
        if others or not isinstance(ref, _Ref) or not all(type(each) is str for each in arguments):
            raise Untraceable
        return Symbol(self._trace, (_Ref(ref.index, (*ref.strips, (method, arguments))),))

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


def _parts_of(value: object) -> _Parts:
    if type(value) is Symbol:
        return value._parts
    if type(value) is str:
        return (value,)
    raise Untraceable


def _typed(piece: str) -> tuple[type[str], str]:
    return type(piece), piece


class _Output:
    """What a way through a template gives: pieces, in terms of the texts."""

    def __init__(self, pieces: Sequence[str], kind: type[str]) -> None:
        """`pieces` are those of a trace; what was written of a symbol is to be of type `kind`."""
        self._kind = kind
        self._pieces: list[str | int | _Parts] = []  # a number is a text as it is
        for piece in pieces:
            if not isinstance(piece, Written):
                self._pieces.append(piece)
                continue
            first = piece.parts[0]
            if len(piece.parts) == 1 and isinstance(first, _Ref) and not first.strips:
                self._pieces.append(first.index)
            else:
                self._pieces.append(piece.parts)

    def of(self, texts: Texts) -> list[str]:
        """The pieces for these texts."""
        kind = self._kind
        return [
            kind(texts[piece])
            if type(piece) is int
            else kind(_joined(piece, texts))
            if type(piece) is tuple
            else piece  # type: ignore[misc]
            for piece in self._pieces
        ]


@dataclass(slots=True)
class _Branch:
    """A question, and where its answers lead."""

    question: Question
    next: dict[Hashable, _Branch | _Output] = field(default_factory=dict)


@dataclass(slots=True)
class _Ways:
    """What is known of the ways through a template for one key."""

    root: _Branch | _Output | None = None
    num_ways: int = 0
    num_failures: int = 0

    @property
    def is_given_up(self) -> bool:
        return self.num_failures >= _MAX_FAILURES or self.num_ways >= _MAX_WAYS

    def find(self, texts: Texts) -> _Output | None:
        node = self.root
        while isinstance(node, _Branch):
            node = node.next.get(node.question.answer(texts))
        return node

    def add(self, asked: Sequence[tuple[Question, Hashable]], output: _Output) -> None:
        """Raises Untraceable where the template does not ask the same questions again."""
        self.num_ways += 1
        if not asked:
            if self.root is not None:
                raise Untraceable
            self.root = output
            return
        if self.root is None:
            self.root = _Branch(asked[0][0])
        node = self.root
        for index, (question, answer) in enumerate(asked):
            if not isinstance(node, _Branch) or node.question != question:
                raise Untraceable
            is_last = index == len(asked) - 1
            if is_last and answer in node.next:
                raise Untraceable
            if answer not in node.next:
                node.next[answer] = output if is_last else _Branch(asked[index + 1][0])
            node = node.next[answer]


class TracingEnvironment(Protocol):
    """Where a template's functions find the trace that is under way."""

    trace: Trace | None


class TracedTemplate:
    """A template over texts, run by itself only where its way is not known. For one thread."""

    def __init__(
        self,
        generate: Callable[[Mapping[str, object]], Sequence[str]],
        environment: TracingEnvironment,
        kind: type[str],
    ) -> None:
        """`generate` runs the template, of `environment`, over a context and gives its pieces.

        What is written of a text becomes a piece of type `kind`.
        """
        self.generate = generate
        self._environment = environment
        self._kind = kind
        self._ways: dict[Hashable, _Ways] = {}

    def render(self, key: Hashable, texts: Texts, make_context: MakeContext) -> Sequence[str]:
        """The pieces of the template's output.

        `make_context` puts texts, or what stands for them, where the template looks for them. It
        must be the same for every row with this `key`. Raises what the template raises.
        """
        ways = self._ways.get(key)
        if ways is None:
            if len(self._ways) >= _MAX_KEYS:
                self._ways.clear()
            ways = self._ways[key] = _Ways()
        if ways.is_given_up or sum(map(len, texts)) > MAX_TEXT_CHARS:
            return self.generate(make_context(texts))
        found = ways.find(texts)
        if found is not None:
            return found.of(texts)
        pieces = self.generate(make_context(texts))
        self._learn(ways, texts, make_context, pieces)
        return pieces

    def _learn(
        self, ways: _Ways, texts: Texts, make_context: MakeContext, pieces: Sequence[str]
    ) -> None:
        """Take note of the way that gave these pieces, if it can be traced."""
        trace = Trace(texts)
        self._environment.trace = trace
        try:
            traced = self.generate(make_context(trace.symbols))
            num_seen = sum(type(piece) is Written for piece in traced)
            # What a macro or a block writes is joined to a plain text, which has lost the symbol.
            if num_seen != trace.num_written:
                raise Untraceable
            output = _Output(traced, self._kind)
            if list(map(_typed, output.of(texts))) != list(map(_typed, pieces)):
                raise Untraceable
            ways.add(trace.asked, output)
        except (Untraceable, Exception):
            ways.num_failures += 1
        finally:
            self._environment.trace = None
