"""The order in which the prompts of a planning window are admitted. No torch.

Prompts that begin alike come together, so that a shared prefix is computed once and is still
there for the next; within a group the longest come first, so that long rows do not end the run.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar


class Planned(Protocol):
    """What the plan needs to know of a prompt."""

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def group_key(self) -> Hashable: ...


PlannedT = TypeVar("PlannedT", bound=Planned)


def order_window(window: Sequence[PlannedT]) -> list[PlannedT]:
    """Groups by first full block, longest first within one; groups by their longest, too.

    So the rows that are expected to take longest do not start last.
    """
    longest: dict[Hashable, int] = {}
    arrival: dict[Hashable, int] = {}
    for item in window:
        key = item.group_key
        longest[key] = max(longest.get(key, 0), _length(item))
        arrival.setdefault(key, len(arrival))

    def rank(item: PlannedT) -> tuple[int, int, int]:
        return -longest[item.group_key], arrival[item.group_key], -_length(item)

    return sorted(window, key=rank)


def _length(item: Planned) -> int:
    """Tokens that it may come to."""
    return item.num_prompt_tokens + item.max_tokens
