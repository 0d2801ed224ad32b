"""Keeps the tokenizer's control tokens out of reach of row data.

A control token is a special token of the tokenizer, or another added token that the templates
write (such as `<think>`). Only the templates' own text may become one; the same characters in a
row are encoded as ordinary tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from batchgen.prompts.shared_head import SharedHead
from batchgen.prompts.templates import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ControlTokens:
    """The control tokens of a tokenizer beside the templates it is used with."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template_text: str) -> None:
        """`template_text` is the source of every template in use."""
        contents = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if not token.content.isspace() and (token.special or token.content in template_text)
        }
        self._ids = frozenset(contents)
        # A token goes before those that it begins with.
        longest_first = sorted(contents.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def count(self, token_ids: Sequence[int]) -> int:
        """How many of the ids are control tokens."""
        return sum(token_ids.count(token_id) for token_id in self._ids.intersection(token_ids))

    def find_in_data(self, text: Text) -> list[tuple[int, int]]:
        """The ranges of `text.plain` that spell a control token with characters of the row."""
        plain = text.plain
        if self._pattern.search(plain) is None:
            return []
        matches = [match.span() for match in self._pattern.finditer(plain)]
        data = text.data_spans()
        return [
            (start, end)
            for start, end in matches
            if any(start < data_end and data_start < end for data_start, data_end in data)
        ]


def unused_characters(text: str) -> Iterator[str]:
    """Characters that mean nothing in Unicode and do not occur in `text`: noncharacters first."""
    for code in chain(range(0xFDD0, 0xFDF0), range(0x100000, 0x10FFFE)):
        if chr(code) not in text:
            yield chr(code)


class Encoder:
    """Text to token ids, with the power to encode parts of a text as nothing but text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, add_special_tokens: bool) -> None:
        """`add_special_tokens` adds the model's own start (and end), as completions have them."""
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may ask for these; they would cut or fill prompts in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        self._add_special_tokens = add_special_tokens
        self._newline = self._encode("\n")
        self.prefix, self.suffix = self._frame()
        self._head = SharedHead(self._backend)

    def _frame(self) -> tuple[list[int], list[int]]:
        """What `add_special_tokens` puts before and after a text."""
        if not self._add_special_tokens:
            return [], []
        framed = self._backend.encode("a", add_special_tokens=True)
        own = [index for index, mask in enumerate(framed.special_tokens_mask) if not mask]
        return framed.ids[: own[0]], framed.ids[own[-1] + 1 :]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. Lets other threads run meanwhile."""
        return [[*self.prefix, *ids, *self.suffix] for ids in self._encode_all(texts)]

    def encode_prompts(
        self, texts: Sequence[str], control: ControlTokens
    ) -> list[tuple[list[int], int]]:
        """The ids of each text, and how many of them are control tokens.

        What many texts begin with is encoded and counted once.
        """
        encoded = self._head.encode(texts, self._encode_all)
        in_head = control.count(self._head.ids)
        in_frame = control.count(self.prefix) + control.count(self.suffix)
        return [
            (
                [*self.prefix, *head, *rest, *self.suffix],
                (in_head if head else 0) + control.count(rest) + in_frame,
            )
            for head, rest in encoded
        ]

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_parts(self, parts: Sequence[str], is_plain: Sequence[bool]) -> list[int]:
        """The ids of the joined parts, where no part merges with another.

        A part that `is_plain` is encoded as if the tokenizer had no added tokens at all.
        """
        token_ids = list(self.prefix)
        is_first = True
        for part, plain in zip(parts, is_plain, strict=True):
            if not part:
                continue
            encode = self._encode_plain if plain else self._encode
            token_ids += encode(part) if is_first else self._without_prefix_space(encode, part)
            is_first = False
        return token_ids + self.suffix

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of the text begins and ends, in characters."""
        offsets: list[tuple[int, int]] = self._backend.encode(
            text, add_special_tokens=False
        ).offsets
        return offsets

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        # split_special_tokens would still match added tokens that are not special, so the
        # tokenizer's stages are run one by one.
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        words = [text]
        if pre_tokenizer is not None:
            words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._backend.model.tokenize(word)]

    def _without_prefix_space(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        # SentencePiece tokenizers put a space before the first word of what they encode; after a
        # newline they do not.
        token_ids = encode("\n" + text)
        if token_ids[: len(self._newline)] == self._newline:
            return token_ids[len(self._newline) :]
        return encode(text)
