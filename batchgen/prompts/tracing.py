"""What a template makes of its texts, learned from examples and not computed anew for each row.

Most of what a template does is the same for every row. So it is run once with `Symbol`s in the
place of texts. A symbol may be written, joined, stripped, and asked some questions, which this
row's text answers; the questions and answers are noted, and so are the pieces that come out, in
terms of the texts, and how much of the budget they take. For a row whose texts answer alike the
template would do the same, so its pieces are put together without it. Whatever else is asked of a
symbol ends the trace, and the template is run for every such row.

This is concolic execution (Sen, Marinov, Agha: CUTE, 2005) used as tracing compilers do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from batchgen.prompts.symbols import (
    MAX_TEXT_CHARS,
    Parts,
    Question,
    Ref,
    SpentBudget,
    Texts,
    Trace,
    Untraceable,
    Written,
    joined,
)

_MAX_WAYS = 256  # through a template, of one key; with more, it decides by the text
_MAX_KEYS = 1024
_MAX_WAYS_IN_ALL = 8192
_MAX_FAILURES = 8  # rows whose trace ended, of one key

MakeContext = Callable[[Sequence[Any]], Mapping[str, object]]


def _typed(piece: str) -> tuple[type[str], str]:
    return type(piece), piece


class _Output:
    """What a way through a template gives: pieces, in terms of the texts."""

    def __init__(self, pieces: Sequence[str], kind: type[str], max_chars: int) -> None:
        """`pieces` are those of a trace; what was written of a symbol is to be of type `kind`.

        `max_chars` is the most that the texts may have together.
        """
        self.max_chars = max_chars
        self._kind = kind
        self._pieces: list[str | int | Parts] = []  # a number is a text as it is
        for piece in pieces:
            if not isinstance(piece, Written):
                self._pieces.append(piece)
                continue
            first = piece.parts[0]
            if len(piece.parts) == 1 and isinstance(first, Ref) and not first.strips:
                self._pieces.append(first.index)
            else:
                self._pieces.append(piece.parts)

    def of(self, texts: Texts) -> list[str]:
        """The pieces for these texts."""
        kind = self._kind
        return [
            kind(texts[piece])
            if type(piece) is int
            else kind(joined(piece, texts))
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

    @property
    def budget(self) -> SpentBudget: ...


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
        self._num_ways = 0

    def render(self, key: Hashable, texts: Texts, make_context: MakeContext) -> Sequence[str]:
        """The pieces of the template's output.

        `make_context` puts texts, or what stands for them, where the template looks for them. It
        must be the same for every row with this `key`. Raises what the template raises.
        """
        ways = self._ways.get(key)
        if ways is None:
            if len(self._ways) >= _MAX_KEYS or self._num_ways >= _MAX_WAYS_IN_ALL:
                self._ways.clear()
                self._num_ways = 0
            ways = self._ways[key] = _Ways()
        num_chars = sum(map(len, texts))
        if ways.is_given_up or num_chars > MAX_TEXT_CHARS:
            return self.generate(make_context(texts))
        found = ways.find(texts)
        if found is not None:
            is_within = num_chars <= found.max_chars
            return found.of(texts) if is_within else self.generate(make_context(texts))
        pieces = self.generate(make_context(texts))
        self._learn(ways, texts, make_context, pieces)
        return pieces

    def _learn(
        self, ways: _Ways, texts: Texts, make_context: MakeContext, pieces: Sequence[str]
    ) -> None:
        """Take note of the way that gave these pieces, if it can be traced."""
        try:
            trace = self._environment.trace = Trace(texts)
            traced = self.generate(make_context(trace.symbols))
            num_seen = sum(type(piece) is Written for piece in traced)
            # What was written and then joined to a plain text has lost the symbol.
            if num_seen != trace.num_written:
                raise Untraceable
            output = _Output(traced, self._kind, trace.max_chars(self._environment.budget))
            if list(map(_typed, output.of(texts))) != list(map(_typed, pieces)):
                raise Untraceable
            ways.add(trace.asked, output)
            self._num_ways += 1
        except (Untraceable, Exception):
            ways.num_failures += 1
        finally:
            self._environment.trace = None
