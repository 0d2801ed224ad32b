"""The tokens of what many texts begin with, computed once for all of them.

A batch job's prompts share their system prompt, instructions and examples, often most of their
characters. A text may be cut, and its halves encoded apart, where the tokens come out the same.
That is known for the byte-level BPE tokenizers of `_PATTERNS`: their words are found from left to
right, BPE joins nothing across words, and between a letter (or a mark) and a space before a letter
there is an end of a word, whatever stands before and after: no word has a space after another
character, and none is looked for beyond its end. The space and the letter must be there in every
text that is cut. So must an added token before which a text is cut: those are taken out before
there are words. Other tokenizers, and those with an added token that could reach over an end of a
word, encode every text whole.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.normalizers import Normalizer

_MIN_HEAD_CHARS = 32  # below, cutting costs more than it spares
_NUM_CHECKED = 16  # texts, of a batch that gives a new head
_END_OF_WORD = r"(?<=[A-Za-z.,:;!?])(?=( [A-Za-z]))"
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


EncodeAll = Callable[[Sequence[str]], list[list[int]]]
Encoded = tuple["array[int]", "array[int]"]  # the head's ids or none, and the others
_NOTHING = array("i")


class SharedHead:
    """What the texts of the last batches begin with, and its tokens. For one thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """The tokenizer is used without its own start and end tokens."""
        self._is_usable = can_be_cut(tokenizer)
        tokens = "|".join(map(re.escape, _tokens_to_cut_before(tokenizer)))
        self._cut = re.compile(rf"{_END_OF_WORD}|(?=({tokens or '(?!)'}))")
        self._text = ""
        self._needed = ""  # the text, and what must follow it where it is cut off
        self.ids = array("i")

    def encode(self, texts: Sequence[str], encode_all: EncodeAll) -> list[Encoded]:
        """The ids of each text, in two parts. `encode_all` encodes texts whole."""
        if self._is_usable and self._text:
            is_sharing = [text.startswith(self._needed) for text in texts]
            if 2 * sum(is_sharing) >= len(texts):
                return self._encode(texts, is_sharing, encode_all)
        whole = encode_all(texts)
        if self._is_usable and len(texts) > 1:
            self._learn(texts, whole, encode_all)
        return [(_NOTHING, array("i", ids)) for ids in whole]

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
            (self.ids if shares else _NOTHING, array("i", ids))
            for ids, shares in zip(encoded, is_sharing, strict=True)
        ]

    def _learn(
        self, texts: Sequence[str], whole: Sequence[list[int]], encode_all: EncodeAll
    ) -> None:
        """From now on, the head is what these texts share, whose ids are `whole`."""
        shared = os.path.commonprefix([min(texts), max(texts)])  # noqa: RUF071  of texts, not paths
        cuts = [cut for cut in self._cut.finditer(shared) if cut.start() >= _MIN_HEAD_CHARS]
        self._text = self._needed = ""
        if cuts:
            end_of_word, token = cuts[-1].groups()
            self._text = shared[: cuts[-1].start()]
            self._needed = self._text + (end_of_word or token)
            self.ids = array("i", encode_all([self._text])[0])
            # It holds by what is said above, so if it does not, that is wrong for this tokenizer.
            some = texts[:_NUM_CHECKED]
            encoded = self._encode(some, [True] * len(some), encode_all)
            self._is_usable = [[*head, *rest] for head, rest in encoded] == whole[:_NUM_CHECKED]


def _tokens_to_cut_before(tokenizer: Tokenizer) -> list[str]:
    """The added tokens that stand out of any text, whatever is before and behind them."""
    added = list(tokenizer.get_added_tokens_decoder().values())
    within = {char for token in added for char in token.content[1:]}
    wide = [token.content for token in added if token.lstrip or token.rstrip or token.single_word]
    return [
        token.content
        for token in added
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        # No other token reaches over its start, takes it for a letter, or is longer and takes more.
        and token.content[0] not in within
        and not (token.content[0].isalnum() or token.content[0].isspace())
        and not any(other.startswith(token.content) for other in wide)
    ]


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
