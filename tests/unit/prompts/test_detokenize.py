"""Outputs become text, without what ended them."""

from __future__ import annotations

from typing import Any

from batchgen.prompts.detokenize import detokenize
from batchgen.records import FinishReason, SampleOutput

END = 2


def output(token_ids: list[int], finish_reason: FinishReason = "stop") -> SampleOutput:
    return SampleOutput(token_ids=token_ids, finish_reason=finish_reason, seed=0)


def text_of(tokenizer: Any, token_ids: list[int], *args: Any, reason: FinishReason = "stop") -> str:
    (text,) = detokenize(tokenizer, [output(token_ids, reason)], *args)
    return text


def test_a_batch_is_what_transformers_decodes(tokenizer: Any) -> None:
    texts = ["The cat, the dog .", " café 😀 ", "", "a\n\nb"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    outputs = [output([*token_ids, END]) for token_ids in ids]
    assert detokenize(tokenizer, outputs) == texts
    assert texts == tokenizer.batch_decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert detokenize(tokenizer, []) == []


def test_a_stop_token_that_is_not_special(tokenizer: Any) -> None:
    newline = tokenizer("\n")["input_ids"][0]
    token_ids = [*tokenizer("cat\ndog")["input_ids"], newline]
    assert text_of(tokenizer, token_ids, (), {newline}) == "cat\ndog"
    assert text_of(tokenizer, token_ids, (), {newline}, reason="length") == "cat\ndog\n"


def test_stop_strings_across_tokens(tokenizer: Any) -> None:
    token_ids = tokenizer("The cat sat on the mat")["input_ids"]
    assert len(token_ids) > 4
    assert text_of(tokenizer, token_ids, ["e mat"]) == "The cat sat on th"
    assert text_of(tokenizer, token_ids, ["mat", "the mat"]) == "The cat sat on "
    assert text_of(tokenizer, token_ids, ["at"], reason="length") == "The cat sat on the mat"


def test_a_stop_string_before_the_last_token_did_not_stop(tokenizer: Any) -> None:
    token_ids = tokenizer("The cat sat on the mat, and the dog\n")["input_ids"]
    assert text_of(tokenizer, token_ids, ["cat", "\n"]) == "The cat sat on the mat, and the dog"
    assert text_of(tokenizer, [*token_ids, END], ["cat"], {END}).endswith("dog\n")


def test_two_stop_strings_in_one_token(tokenizer: Any) -> None:
    token_ids = tokenizer("cat")["input_ids"] + tokenizer("\n\n")["input_ids"][:1]
    assert text_of(tokenizer, token_ids, ["\n"]) == "cat"
