"""A chat whose texts know which of their characters come from the row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from batchgen.prompts.row_error import RowError
from batchgen.prompts.templates import Data, Text

# In a column of chats the roles are data too, and some chat templates write
# '<|' + role + '|>': a role is one of these or the row fails.
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")
_TYPES = ("text", "function")
_MAX_DEPTH = 64


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, but with a `Text` for each string but the role."""

    messages: tuple[Mapping[str, object], ...]

    @property
    def structure(self) -> tuple[tuple[object, ...], ...]:
        """What of a chat decides which control tokens a template writes: roles, and keys."""
        return tuple((message["role"], *message) for message in self.messages)

    def plain(self) -> list[dict[str, object]]:
        """The messages with plain strings."""
        return self.written(lambda text: text.plain)

    def written(self, write: Callable[[Text], str]) -> list[dict[str, object]]:
        """The messages with each text as `write` gives it."""
        return [
            {
                key: write(item) if type(item) is Text else _map_texts(item, write)
                for key, item in message.items()
            }
            for message in self.messages
        ]

    def map_texts(self, change: Callable[[Text], Text]) -> Conversation:
        messages = []
        for message in self.messages:
            changed = _map_texts(message, change)
            assert isinstance(changed, dict)
            messages.append(changed)
        return Conversation(tuple(messages))

    @cached_property
    def texts(self) -> list[Text]:
        """Every text, in order."""
        return _texts(self.messages)

    def all_keys(self) -> Iterator[str]:
        """Every name within the messages: of tool arguments, say."""
        for message in self.messages:
            yield from _keys(message)

    def user_texts(self) -> list[Text]:
        """The texts of the last user message, or of all messages where there is none."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                return _texts((message,))
        return self.texts


def _map_texts(value: object, change: Callable[[Text], object]) -> object:
    if isinstance(value, Text):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return value


def _texts(values: Iterable[object]) -> list[Text]:
    found: list[Text] = []
    for value in values:
        if isinstance(value, Text):
            found.append(value)
        elif isinstance(value, dict):
            found += _texts(value.values())
        elif isinstance(value, list):
            found += _texts(value)
    return found


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def read_conversation(value: object, column: str) -> Conversation:
    """The chat that a column holds, as a list of messages or as JSON. Raises RowError."""
    if isinstance(value, str):
        text = value
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError(
                "template_error", f"column {column!r} is text that is not JSON: {error}", text
            ) from error
    if not isinstance(value, list) or not value:
        what = "null" if value is None else "no list of messages"
        raise RowError("template_error", f"column {column!r} is {what}")
    return Conversation(tuple(_read_message(message, index) for index, message in enumerate(value)))


def _read_message(message: object, index: int) -> Mapping[str, object]:
    if not isinstance(message, dict):
        raise RowError("template_error", f"message {index} is not an object of role and content")
    # Columns of structs have every key in every message, null where it is not meant.
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if role not in _ROLES:
        raise RowError(
            "template_error", f"message {index} has the role {role!r}, not one of {list(_ROLES)}"
        )
    if "content" not in given and "tool_calls" not in given:
        raise RowError("template_error", f"message {index} has no content")
    return {
        key: value if key == "role" else _as_texts(value, key, _MAX_DEPTH)
        for key, value in given.items()
    }


def _as_texts(value: object, name: str, levels_left: int) -> object:
    if levels_left == 0:
        raise RowError(
            "template_error", f"a message is nested deeper than {_MAX_DEPTH} levels, at {name!r}"
        )
    if isinstance(value, str):
        # What chat templates compare with is no text; anything else is.
        return value if name == "type" and value in _TYPES else Text((Data(value),))
    if isinstance(value, dict):
        return {key: _as_texts(item, key, levels_left - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_texts(item, name, levels_left - 1) for item in value]
    return value
