"""Texts whose common beginning is tokenized once have the ids of texts that are encoded whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prompt_factories import TEXT
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from batchgen.prompts.shared_head import SharedHead, can_be_cut
from batchgen.prompts.special_tokens import ControlTokens, Encoder

# As the models' tokenizer.json have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_OSS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [*TEXT, "New York, then York. It's masked: the theme, cats and dogs, they're 12 and 345!"]
# What a batch's prompts begin with, and what a row may put right behind any part of it.
HEAD = "Translate the text into French. It's New York: <s>the dog looked at the cat, and at the"
FRAGMENTS = (
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "s", "me", "the", " the", "cat", " cat", "York",
    " York", "New York", "mask", " mask", "mask ", ".", ", ", ":", "'s", "'", "re", "12",
    " 345", "e", "é", "e\u0301", "\u0301", "K", "\u212a", "\u212a b", "\u1100\u1161", "你好", "😀",
    "<|im_start|>",
    "\n<|im_start|>", " <|im_end|>", "<|im_", "<", "\u0338", "\ue000", "<s>",
    "<s> ", "<think>", "A", "Q", "/", "/\n", "ǅ", "ʰ",
)  # fmt: skip


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def gpt2(**options: Any) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def smollm2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()])


WORDS = {
    "gpt2": gpt2(),
    "smollm2": smollm2(),
    "llama3": split(LLAMA3),
    "qwen2": split(QWEN2),
    "gpt-oss": split(GPT_OSS),
}
ADDED = {
    "none": (),
    "over an end of a word": (AddedToken("New York"),),
    "ends in a space": (AddedToken("the "), AddedToken("cat,", rstrip=True, normalized=False)),
    "rstrip": (AddedToken("the", rstrip=True, single_word=True),),
    "lstrip": (AddedToken("mask", lstrip=True), AddedToken("York", lstrip=True, normalized=True)),
    "single_word": (AddedToken(" the", single_word=True), AddedToken("cat", single_word=True)),
    "normalized": (AddedToken("\u212a b", normalized=True), AddedToken("é", normalized=True)),
    "one that is one only when normalized": (AddedToken("sat\u037e b", normalized=True),),
    "chat": (
        AddedToken("<|im_start|>", special=True, normalized=False),
        AddedToken("<|im_end|>", special=True, normalized=False),
    ),
    "chat, with one that takes more": (
        AddedToken("<|im_start|>", special=True, normalized=False),
        AddedToken("<|im_start|>A", lstrip=True, normalized=False),
        AddedToken("<|im_start|>Q", normalized=False),
        AddedToken("\n<|im", normalized=False),
        AddedToken("\n\n<|im_start|>A", normalized=False),
    ),
    "harmless": (
        AddedToken("<s>", special=True, rstrip=True),
        AddedToken("  "),
        AddedToken(" mask"),
        AddedToken("the", single_word=True, lstrip=True),
    ),
}
MAY_CUT = ("none", "lstrip", "harmless", "chat", "chat, with one that takes more")


def make_bpe(
    words: pre_tokenizers.PreTokenizer | None,
    added: Sequence[AddedToken] = (),
    normalizer: normalizers.Normalizer | None = None,
    **options: Any,
) -> Tokenizer:
    """Trained so long that whole words, and their beginnings, are tokens."""
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = words or gpt2()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if options:  # the trainer makes a model of its own
        for name, value in options.items():
            setattr(backend.model, name, value)
    if words is None:
        backend.pre_tokenizer = None
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return backend


def whole(backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


class Recorded:
    """A SharedHead, and the texts that it had encoded."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.head = SharedHead(backend)
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.encoded = []
        return [[*head, *rest] for head, rest in self.head.encode(texts, self._encode_all)]

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        self.encoded += texts
        return whole(self.backend, texts)


BACKENDS = {
    (words, added, nfc): make_bpe(
        WORDS[words], ADDED[added], normalizers.NFC() if nfc else None
    )
    for words in WORDS
    for added in ADDED
    for nfc in (False, True)
}  # fmt: skip

