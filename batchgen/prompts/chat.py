"""Prompts that are a chat in the model's chat template: `messages` and `messages_column`.

The chat template is the model's, and works on whole texts, so which characters of its output are
the row's is not known. Three things keep the row from writing control tokens (`<|im_end|>`):
1. What the row spells out is replaced by one unused character before the template runs, and put
   back as ordinary tokens after it.
2. The control tokens of the result are counted. How many the template writes for these roles is
   learned, by 3, from the first such chat.
3. A chat with another count (a token that only the template's own text completes, or a template
   that decides by the text) is rendered once more with its data between two unused characters.
   The tokens outside of these are the template's; if the counts still differ, the row fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchgen.errors import UsageError
from batchgen.job.spec import PromptSpec
from batchgen.prompts.chat_template import ChatTemplate
from batchgen.prompts.conversation import Conversation, read_conversation
from batchgen.prompts.row_error import RowError
from batchgen.prompts.special_tokens import ControlTokens, Encoder, unused_characters
from batchgen.prompts.templates import RENDER_ERRORS, Data, TemplateSet, Text
from batchgen.prompts.truncation import longest_fitting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MAX_KNOWN_COUNTS = 4096
# Arguments of transformers' apply_chat_template that are not for the template.
_RESERVED_KWARGS = {
    "conversation", "messages", "chat_template", "tokenize", "sanitize_control_tokens", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Neutralized:
    """A chat with placeholders for the control tokens that the row spelled out."""

    conversation: Conversation
    tokens: Mapping[str, str]  # what each placeholder stands for


class ChatPrompts:
    """Renders rows to chats, and encodes these through the model's chat template."""

    def __init__(self, spec: PromptSpec, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises UsageError where there is no chat template, or it cannot be used."""
        self._tokenizer = tokenizer
        self._column = spec.messages_column
        self._roles = [message.role for message in spec.messages or ()]
        sources = message_sources(spec)
        self._templates = TemplateSet(sources)
        kwargs = {"add_generation_prompt": True, **spec.chat_template_kwargs}
        if reserved := sorted(_RESERVED_KWARGS.intersection(kwargs)):
            raise UsageError(
                f"prompt.chat_template_kwargs may not set {reserved[0]!r}: it is for variables "
                "of the chat template"
            )
        self._chat_template = self._find_chat_template(spec.chat_template)
        self._template = ChatTemplate(
            self._chat_template, {**tokenizer.special_tokens_map, **kwargs}
        )
        self._encoder = Encoder(tokenizer, add_special_tokens=False)
        self._control = ControlTokens(
            tokenizer, "\0".join([self._chat_template, *sources.values()])
        )
        self._mode = spec.special_tokens_in_data
        self._known_counts: set[tuple[object, int]] = set()

    def _find_chat_template(self, override: str | None) -> str:
        if override is None and not self._tokenizer.chat_template:
            raise UsageError(
                "the model has no chat template, and the job has messages; set "
                "prompt.chat_template, or use prompt.template in the place of prompt.messages"
            )
        try:
            return self._tokenizer.get_chat_template(override)
        except ValueError as error:
            raise UsageError(f"the model's chat template cannot be used: {error}") from error

    def draft(self, values: Mapping[str, object]) -> Conversation:
        """The row's chat. Raises RowError."""
        conversation = self._read(values)
        _refuse_empty(conversation)
        if self._column is not None and self._mode != "allow":
            for key in conversation.all_keys():
                if self._control.find_in_data(Text((Data(key),))):
                    raise RowError.for_control_token(key, _excerpt(conversation))
        if self._mode == "error":
            for text in conversation.texts:
                if found := self._control.find_in_data(text):
                    raise RowError.for_control_token(text.plain[slice(*found[0])], text.plain)
        return conversation

    def _read(self, values: Mapping[str, object]) -> Conversation:
        if self._column is not None:
            return read_conversation(values.get(self._column), self._column)
        try:
            texts = self._templates.render(values)
        except RENDER_ERRORS as error:
            raise RowError.for_template(error) from error
        return Conversation(
            tuple(
                {"role": role, "content": text}
                for role, text in zip(self._roles, texts, strict=True)
            )
        )

    def show(self, conversation: Conversation) -> str:
        """The prompt as a person reads it. Raises RowError."""
        text = self._render([conversation.plain()])[0]
        if isinstance(text, RowError):
            raise text
        return text

    def encode(self, conversations: Sequence[Conversation]) -> list[list[int] | RowError]:
        """The ids of each chat, or why it has none."""
        neutralized = [self._neutralize(conversation) for conversation in conversations]
        texts = self._render([item.conversation.plain() for item in neutralized])
        usual = [
            text
            for text, item in zip(texts, neutralized, strict=True)
            if isinstance(text, str) and not item.tokens
        ]
        encoded = iter(self._encoder.encode_prompts(usual, self._control))
        results: list[list[int] | RowError] = []
        for text, item in zip(texts, neutralized, strict=True):
            if isinstance(text, RowError):
                results.append(text)
                continue
            token_ids, count = self._encode_parts(text, item) if item.tokens else next(encoded)
            if self._mode == "allow" or self._is_safe(item, text, count):
                results.append(token_ids)
            else:
                results.append(RowError.for_hidden_control_token(text))
        return results

    def _render(self, conversations: Sequence[list[dict[str, object]]]) -> list[str | RowError]:
        """Each chat in the chat template, or why it does not fit there."""
        return [self._render_one(conversation) for conversation in conversations]

    def _render_one(self, conversation: list[dict[str, object]]) -> str | RowError:
        try:
            return self._template.render(conversation)
        except RENDER_ERRORS as error:
            return RowError.for_template(error)

    def _neutralize(self, conversation: Conversation) -> _Neutralized:
        """The chat with a placeholder for each control token that the row spells out."""
        if self._mode == "allow":
            return _Neutralized(conversation, {})
        tokens = {
            text.plain[start:end]
            for text in conversation.texts
            for start, end in self._control.find_in_data(text)
        }
        if not tokens:
            return _Neutralized(conversation, {})
        taken = "".join([self._chat_template, *(text.plain for text in conversation.texts)])
        placeholders = dict(zip(sorted(tokens), unused_characters(taken), strict=False))

        def replace(text: Text) -> Text:
            plain = text.plain
            return text.replaced(
                [
                    (start, end, placeholders[plain[start:end]])
                    for start, end in self._control.find_in_data(text)
                ]
            )

        return _Neutralized(
            conversation.map_texts(replace),
            {placeholder: token for token, placeholder in placeholders.items()},
        )

    def _encode_parts(self, text: str, item: _Neutralized) -> tuple[list[int], int]:
        """The ids with the row's control tokens as nothing but text, and how many are such."""
        parts = re.split(f"([{''.join(item.tokens)}])", text)
        is_plain = [part in item.tokens for part in parts]
        token_ids = self._encoder.encode_parts(
            [item.tokens.get(part, part) for part in parts], is_plain
        )
        return token_ids, self._control.count(token_ids)

    def _is_safe(self, item: _Neutralized, text: str, count: int) -> bool:
        """Whether every one of the `count` control tokens is the template's own."""
        known = (item.conversation.structure, count)
        if count == 0 or known in self._known_counts:
            return True
        if self._count_outside_data(item.conversation, text) != count:
            return False
        if len(self._known_counts) >= _MAX_KNOWN_COUNTS:
            self._known_counts.clear()
        self._known_counts.add(known)
        return True

    def _count_outside_data(self, conversation: Conversation, text: str) -> int | None:
        """How many control tokens the template writes; None if that cannot be told."""
        free = unused_characters(text + "".join(text.plain for text in conversation.texts))
        start, end = next(free), next(free)
        marked = self._render(
            [conversation.written(lambda text: text.map_data(_wrapped(start, end)).plain)]
        )[0]
        if isinstance(marked, RowError) or re.sub(f"[{start}{end}]", "", marked) != text:
            return None
        outside = re.split(f"{start}[^{start}{end}]*{end}", marked)
        if any(start in part or end in part for part in outside):
            return None
        return sum(map(self._control.count, self._encoder.encode_batch(outside)))

    def shorten(
        self, conversation: Conversation, token_ids: list[int], max_tokens: int, *, keep_end: bool
    ) -> list[int] | RowError:
        """The ids after cutting the longest value of the row in the last user message.

        The template's frame and the job's own words stay whole.
        """
        values = [(text, piece) for text in conversation.user_texts() for piece in text.data]
        too_long = RowError.too_long(len(token_ids), max_tokens, _excerpt(conversation))
        if not values:
            return too_long
        target, longest = max(values, key=lambda value: len(value[1]))
        offsets = self._encoder.offsets(longest)

        def encode_with(num_kept: int) -> list[int] | RowError:
            kept = (
                longest[offsets[-num_kept][0] :]
                if keep_end
                else longest[: offsets[num_kept - 1][1]]
            )
            shorter = target.map_data(lambda piece: kept if piece is longest else piece)
            return self.encode(
                [conversation.map_texts(lambda text: shorter if text is target else text)]
            )[0]

        fitting = longest_fitting(encode_with, len(offsets), len(token_ids), max_tokens)
        return too_long if fitting is None else fitting


def message_sources(spec: PromptSpec) -> dict[str, str]:
    """The templates of `prompt.messages`, by where they stand in the job file."""
    return {
        f"prompt.messages[{index}].content": message.content
        for index, message in enumerate(spec.messages or ())
    }


def _refuse_empty(conversation: Conversation) -> None:
    data = [piece for text in conversation.texts for piece in text.data]
    if data and not any(piece.strip() for piece in data):
        raise RowError(
            "empty_prompt",
            "everything that the row puts into the prompt is blank",
            _excerpt(conversation),
        )
    if not any(text.plain.strip() for text in conversation.user_texts()):
        raise RowError("empty_prompt", "the last user message is blank")


def _excerpt(conversation: Conversation) -> str:
    return "\n".join(text.plain for text in conversation.texts)


def _wrapped(start: str, end: str) -> Callable[[Data], str]:
    """Puts data between two characters, but for the whitespace around it: templates trim."""

    def wrap(piece: Data) -> str:
        core = piece.strip()
        if not core:
            return piece
        before, after = piece.split(core, 1)
        return f"{before}{start}{core}{end}{after}"

    return wrap
