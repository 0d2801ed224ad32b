"""The tokens of what many texts begin with, computed once for all of them.

A batch job's prompts share their system prompt, instructions and examples, often most of their
characters. A text may be cut, and its halves encoded apart, where the tokens come out the same.
That is known for the byte-level BPE tokenizers of `_PATTERNS`: their words are found from left to
right, BPE joins nothing across words, and between a letter (or a mark) and a space before a letter
there is an end of a word, whatever stands further on: no pattern looks past the space. An added
token is taken out before there are words, so a text may be cut before one. Other tokenizers encode
every text whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MIN_HEAD_CHARS = 32  # below, cutting costs more than it spares
_MIN_LEARNED = 8  # texts, of a batch that may give a new head
_NUM_CHECKED = 16  # texts, of a batch that gives a new head
_END_OF_WORD = r"(?<=[A-Za-z.,:;!?])(?= [A-Za-z])"

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


EncodeAll = Callable[[Sequence[str]], list[list[int]]]
Encoded = tuple[list[int], list[int]]  # the head's ids or none, and the others


class SharedHead:
    """What the texts of the last batches begin with, and its tokens. For one thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """The tokenizer is used without its own start and end tokens."""
        self._tokenizer = tokenizer
        self._is_usable = can_be_cut(tokenizer)
        added = tokenizer.get_added_tokens_decoder().values()
        # An added token that begins before the cut must not reach past what is known.
        self._min_tail_chars = max((len(token.content) for token in added), default=0) + 2
        tokens = [
            re.escape(token.content)
            for token in added
            if not (token.normalized or token.single_word or token.lstrip or token.rstrip)
        ]
        self._cut = re.compile("|".join([_END_OF_WORD, *(f"(?={token})" for token in tokens)]))
        self._text = ""
        self.ids: list[int] = []

    def encode(self, texts: Sequence[str], encode_all: EncodeAll) -> list[Encoded]:
        """The ids of each text, in two parts. `encode_all` encodes texts whole."""
        if self._is_usable and self._text:
            is_sharing = [text.startswith(self._text) for text in texts]
            if 2 * sum(is_sharing) >= len(texts):
                return self._encode(texts, is_sharing, encode_all)
        whole = encode_all(texts)
        if self._is_usable and len(texts) >= _MIN_LEARNED:
            self._learn(texts, whole, encode_all)
        return [([], ids) for ids in whole]

    def _encode(
        self, texts: Sequence[str], is_sharing: Sequence[bool], encode_all: EncodeAll
    ) -> list[Encoded]:
        num_chars = len(self._text)
        encoded = encode_all(
            [
                text[num_chars:] if shares else text
                for text, shares in zip(texts, is_sharing, strict=True)
            ]
        )
        return [
            (self.ids if shares else [], ids)
            for ids, shares in zip(encoded, is_sharing, strict=True)
        ]

    def _learn(
        self, texts: Sequence[str], whole: Sequence[list[int]], encode_all: EncodeAll
    ) -> None:
        """From now on, the head is what these texts share, whose ids are `whole`."""
        shared = os.path.commonprefix([min(texts), max(texts)])  # noqa: RUF071  of texts, not paths
        self._text = shared[: self._find_cut(shared)]
        if self._text:
            self.ids = encode_all([self._text])[0]
            # It holds by what is said above, so if it does not, that is wrong for this tokenizer.
            some = texts[:_NUM_CHECKED]
            encoded = self._encode(some, [True] * len(some), encode_all)
            self._is_usable = [head + rest for head, rest in encoded] == whole[:_NUM_CHECKED]

    def _find_cut(self, shared: str) -> int:
        """Where a text that begins so may be cut, at the latest; 0 for nowhere."""
        cuts = self._cut.finditer(shared, 0, max(0, len(shared) - self._min_tail_chars))
        last = max((cut.start() for cut in cuts), default=0)
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
    return all(map(_keeps_ends_of_words, steps)) and any(map(_finds_words, steps))


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