rest = st.lists(st.sampled_from(FRAGMENTS), max_size=4).map("".join)


@st.composite
def batches(draw: st.DrawFn) -> list[list[str]]:
    """Some with the same beginning, some that end or go on elsewhere in it, some without it."""
    fragments = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
    chat = HEAD + "<|im_end|>\n\n<|im_start|>"
    head = draw(st.one_of(st.sampled_from([HEAD, chat]), fragments.map(lambda more: HEAD + more)))
    part = st.integers(len(HEAD) - 40, len(head)).map(lambda end: head[:end])
    usual = st.builds(str.__add__, st.just(head), rest)
    other = st.builds(str.__add__, part, rest)
    text = st.one_of(usual, usual, other, other, rest)
    return draw(st.lists(st.lists(text, max_size=5), min_size=1, max_size=4))


@pytest.mark.parametrize("words", WORDS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(added=st.sampled_from(sorted(ADDED)), nfc=st.booleans(), batches=batches())
@example(added="none", nfc=False, batches=[[HEAD + " cat"] * 2, [HEAD + "me", HEAD[:-4] + "s"]])
@example(
    added="over an end of a word",
    nfc=False,
    batches=[[HEAD + " the New A", HEAD + " the New A"], [HEAD + " the New York"] * 2],
)
@example(
    added="single_word",
    nfc=False,
    batches=[[HEAD + " A", HEAD + " A"], [HEAD + " the", HEAD + " the"]],
)
@example(
    added="one that is one only when normalized",
    nfc=True,
    batches=[[HEAD + " sat; b"] * 2, [HEAD + " sat; b", HEAD + " sat; be"]],
)
def test_the_ids_are_those_of_whole_texts(
    words: str, added: str, nfc: bool, batches: list[list[str]]
) -> None:
    backend = BACKENDS[words, added, nfc]
    recorded = Recorded(backend)
    for texts in batches:
        assert recorded.encode(texts) == whole(backend, texts)


@pytest.mark.parametrize("words", WORDS)
def test_the_head_is_encoded_once(words: str) -> None:
    recorded = Recorded(BACKENDS[words, "harmless", True])
    recorded.encode([HEAD + " A", HEAD + " Q"])
    cut = HEAD.rindex(" ")
    for texts in ([HEAD + " the cat", HEAD + "s"], [HEAD + "12", "the"]):
        assert recorded.encode(texts) == whole(recorded.backend, texts)
        assert recorded.encoded == [
            text[cut:] if text.startswith(HEAD) else text for text in texts
        ]  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_a_chat_is_cut_before_the_last_control_token_that_all_have(words: str) -> None:
    recorded = Recorded(BACKENDS[words, "chat", True])
    head = HEAD + "<|im_end|>\n"
    recorded.encode([head + "<|im_start|>12", head + "<|im_start|>34"])
    texts = [head + "<|im_start|>\u0338 A", head + "<|im_start|>", head + "<|im_start", head]
    assert recorded.encode(texts) == whole(recorded.backend, texts)
    assert recorded.encoded == ["<|im_start|>\u0338 A", "<|im_start|>", *texts[2:]]


def test_a_new_head_takes_the_place_of_one_that_few_texts_have() -> None:
    recorded = Recorded(BACKENDS["gpt2", "none", False])
    other = "Answer with the translation only. The system and the"
    recorded.encode([HEAD + " A", HEAD + " Q"])
    recorded.encode([other + " A", other + " Q", HEAD + " A"])  # nothing in common
    recorded.encode([other + " A", other + " Q"])
    recorded.encode([other + " the cat"])
    assert recorded.encoded == [" the the cat"]  # A and Q begin words, but not the same
    assert recorded.encode([]) == []


def test_the_end_of_a_head_must_be_one_in_every_text() -> None:
    """A head that ends in `the` is none of `theme`, which is one token."""
    recorded = Recorded(BACKENDS["gpt2", "none", False])
    head = "Translate the text into French, and then look at the"
    recorded.encode([head + " cat", head + " cat."])
    texts = [head + "me", head + "y're", head]
    assert recorded.encode(texts) == whole(recorded.backend, texts)
    first, second, both = whole(recorded.backend, [head, "me", head + "me"])
    assert first + second != both


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("added", ADDED)
def test_added_tokens_that_reach_over_ends_of_words_forbid_a_cut(words: str, added: str) -> None:
    assert can_be_cut(BACKENDS[words, added, True]) == (added in MAY_CUT)


def make_unknown(name: str) -> Tokenizer:
    """Tokenizers of which it is not known where their texts may be cut."""
    backend = make_bpe(None)
    if name == "no pre-tokenizer":
        return backend
    if name == "Llama 2":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        return backend
    unknown: dict[str, Any] = {
        "Metaspace": pre_tokenizers.Metaspace(),
        "a space before the text": gpt2(add_prefix_space=True),
        "bytes without words": gpt2(use_regex=False),
        "bytes before words": pre_tokenizers.Sequence(
            [gpt2(use_regex=False), pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")]
        ),
        "a pattern that is not known": split(r" ?\w+ \w+|\s+|."),
        "a pattern that is removed": pre_tokenizers.Split(Regex(LLAMA3), behavior="removed"),
        "a pattern that is joined": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3), behavior="merged_with_next"), gpt2()]
        ),
        "Whitespace": pre_tokenizers.Whitespace(),
        "Digits": pre_tokenizers.Digits(),
    }
    if name in unknown:
        backend.pre_tokenizer = unknown[name]
        return backend
    normalizing: dict[str, Any] = {
        "NFKC": normalizers.NFKC(),
        "Strip": normalizers.Strip(),
        "Replace": normalizers.Replace(" the", "the"),
    }
    if name in normalizing:
        return make_bpe(gpt2(), normalizer=normalizing[name])
    if name == "dropout":
        return make_bpe(gpt2(), dropout=0.5)
    trained: dict[str, tuple[Any, Any]] = {
        "Unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(
                vocab_size=300,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        ),
        "WordPiece": (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(
                vocab_size=300, special_tokens=["[UNK]"], show_progress=False
            ),
        ),
    }
    model, trainer = trained[name]
    backend = Tokenizer(model)
    backend.pre_tokenizer = gpt2()
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.mark.parametrize(
    "name",
    [
        "no pre-tokenizer", "Llama 2", "Metaspace", "a space before the text",
        "bytes without words", "bytes before words", "a pattern that is not known",
        "a pattern that is removed", "a pattern that is joined", "Whitespace", "Digits", "NFKC",
        "Strip", "Replace", "dropout", "Unigram", "WordPiece",
    ],
)  # fmt: skip
def test_texts_of_other_tokenizers_are_encoded_whole(name: str) -> None:
    recorded = Recorded(make_unknown(name))
    assert not can_be_cut(recorded.backend)
    for texts in ([HEAD + " A", HEAD + " Q"], [HEAD + " the", HEAD + "s"]):
        recorded.encode(texts)
        assert recorded.encoded == texts


@pytest.mark.parametrize("words", WORDS)
def test_start_and_end_tokens_stand_around_the_whole_text(words: str) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = make_bpe(WORDS[words], [AddedToken("<s>", special=True), AddedToken("</s>")])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A </s>",
                special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "</s>")],
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    encoder = Encoder(tokenizer, add_special_tokens=True)
    control = ControlTokens(tokenizer, "")
    for texts in ([HEAD + " A", HEAD + " Q"], [HEAD, HEAD[:-4], "", HEAD + " <s>the </s>", HEAD]):
        expected = [backend.encode(text).ids for text in texts]
        assert encoder.encode_batch(texts) == expected
        prompts = encoder.encode_prompts(texts, control)
        assert [list(ids) for ids, _ in prompts] == expected
        assert [count for _, count in prompts] == list(map(control.count, expected))
