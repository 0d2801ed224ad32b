"""What is wrong with a job, in the words of its file: keys by their path, values as typed.

Nothing below `storage_options` is ever quoted, for it may be a secret; nor is an unknown key's
value, for the key may be `storage_options` with a letter missing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from batchgen.job.base import Section
from batchgen.job.spec import JobSpec
from batchgen.job.yaml_tree import KeyPath
from batchgen.redaction import redact

_SECRET_KEY = "storage_options"
_MAX_QUOTED_CHARS = 60
_SCALARS = (bool, int, float)

# pydantic speaks of Python's types; a job file has YAML's.
_TEXTS = {
    "missing": "is required",
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "tuple_type": "should be a list",
    "string_type": "should be text",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "too_short": "should not be empty",
    "string_too_short": "should not be empty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with the value at `path`. The text reads on after the key and a colon."""

    path: KeyPath
    text: str


def spec_problems(error: ValidationError, values: object) -> list[Problem]:
    """The problems that pydantic found in `values`, one for each path.

    A value that fits no member of a union has an error for each of them: they become one
    sentence, or give way to the errors of the list items inside.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_path.setdefault(_path_in(values, details), []).append(details)
    return [
        _problem(path, details)
        for path, details in by_path.items()
        if not any(len(path) < len(other) and other[: len(path)] == path for other in by_path)
    ]


def describe_value(value: object) -> str:
    """The value as a person would type it in YAML, shortened; of a container only its kind."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict() | Section():
            return "a mapping"
        case list() | tuple():
            return "a list"
    text = repr(redact(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]}..."


def nearest_text(word: str, words: Sequence[str]) -> str:
    """Which of `words` was meant, or what there is."""
    if not words:
        return "there are none"
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(words)}"


def job_keys(section: type[Section] = JobSpec, prefix: str = "") -> Iterator[str]:
    """Every key of the job file as `a.b.c`, sections before what they hold."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        inner = _section_in(field.annotation)
        if inner is not None:
            yield from job_keys(inner, f"{prefix}{name}.")


def _problem(path: KeyPath, errors: Sequence[ErrorDetails]) -> Problem:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return Problem(path=path, text=f"unknown key; {_nearest_key(path)}")
    texts = [_error_text(details) for details in errors]
    text = " or ".join([texts[0], *(text.removeprefix("should be ") for text in texts[1:])])
    value = first["input"]
    if first["type"] == "missing" or _SECRET_KEY in path or isinstance(value, Section):
        return Problem(path=path, text=text)
    if first["type"] == "value_error" and isinstance(value, dict):  # the text has the values
        return Problem(path=path, text=text)
    hint = ""
    if errors[-1]["type"] == "string_type" and isinstance(value, _SCALARS):
        hint = "; put it in quotes"
    return Problem(path=path, text=f"{text} (got {describe_value(value)}){hint}")


def _error_text(details: ErrorDetails) -> str:
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    text = _TEXTS.get(details["type"])
    return text or re.sub(r"^(Input|String) should", "should", details["msg"])


def _path_in(values: Any, details: ErrorDetails) -> KeyPath:
    """The error's place in the file: pydantic's own, less the names of union members."""
    path: list[str | int] = []
    for part in details["loc"]:
        inside = part in values if isinstance(values, dict) else isinstance(part, int)
        if inside:
            values = values[part]
        if inside or (details["type"] == "missing" and part == details["loc"][-1]):
            path.append(part)
    return tuple(path)


def _nearest_key(path: KeyPath) -> str:
    """The valid key that an unknown one is likest to: beside it, or else anywhere in the file."""
    key = str(path[-1])
    section: type[Section] = JobSpec
    for part in path[:-1]:
        if isinstance(part, str):
            section = _section_in(section.model_fields[part].annotation) or section
    beside = difflib.get_close_matches(key, section.model_fields, n=1)
    if beside:
        return f"did you mean {beside[0]!r}?"
    elsewhere = [name for name in job_keys() if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    nearest = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.0)
    return f"the nearest valid key is {nearest[0]!r}"


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, be it optional or in a list; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (_section_in(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)
