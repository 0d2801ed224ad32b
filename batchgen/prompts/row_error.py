"""Why a row has no prompt."""

from __future__ import annotations

from typing import Self

from batchgen.records import FailureKind, InputRow, RowFailure

_EXCERPT_CHARS = 200


class RowError(Exception):
    """One row cannot become a prompt. Never leaves this room: it becomes a `RowFailure`."""

    def __init__(self, kind: FailureKind, message: str, prompt: str = "") -> None:
        """`prompt` is as much of the prompt as there is."""
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.excerpt = prompt[:_EXCERPT_CHARS]

    @classmethod
    def for_template(cls, error: Exception) -> Self:
        """For what a template raised over the row's values."""
        return cls("template_error", f"{type(error).__name__}: {error}")

    @classmethod
    def for_control_token(cls, token: str, prompt: str) -> Self:
        return cls(
            "template_error",
            f"the row holds the model's special token {token!r}, and "
            "prompt.special_tokens_in_data is error",
            prompt,
        )

    @classmethod
    def for_hidden_control_token(cls, prompt: str) -> Self:
        return cls(
            "template_error",
            "the row's text becomes a special token of the model together with the template; "
            "take it out of the row, or set prompt.special_tokens_in_data to allow",
            prompt,
        )

    @classmethod
    def too_long(cls, num_tokens: int, max_tokens: int, prompt: str) -> Self:
        return cls(
            "too_long",
            f"the prompt has {num_tokens} tokens, at most {max_tokens} are possible; "
            "raise prompt.max_prompt_tokens or model.max_model_len, or set prompt.overflow "
            "to truncate_start or truncate_end",
            prompt,
        )

    def failure(self, row: InputRow) -> RowFailure:
        return RowFailure(
            key=row.key,
            address=row.address,
            kind=self.kind,
            message=self.message,
            excerpt=self.excerpt,
        )
