"""Input rows in, prompts for the engine out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from batchgen.errors import UsageError
from batchgen.job.spec import PromptSpec, SamplingSpec
from batchgen.prompts.chat import ChatPrompts
from batchgen.prompts.raw import RawPrompts
from batchgen.prompts.row_error import RowError
from batchgen.records import InputRow, Prompt, RowFailure, row_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DraftT = TypeVar("DraftT")


class _PromptKind(Protocol[DraftT]):
    """Chats or raw texts. A draft is a prompt before the model's templates and tokens."""

    def draft(self, values: Mapping[str, object]) -> DraftT: ...

    def show(self, draft: DraftT, /) -> str: ...

    def encode(self, drafts: Sequence[DraftT], /) -> list[list[int] | RowError]: ...

    def shorten(
        self, draft: DraftT, token_ids: list[int], max_tokens: int, /, *, keep_end: bool
    ) -> list[int] | RowError: ...


class PromptBuilder:
    """Makes prompts of rows, as a job's `prompt` section says. For one thread."""

    def __init__(
        self,
        spec: PromptSpec,
        sampling: SamplingSpec,
        tokenizer: PreTrainedTokenizerFast,
        max_model_len: int,
    ) -> None:
        """`max_model_len` is the most tokens of a prompt and its output together.

        Raises UsageError where a template cannot be compiled or the model has no chat template.
        """
        self._seed, self._samples = sampling.seed, range(sampling.n)
        self._max_tokens, self._ignore_eos = sampling.max_tokens, sampling.ignore_eos
        self._overflow = spec.overflow
        self._max_model_len = max_model_len
        # The shortest output that the job allows must have room.
        most = max_model_len - max(1, sampling.min_tokens)
        self._max_prompt_tokens = min(spec.max_prompt_tokens or most, most)
        # A prompt that is cut anyway is cut so far that the output is not, if that is possible.
        room = max_model_len - min(sampling.max_tokens, max_model_len // 2)
        self._truncated_tokens = min(self._max_prompt_tokens, room)
        is_chat = spec.messages is not None or spec.messages_column is not None
        self._prompts: _PromptKind[Any] = (
            ChatPrompts(spec, tokenizer) if is_chat else RawPrompts(spec, tokenizer)
        )

    def build(self, rows: Sequence[InputRow]) -> list[Prompt | RowFailure]:
        """One result for each row, in order. Tokenizes all rows in one call.

        Raises UsageError for a prompt that is too long where `prompt.overflow` is fail.
        """
        drafts = [self._draft(row) for row in rows]
        encoded = iter(
            self._prompts.encode([draft for draft in drafts if not isinstance(draft, RowFailure)])
        )
        return [
            draft if isinstance(draft, RowFailure) else self._finish(row, draft, next(encoded))
            for row, draft in zip(rows, drafts, strict=True)
        ]

    def show(self, row: InputRow) -> str | RowFailure:
        """The row's whole prompt as text, before anything is cut, for people."""
        try:
            return self._prompts.show(self._prompts.draft(row.values))
        except RowError as error:
            return error.failure(row)

    def _draft(self, row: InputRow) -> Any | RowFailure:
        try:
            return self._prompts.draft(row.values)
        except RowError as error:
            return error.failure(row)

    def _finish(
        self, row: InputRow, draft: object, token_ids: list[int] | RowError
    ) -> Prompt | RowFailure:
        if not isinstance(token_ids, RowError) and len(token_ids) > self._max_prompt_tokens:
            token_ids = self._fit(row, draft, token_ids)
        if isinstance(token_ids, RowError):
            return token_ids.failure(row)
        if not token_ids:
            return RowError("empty_prompt", "the prompt has no tokens").failure(row)
        return Prompt(
            key=row.key,
            token_ids=token_ids,
            max_tokens=min(self._max_tokens, self._max_model_len - len(token_ids)),
            seeds=tuple([row_seed(self._seed, row.address, i) for i in self._samples]),
            ignore_eos=self._ignore_eos,
        )

    def _fit(self, row: InputRow, draft: object, token_ids: list[int]) -> list[int] | RowError:
        if self._overflow in ("truncate_start", "truncate_end"):
            keep_end = self._overflow == "truncate_start"
            return self._prompts.shorten(
                draft, token_ids, self._truncated_tokens, keep_end=keep_end
            )
        too_long = RowError.too_long(
            len(token_ids), self._max_prompt_tokens, self._prompts.show(draft)
        )
        if self._overflow == "fail":
            raise UsageError(f"{row.address}: {too_long.message}")
        return too_long
