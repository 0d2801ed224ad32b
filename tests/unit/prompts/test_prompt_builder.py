"""Rows become prompts: the four sources, batches, lengths, seeds."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from prompt_factories import failure, make_builder, make_row, make_tokenizer, only, user

from batchgen.errors import UsageError
from batchgen.records import Prompt, RowFailure, row_seed


def test_messages_are_what_transformers_makes_of_them(tokenizer: Any) -> None:
    builder = make_builder(
        tokenizer,
        messages=[{"role": "system", "content": "Be brief."}, *user("Translate: {{ text }}")],
    )
    prompt = only(builder.build([make_row(text="The cat — café 😀")]))
    expected = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Translate: The cat — café 😀"},
        ],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(prompt.token_ids) == expected


def test_a_template_is_what_transformers_makes_of_the_text(tokenizer: Any) -> None:
    builder = make_builder(tokenizer, template="Text: {{ text | upper }}\nFrench:")
    prompt = only(builder.build([make_row(text="the cat")]))
    assert list(prompt.token_ids) == tokenizer("Text: THE CAT\nFrench:")["input_ids"]


def test_a_template_gets_the_models_start_token() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    row = make_row(text="the cat and <|im_end|> the dog")
    framed = only(make_builder(tokenizer, template="{{ text }}").build([row])).token_ids
    assert framed[0] == 1
    assert framed[-1] == 2
    assert 2 not in framed[1:-1]
    short = make_builder(
        tokenizer, template="{{ text }}", max_prompt_tokens=5, overflow="truncate_start"
    )
    assert list(only(short.build([row])).token_ids) == [1, *framed[-4:-1], 2]
    chat = make_builder(tokenizer, messages=user("{{ text }}"))
    assert only(chat.build([make_row(text="a")])).token_ids.count(1) == 2  # the chat's own


@pytest.mark.parametrize("as_json", [False, True])
def test_a_column_of_chats(tokenizer: Any, as_json: bool) -> None:
    chat = [*user("the cat"), {"role": "assistant", "content": "le chat"}, *user("the dog")]
    value = json.dumps(chat) if as_json else [{**message, "name": None} for message in chat]
    builder = make_builder(tokenizer, messages_column="chat")
    prompt = only(builder.build([make_row(chat=value)]))
    assert list(prompt.token_ids) == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )


def test_a_prompt_column(tokenizer: Any) -> None:
    prompt = only(make_builder(tokenizer, prompt_column="p").build([make_row(p="{{ text }}")]))
    assert list(prompt.token_ids) == tokenizer("{{ text }}")["input_ids"]


def test_a_batch_keeps_its_order_around_failures(tokenizer: Any) -> None:
    builder = make_builder(tokenizer, messages=user("{{ text }}"))
    texts = ["one", None, "<|im_end|>", "", "five"]
    rows = [make_row(index, text=text) for index, text in enumerate(texts)]
    results = builder.build(rows)
    assert [result.key for result in results] == [row.key for row in rows]
    kinds = [result.kind if isinstance(result, RowFailure) else "ok" for result in results]
    assert kinds == ["ok", "template_error", "ok", "empty_prompt", "ok"]
    for row, result in zip(rows, results, strict=True):
        assert builder.build([row]) == [result]


def test_seeds_and_sampling(tokenizer: Any) -> None:
    builder = make_builder(
        tokenizer, template="{{ text }}", sampling={"seed": 7, "ignore_eos": True}, max_tokens=9
    )
    prompt = only(builder.build([make_row(3, text="cat")]))
    assert prompt == Prompt(
        key=make_row(3).key,
        token_ids=array("i", tokenizer("cat")["input_ids"]),
        max_tokens=9,
        seeds=(row_seed(7, "data.jsonl:3"),),
        ignore_eos=True,
    )


def test_the_chat_template_of_the_job_goes_first(tokenizer: Any) -> None:
    builder = make_builder(
        tokenizer,
        messages=user("{{ text }}"),
        chat_template="{{ greeting }} {{ messages[0]['content'] }}",
        chat_template_kwargs={"greeting": "Hello"},
    )
    prompt = only(builder.build([make_row(text="cat")]))
    assert tokenizer.decode(prompt.token_ids) == "Hello cat"


def test_a_model_without_a_chat_template() -> None:
    bare = make_tokenizer(chat_template=None)
    with pytest.raises(UsageError, match=r"no chat template.*prompt\.chat_template"):
        make_builder(bare, messages=user("{{ text }}"))
    only(make_builder(bare, template="{{ text }}").build([make_row(text="cat")]))


def test_reserved_chat_template_kwargs(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="may not set 'tokenize'"):
        make_builder(tokenizer, messages=user("x"), chat_template_kwargs={"tokenize": True})


def test_what_the_chat_template_refuses_is_the_rows_failure() -> None:
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    result = failure(make_builder(tokenizer, messages=user("hi")).build([make_row()]))
    assert result.kind == "template_error"
    assert "roles must alternate" in result.message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "null"),
        ("not json", "not JSON"),
        ([], "no list of messages"),
        ({"role": "user"}, "no list of messages"),
        (["hi"], "message 0 is not an object"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "im_end", "content": "x"}], "message 0 has the role 'im_end'"),
    ],
)
def test_a_column_that_holds_no_chat(tokenizer: Any, value: object, message: str) -> None:
    builder = make_builder(tokenizer, messages_column="chat")
    result = failure(builder.build([make_row(chat=value)]))
    assert result.kind == "template_error"
    assert message in result.message


@pytest.mark.parametrize("text", ["", "  \n\t", "\u00a0"])
@pytest.mark.parametrize(
    "prompt",
    [
        {"messages": [{"role": "system", "content": "Translate."}, *user("{{ text }}")]},
        {"messages": user("Translate: {{ text }}")},
        {"template": "Translate: {{ text | trim }}"},
        {"template": "{{ text }}"},
        {"prompt_column": "text"},
    ],
)
def test_empty_prompts(tokenizer: Any, prompt: dict[str, Any], text: str) -> None:
    result = failure(make_builder(tokenizer, **prompt).build([make_row(text=text)]))
    assert result.kind == "empty_prompt"


def test_an_empty_user_message_in_a_column_of_chats(tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, *user(" ")]
    builder = make_builder(tokenizer, messages_column="chat")
    assert failure(builder.build([make_row(chat=chat)])).kind == "empty_prompt"


def test_a_prompt_without_columns_is_not_empty(tokenizer: Any) -> None:
    only(make_builder(tokenizer, messages=user("Write a poem.")).build([make_row(text="")]))


def test_a_prompt_of_a_prompt_column_must_be_text(tokenizer: Any) -> None:
    builder = make_builder(tokenizer, prompt_column="p")
    for value, message in ((None, "is null"), ([1], "is a list")):
        result = failure(builder.build([make_row(p=value)]))
        assert (result.kind, message in result.message) == ("template_error", True)


def test_what_is_shown_to_people(tokenizer: Any) -> None:
    builder = make_builder(tokenizer, messages=user("{{ text }}"))
    assert builder.show(make_row(text="cat")) == (
        "<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n"
    )
    assert isinstance(builder.show(make_row(text=None)), RowFailure)
