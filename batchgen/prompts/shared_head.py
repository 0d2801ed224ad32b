"""The tokens of what many texts begin with, computed once for all of them.

A batch job's prompts share their system prompt, instructions and examples, often most of their
characters. A text may be cut, and its halves encoded apart, where the tokens come out the same.
That is known for the byte-level BPE tokenizers of `_PATTERNS`: their words are found from left to
right, BPE joins nothing across words, and between a letter (or a mark) and a space before a letter
there is an end of a word, whatever stands before and after: no word has a space after another
character, and none is looked for beyond its end. The space and the letter must be there in every
text that is cut. Other tokenizers, and those with an added token that could reach over an end of a
word, encode every text whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.normalizers import Normalizer

_MIN_HEAD_CHARS = 32  # below, cutting costs more than it spares
_NUM_CHECKED = 16  # texts, of a batch that gives a new head
_NUM_NEEDED_CHARS = 2  # of what follows a cut: without them it is none
_END_OF_WORD = re.compile(r"(?<=[A-Za-z.,:;!?])(?= [A-Za-z])")
_WORD_AND_SPACE = re.compile(r"[A-Za-z.,:;!?] ")

# How pre-tokenizers find words; GPT-2's own pattern is within ByteLevel. From the tokenizer.json of
# Llama 3, of Qwen 2 and 3, and of gpt-oss.
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATTERNS = frozenset(
    {
        rf"{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
        rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIXES}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIXES}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
    }
)


class SharedHead:
    """What the texts of the last batches begin with, and its tokens. For one thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """The tokenizer is used without its own start and end tokens."""
        self._is_usable = can_be_cut(tokenizer)
        self._text = ""
        self._needed = ""  # the text, and the characters after it that make it end with a word
        self._ids: list[int] = []

    def encode(
        self, texts: Sequence[str], encode_all: Callable[[Sequence[str]], list[list[int]]]
    ) -> list[list[int]]:
        """The ids of each text. `encode_all` gives those of texts that are encoded whole."""
        if not self._is_usable:
            return encode_all(texts)
        num_sharing = sum(text.startswith(self._needed) for text in texts) if self._text else 0
        if 2 * num_sharing < len(texts) or not self._text:
            return self._learn(texts, encode_all)
        return self._encode(texts, encode_all)

    def _encode(
        self, texts: Sequence[str], encode_all: Callable[[Sequence[str]], list[list[int]]]
    ) -> list[list[int]]:
        num_chars = len(self._text)
        is_sharing = [text.startswith(self._needed) for text in texts]
        encoded = encode_all(
            [
                text[num_chars:] if shares else text
                for text, shares in zip(texts, is_sharing, strict=True)
            ]
        )
        return [
            self._ids + ids if shares else ids
            for ids, shares in zip(encoded, is_sharing, strict=True)
        ]

    def _learn(
        self, texts: Sequence[str], encode_all: Callable[[Sequence[str]], list[list[int]]]
    ) -> list[list[int]]:
        """The ids of each text, all encoded whole; from now on, what they share is the head."""
        whole = encode_all(texts)
        if len(texts) < 2:
            return whole
        shared = os.path.commonprefix([min(texts), max(texts)])  # noqa: RUF071  of texts, not paths
        cut = _find_cut(shared)
        self._text, self._needed = shared[:cut], shared[: cut + _NUM_NEEDED_CHARS]
        if self._text:
            self._ids = encode_all([self._text])[0]
            # It holds by what is said above, so if it does not, that is wrong for this tokenizer.
            some = texts[:_NUM_CHECKED]
            self._is_usable = self._encode(some, encode_all) == whole[:_NUM_CHECKED]
        return whole


def _find_cut(shared: str) -> int:
    """Where a text that begins so may be cut, at the latest; 0 for nowhere."""
    last = max((cut.start() for cut in _END_OF_WORD.finditer(shared)), default=0)
    return last if last >= _MIN_HEAD_CHARS else 0


def can_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether it is known of the tokenizer where its texts may be cut."""
    from tokenizers.models import BPE

    model = tokenizer.model
    if not isinstance(model, BPE) or model.dropout:
        return False
    # NFC joins nothing to a letter that is ASCII's from before it.
    if _state(tokenizer.normalizer) not in (None, {"type": "NFC"}):
        return False
    stages = _state(tokenizer.pre_tokenizer)
    if stages is None:
        return False
    steps = stages["pretokenizers"] if stages["type"] == "Sequence" else [stages]
    if not all(map(_keeps_ends_of_words, steps)):
        return False
    # Before the bytes of a space become a letter, as they do in ByteLevel.
    steps = [step for step in steps if step["type"] != "Digits"]
    if not steps or not _finds_words(steps[0]):
        return False
    tokens = tokenizer.get_added_tokens_decoder().values()
    return all(_keeps_within_words(token, tokenizer.normalizer) for token in tokens)


def _keeps_within_words(token: AddedToken, normalizer: Normalizer | None) -> bool:
    """Whether the token never reaches over an end of a word, nor looks over one."""
    contents = [token.content]
    if normalizer is not None:
        contents.append(normalizer.normalize_str(token.content))
    return not any(
        _WORD_AND_SPACE.search(content)
        or (token.rstrip and _WORD_AND_SPACE.search(content + " "))  # takes the space after it
        or (token.single_word and content.startswith(" "))  # looks at what is before the space
        for content in contents
    )


def _state(stage: Any) -> Any:
    return None if stage is None else json.loads(stage.__getstate__())


def _keeps_ends_of_words(step: Mapping[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    return step["type"] == "Digits" or _finds_words(step)


def _finds_words(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Split":
        is_known = step["pattern"].get("Regex") in _PATTERNS
        return is_known and step["behavior"] == "Isolated" and not step["invert"]
    return step["type"] == "ByteLevel" and bool(step["use_regex"])
