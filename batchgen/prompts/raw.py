"""Prompts that are a text as it stands: `prompt.template` and `prompt.prompt_column`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from batchgen.job.spec import PromptSpec
from batchgen.prompts.row_error import RowError
from batchgen.prompts.special_tokens import ControlTokens, Encoder
from batchgen.prompts.templates import RENDER_ERRORS, Data, TemplateSet, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MAX_KNOWN_FRAMES = 1024


class RawPrompts:
    """Renders rows to texts, and encodes these with the model's own start token."""

    def __init__(self, spec: PromptSpec, tokenizer: PreTrainedTokenizerFast) -> None:
        self._column = spec.prompt_column
        source = spec.template or ""
        self._templates = TemplateSet({"prompt.template": source})
        self._encoder = Encoder(tokenizer, add_special_tokens=True)
        self._control = ControlTokens(tokenizer, source)
        self._mode = spec.special_tokens_in_data
        self._known_counts: dict[tuple[str, ...], int] = {}

    def draft(self, values: Mapping[str, object]) -> Text:
        """The row's text. Raises RowError."""
        text = self._render(values)
        data = text.data
        if not text.plain.strip() or (data and not any(piece.strip() for piece in data)):
            raise RowError("empty_prompt", "everything that the row puts into the prompt is blank")
        if self._mode == "error" and (found := self._control.find_in_data(text)):
            raise RowError.for_control_token(text.plain[slice(*found[0])], text.plain)
        return text

    def _render(self, values: Mapping[str, object]) -> Text:
        if self._column is None:
            try:
                return self._templates.render(values)[0]
            except RENDER_ERRORS as error:
                raise RowError.for_template(error) from error
        value = values.get(self._column)
        if not isinstance(value, str):
            what = "null" if value is None else f"a {type(value).__name__}, not a text"
            raise RowError("template_error", f"column {self._column!r} is {what}")
        return Text((Data(value),))

    def show(self, text: Text) -> str:
        """The prompt as a person reads it."""
        return text.plain

    def encode(self, texts: Sequence[Text]) -> list[list[int] | RowError]:
        """The ids of each text, or why it has none."""
        is_allowed = self._mode == "allow"
        found = [[] if is_allowed else self._control.find_in_data(text) for text in texts]
        usual = iter(
            self._encoder.encode_prompts(
                [text.plain for text, ranges in zip(texts, found, strict=True) if not ranges],
                self._control,
            )
        )
        results: list[list[int] | RowError] = []
        for text, ranges in zip(texts, found, strict=True):
            token_ids, count = self._neutralized(text.plain, ranges) if ranges else next(usual)
            if is_allowed or count == self._own_count(text):
                results.append(token_ids)
            else:
                results.append(RowError.for_hidden_control_token(text.plain))
        return results

    def _neutralized(self, plain: str, ranges: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
        """The ids with the ranges as nothing but text, and how many are control tokens."""
        parts = []
        end = 0
        for start, stop in ranges:
            parts += [plain[end:start], plain[start:stop]]
            end = stop
        parts.append(plain[end:])
        token_ids = self._encoder.encode_parts(parts, [bool(i % 2) for i in range(len(parts))])
        return token_ids, self._control.count(token_ids)

    def _own_count(self, text: Text) -> int:
        """How many control tokens the template and the model's frame put in by themselves."""
        frame = tuple(piece for piece in text.pieces if not isinstance(piece, Data))
        if frame not in self._known_counts:
            if len(self._known_counts) >= _MAX_KNOWN_FRAMES:
                self._known_counts.clear()
            token_ids = self._encoder.encode_parts(frame, [False] * len(frame))
            self._known_counts[frame] = self._control.count(token_ids)
        return self._known_counts[frame]

    def shorten(
        self, text: Text, token_ids: list[int], max_tokens: int, *, keep_end: bool
    ) -> list[int] | RowError:
        """At most `max_tokens` of the ids; the model's own start and end stay."""
        start, end = len(self._encoder.prefix), len(token_ids) - len(self._encoder.suffix)
        room = max_tokens - len(self._encoder.prefix) - len(self._encoder.suffix)
        if room <= 0:
            return RowError.too_long(len(token_ids), max_tokens, text.plain)
        body = token_ids[start:end]
        body = body[-room:] if keep_end else body[:room]
        return [*self._encoder.prefix, *body, *self._encoder.suffix]
