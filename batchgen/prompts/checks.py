"""What can be wrong with a job's prompt before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

from batchgen.errors import UsageError
from batchgen.job.spec import PromptSpec
from batchgen.prompts.chat import message_sources
from batchgen.prompts.templates import TemplateSet
from batchgen.records import InputRow


def check_columns(prompt: PromptSpec, names: Collection[str]) -> None:
    """Raises UsageError for a column that the prompt uses and the input does not have."""
    for where, column in sorted(_used_columns(prompt)):
        if column in names:
            continue
        near = get_close_matches(column, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"{where} uses column {column!r}, which the input does not have; {hint}"
            f"its columns are {', '.join(names) or 'none'}"
        )


def check_first_row(prompt: PromptSpec, row: InputRow) -> None:
    """Raises UsageError where the sandbox refuses a template. Other errors are the row's own."""
    TemplateSet(_sources(prompt)).check(row.values)


def _sources(prompt: PromptSpec) -> dict[str, str]:
    if prompt.template is not None:
        return {"prompt.template": prompt.template}
    return message_sources(prompt)


def _used_columns(prompt: PromptSpec) -> set[tuple[str, str]]:
    """Where a column is used, and its name."""
    if prompt.messages_column is not None:
        return {("prompt.messages_column", prompt.messages_column)}
    if prompt.prompt_column is not None:
        return {("prompt.prompt_column", prompt.prompt_column)}
    return {
        (where, column)
        for where, source in _sources(prompt).items()
        for column in TemplateSet({where: source}).columns
    }
