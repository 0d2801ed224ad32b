"""What one rendering of a template may spend: steps, characters, and time of its thread.

Steps and characters are counted, so that a row fails or succeeds alike on any machine. The time is
for what they do not see (many searches of long texts, say), and is the thread's own: a machine
that stalls fails no row. It is looked at between steps, so it works in any thread.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Final

import jinja2

from batchgen.prompts.symbols import Symbol

MAX_STEPS: Final = 4_000_000
MAX_CHARS: Final = 1 << 27
MAX_SECONDS: Final = 10.0
_MAX_INT_BITS: Final = 1 << 16
_MAX_DEPTH: Final = 200
_MAX_WIDTH: Final = 1_000_000  # of padding, in characters
_STEPS_PER_LOOK: Final = 256  # at the clock
_NODES_PER_STEP: Final = 4
# A width or precision in a format, such as '%999999999d' or '{:>999999999}'.
_LONG_NUMBER: Final = re.compile(r"\d{6,}")
_TEXTS: Final = (str, bytes)
_CONTAINERS: Final = (list, tuple, Mapping)
_STARRED_FORMAT: Final = re.compile(r"%[^a-zA-Z%]*\*")


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template would take more than a rendering may spend."""


class Budget:
    """The limits of one rendering after another. For one thread at a time."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a rendering with all there is."""
        self._steps = _STEPS_PER_LOOK  # until the next look at the clock
        self._looks = 0
        self._ends_s = 0.0
        self._chars = MAX_CHARS

    @property
    def steps_left(self) -> int:
        """Steps that the rendering can still take, or a few more."""
        return MAX_STEPS - (self._looks + 1) * _STEPS_PER_LOOK + self._steps

    @property
    def chars_left(self) -> int:
        """Characters that the rendering can still make."""
        return self._chars

    def step(self, cost: int = 1) -> None:
        """Pay for work of about `cost` operations. Raises TemplateLimitError."""
        self._steps -= cost
        if self._steps < 0:
            self._look()

    def _look(self) -> None:
        now_s = time.thread_time()
        if self._looks == 0:
            self._ends_s = now_s + MAX_SECONDS
        looks = -(self._steps // _STEPS_PER_LOOK)
        self._looks += looks
        self._steps += looks * _STEPS_PER_LOOK
        if self._looks * _STEPS_PER_LOOK > MAX_STEPS:
            raise TemplateLimitError(
                f"the template takes more than {MAX_STEPS:,} steps over this row"
            )
        if now_s > self._ends_s:
            raise TemplateLimitError(
                f"the template takes more than {MAX_SECONDS:g} s over this row"
            )

    def chars(self, count: int) -> None:
        """Pay for `count` characters, best before they are made. Raises TemplateLimitError."""
        self._chars -= count
        if self._chars < 0:
            raise TemplateLimitError(
                f"the template makes more than {MAX_CHARS:,} characters of this row"
            )

    def result(self, value: object) -> None:
        """Pay for a value that was just made."""
        if isinstance(value, _TEXTS):
            self.chars(len(value))
        elif value is None or value is True or value is False:
            return
        elif isinstance(value, int):
            self._bits(value.bit_length())
        elif isinstance(value, _CONTAINERS):
            self.chars(len(value))
            self.tree(value)
        elif type(value) is Symbol:
            value.pay()

    def tree(self, value: object) -> tuple[int, int]:
        """How large the value is when written out, and how deep.

        Every container is measured when it is made. One that holds another twice, which holds
        another twice, and so on, would take forever to compare or to write.
        """
        size, nodes, depth = 0, 0, 0
        stack: list[tuple[object, int]] = [(value, 0)]
        while stack:
            node, level = stack.pop()
            depth = max(depth, level)
            nodes += 1
            if isinstance(node, _TEXTS):
                size += len(node)
            elif isinstance(node, Mapping):
                stack += [(each, level + 1) for pair in node.items() for each in pair]
            elif isinstance(node, list | tuple):
                stack += [(each, level + 1) for each in node]
            elif type(node) is Symbol:
                node.pay()
            if nodes % _NODES_PER_STEP == 0:
                self.step()
            if size + nodes > MAX_CHARS or depth > _MAX_DEPTH:
                raise TemplateLimitError("the template makes a list or mapping that is too large")
        return size + nodes, depth

    def repeated(self, value: object, times: object) -> None:
        """Check `value * times` before it is computed."""
        for item, count in ((value, times), (times, value)):
            if not isinstance(count, int):
                continue
            if isinstance(item, int):
                self._bits(item.bit_length() + count.bit_length())
            elif isinstance(item, Sequence):
                self.chars(len(item) * max(count, 0))

    def power(self, base: object, exponent: object) -> None:
        """Check `base ** exponent` before it is computed."""
        if isinstance(base, int) and isinstance(exponent, int):
            self._bits(base.bit_length() * max(exponent, 1))

    def width(self, *widths: object) -> None:
        """Check the widths that something is padded to."""
        for width in widths:
            if isinstance(width, int) and width > _MAX_WIDTH:
                raise TemplateLimitError(f"a width of {width} is more than {_MAX_WIDTH:,}")

    def format(self, text: str) -> None:
        """Check the widths in a format."""
        if _LONG_NUMBER.search(text) or _STARRED_FORMAT.search(text):
            raise TemplateLimitError("a format has a width that is too large, or is not written")

    def replaced(self, text: object, old: object, new: object) -> None:
        """Check `text.replace(old, new)` before it is computed."""
        if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
            self.chars((len(text) // max(len(old), 1) + 1) * len(new))

    def _bits(self, bits: int) -> None:
        if bits > _MAX_INT_BITS:
            raise TemplateLimitError(f"a number has more than {_MAX_INT_BITS:,} bits")
