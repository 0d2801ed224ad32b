"""The job's templates: columns, nulls, the sandbox."""

from __future__ import annotations

from typing import Any

import pytest
from prompt_factories import failure, make_builder, make_row, only, user

from batchgen.errors import UsageError
from batchgen.job.spec import PromptSpec
from batchgen.prompts.checks import check_columns, check_first_row


def template_spec(template: str) -> PromptSpec:
    return PromptSpec.model_validate({"template": template})


@pytest.mark.parametrize(
    "template",
    [
        "{{ text }}",
        "{{ text | upper }}",
        "{{ text | trim }}",
        "{{ text ~ '!' }}",
        "{{ text | replace('a', 'b') }}",
        "{{ '%s' % text }}",
        "{{ '{}'.format(text) }}",
        "{{ [text] }}",
        "{{ meta.title }}",
        "{{ meta.title | upper }}",
        "{{ meta.tags | join(',') }}",
        "{{ meta }}",
        "{{ text | int }}",
        "{{ text | length }}",
        "{% for c in text %}{{ c }}{% endfor %}",
    ],
)
def test_a_null_never_becomes_text(tokenizer: Any, template: str) -> None:
    builder = make_builder(tokenizer, template="x " + template)
    row = make_row(text=None, meta={"title": None, "tags": ["a", None]})
    result = failure(builder.build([row]))
    assert result.kind == "template_error"
    assert "is null" in result.message
    assert "column 'text'" in result.message or "column 'meta'" in result.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ text or 'nothing' }}",
        "{{ text | default('nothing') }}",
        "{% if text is none %}nothing{% endif %}",
        "{% if text == none %}nothing{% endif %}",
        "{% if not text %}nothing{% endif %}",
        "{{ text if text is defined else 'nothing' }}",
    ],
)
def test_a_template_may_handle_a_null(tokenizer: Any, template: str) -> None:
    prompt = only(make_builder(tokenizer, template=template).build([make_row(text=None)]))
    assert tokenizer.decode(prompt.token_ids) == "nothing"


def test_nulls_in_json(tokenizer: Any) -> None:
    builder = make_builder(tokenizer, template="{{ meta | tojson }}")
    prompt = only(builder.build([make_row(meta={"a": None, "b": "<é>"})]))
    assert tokenizer.decode(prompt.token_ids) == '{"a": null, "b": "<é>"}'


def test_a_value_that_is_no_text(tokenizer: Any) -> None:
    builder = make_builder(tokenizer, template="{{ stars }} of 5, {{ good }}")
    prompt = only(builder.build([make_row(stars=3, good=True)]))
    assert tokenizer.decode(prompt.token_ids) == "3 of 5, True"


def test_a_row_without_the_column(tokenizer: Any) -> None:
    result = failure(make_builder(tokenizer, template="{{ text }}").build([make_row(other="x")]))
    assert (result.kind, result.message) == (
        "template_error",
        "UndefinedError: 'text' is undefined",
    )


@pytest.mark.parametrize("template", ["{{ text + 1 }}", "{{ 1 // n }}", "{{ text.x.y }}"])
def test_what_a_template_raises_is_the_rows_failure(tokenizer: Any, template: str) -> None:
    builder = make_builder(tokenizer, template=template)
    assert failure(builder.build([make_row(text="a", n=0)])).kind == "template_error"


def test_check_columns_names_the_nearest() -> None:
    spec = PromptSpec.model_validate({"messages": user("{{ txet }} {{ id }}")})
    with pytest.raises(
        UsageError,
        match=r"prompt\.messages\[0\]\.content uses column 'txet'.*did you mean 'text'\?.*id, text",
    ):
        check_columns(spec, ["id", "text"])
    check_columns(spec, ["id", "txet"])


def test_check_columns_knows_what_a_template_defines() -> None:
    spec = template_spec(
        "{% set a = 1 %}{% for x in text %}{{ x }}{{ loop.index }}{% endfor %}{{ a }}"
        "{% for i in range(3) %}{{ i }}{% endfor %}{{ meta.title }}"
    )
    check_columns(spec, ["text", "meta"])
    with pytest.raises(UsageError, match="'dict'"):
        check_columns(template_spec("{{ dict }}"), ["text"])


@pytest.mark.parametrize("source", ["messages_column", "prompt_column"])
def test_check_columns_of_a_whole_column(source: str) -> None:
    spec = PromptSpec.model_validate({source: "chats"})
    with pytest.raises(UsageError, match=f"{source} uses column 'chats'.*did you mean 'chat'"):
        check_columns(spec, ["chat"])
    check_columns(spec, ["chats"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ text.__class__ }}",
        "{{ text['__class__'] }}",
        "{{ text | attr('__class__') }}",
        "{{ text.format.__globals__ }}",
        "{{ tags.append('x') }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_the_sandbox(tokenizer: Any, template: str) -> None:
    row = make_row(text="cat", tags=["a"])
    if "range" not in template:
        with pytest.raises(UsageError, match=r"prompt\.template does what a template may not do"):
            check_first_row(template_spec(template), row)
    builder = make_builder(tokenizer, template=template)
    assert failure(builder.build([row])).kind == "template_error"


def test_the_first_row_may_fail_by_itself() -> None:
    check_first_row(template_spec("{{ text }}"), make_row(text=None))
    check_first_row(PromptSpec.model_validate({"prompt_column": "p"}), make_row(p=None))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ text }", r"prompt\.template is not a jinja2 template: line 1: unexpected '}'"),
        ("{{ text | uper }}", "No filter named 'uper'"),
        ("{% if text %}", "line 1"),
        ("a\n{% filter upper %}{{ text }}{% endfilter %}", r"uses a FilterBlock in line 2"),
        ("{% call f() %}{% endcall %}", "CallBlock"),
        ("{% autoescape true %}{{ text }}{% endautoescape %}", "ScopedEvalContextModifier"),
        ("{% include 'x' %}", "Include"),
    ],
)
def test_a_template_that_cannot_be_compiled(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_columns(template_spec(template), ["text"])


def test_a_template_keeps_no_final_newline_of_yaml(tokenizer: Any) -> None:
    prompt = only(make_builder(tokenizer, template="{{ text }}\n").build([make_row(text="a")]))
    assert tokenizer.decode(prompt.token_ids) == "a"
