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
    groups: dict[Hashable, list[PlannedT]] = {}
    for item in window:
        groups.setdefault(item.group_key, []).append(item)
    for members in groups.values():
        members.sort(key=_length, reverse=True)
    ordered = sorted(groups.values(), key=lambda members: _length(members[0]), reverse=True)
    return [item for members in ordered for item in members]


def _length(item: Planned) -> int:
    """Tokens that it may come to."""
    return item.num_prompt_tokens + item.max_tokens
