"""Prompts that are too long, by each policy."""

from __future__ import annotations

from typing import Any

import pytest
from prompt_factories import failure, make_builder, make_row, only, user

from batchgen.errors import UsageError

WORDS = " ".join(f"word{index}" for index in range(200))


def test_what_is_too_long(tokenizer: Any) -> None:
    num_tokens = len(tokenizer(WORDS)["input_ids"])
    row = make_row(text=WORDS)

    def build(**prompt: Any) -> Any:
        builder = make_builder(tokenizer, template="{{ text }}", max_tokens=16, **prompt)
        return builder.build([row])

    assert only(build(max_model_len=num_tokens + 100)).max_tokens == 16
    assert only(build(max_model_len=num_tokens + 3)).max_tokens == 3
    assert only(build(max_model_len=num_tokens + 1)).max_tokens == 1
    too_long = failure(build(max_model_len=num_tokens))
    assert too_long.kind == "too_long"
    assert f"{num_tokens} tokens, at most {num_tokens - 1}" in too_long.message
    assert too_long.excerpt == WORDS[:200]
    assert only(build(max_model_len=2048, max_prompt_tokens=num_tokens))
    too_long = failure(build(max_model_len=2048, max_prompt_tokens=num_tokens - 1))
    assert too_long.kind == "too_long"


def test_fail_ends_the_run(tokenizer: Any) -> None:
    builder = make_builder(tokenizer, template="{{ text }}", max_prompt_tokens=10, overflow="fail")
    with pytest.raises(UsageError, match=r"data\.jsonl:0: the prompt has \d+ tokens, at most 10"):
        builder.build([make_row(text=WORDS)])


def test_truncating_a_template_cuts_its_tokens(tokenizer: Any) -> None:
    token_ids = tokenizer("A: " + WORDS)["input_ids"]
    for overflow, expected in (
        ("truncate_start", token_ids[-20:]),
        ("truncate_end", token_ids[:20]),
    ):
        builder = make_builder(
            tokenizer, template="A: {{ text }}", max_prompt_tokens=20, overflow=overflow
        )
        assert list(only(builder.build([make_row(text=WORDS)])).token_ids) == expected


def test_a_cut_prompt_leaves_room_for_the_output(tokenizer: Any) -> None:
    builder = make_builder(
        tokenizer, template="{{ text }}", max_model_len=100, max_tokens=30, overflow="truncate_end"
    )
    prompt = only(builder.build([make_row(text=WORDS)]))
    assert (len(prompt.token_ids), prompt.max_tokens) == (70, 30)


@pytest.mark.parametrize("max_prompt_tokens", [60, 61, 90, 150, 400])
@pytest.mark.parametrize("overflow", ["truncate_start", "truncate_end"])
def test_truncating_a_chat_keeps_its_frame(
    tokenizer: Any, overflow: str, max_prompt_tokens: int
) -> None:
    builder = make_builder(
        tokenizer,
        messages=[
            {"role": "system", "content": "Be {{ tone }}."},
            *user("Read: {{ text }}\nTranslate the text into French."),
        ],
        max_prompt_tokens=max_prompt_tokens,
        max_model_len=2048,
        overflow=overflow,
    )
    token_ids = only(builder.build([make_row(text=WORDS, tone="brief")])).token_ids
    assert max_prompt_tokens - 8 <= len(token_ids) <= max_prompt_tokens
    shown = tokenizer.decode(token_ids)
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRead: "
    end = "\nTranslate the text into French.<|im_end|>\n<|im_start|>assistant\n"
    assert shown.startswith(start)
    assert shown.endswith(end)
    kept = shown[len(start) : -len(end)]
    assert WORDS.endswith(kept) if overflow == "truncate_start" else WORDS.startswith(kept)
    assert kept


def test_truncating_the_last_user_message_of_a_column(tokenizer: Any) -> None:
    chat = [*user(WORDS), {"role": "assistant", "content": WORDS}, *user(WORDS)]
    frame = tokenizer.apply_chat_template(
        [*chat[:2], *user("")], add_generation_prompt=True, return_dict=False
    )
    builder = make_builder(
        tokenizer,
        messages_column="chat",
        max_model_len=8192,
        max_prompt_tokens=len(frame) + 20,
        overflow="truncate_end",
    )
    token_ids = only(builder.build([make_row(chat=chat)])).token_ids
    assert len(frame) + 15 <= len(token_ids) <= len(frame) + 20
    assert tokenizer.decode(token_ids).count(WORDS) == 2


@pytest.mark.parametrize("overflow", ["truncate_start", "truncate_end"])
def test_truncating_text_that_spells_special_tokens(tokenizer: Any, overflow: str) -> None:
    builder = make_builder(
        tokenizer, messages=user("{{ text }}"), max_prompt_tokens=80, overflow=overflow
    )
    text = "cat <|im_end|> dog <|im_start|> " * 40
    token_ids = only(builder.build([make_row(text=text)])).token_ids
    assert 60 <= len(token_ids) <= 80
    assert [token_ids.count(1), token_ids.count(2)] == [2, 1]


def test_a_frame_that_does_not_fit(tokenizer: Any) -> None:
    builder = make_builder(
        tokenizer,
        messages=user(WORDS + " {{ text }}"),
        max_prompt_tokens=20,
        max_model_len=8192,
        overflow="truncate_end",
    )
    assert failure(builder.build([make_row(text="cat and dog")])).kind == "too_long"


def test_characters_of_several_tokens_are_cut_whole(tokenizer: Any) -> None:
    builder = make_builder(
        tokenizer, messages=user("{{ text }}"), max_prompt_tokens=50, overflow="truncate_end"
    )
    token_ids = only(builder.build([make_row(text="😀" * 100)])).token_ids
    assert "\ufffd" not in tokenizer.decode(token_ids)
    assert len(token_ids) <= 50
