"""What a hostile template, or a hostile row, may spend: steps, characters and time."""

from __future__ import annotations

import contextlib
import threading
import time
import tracemalloc
from typing import Any

import jinja2
import pytest
from prompt_factories import CHATML, failure, make_builder, make_row, make_tokenizer, user

from batchgen.errors import UsageError
from batchgen.job.spec import PromptSpec
from batchgen.prompts import budget
from batchgen.prompts.chat_template import ChatTemplate
from batchgen.prompts.checks import check_first_row
from batchgen.prompts.templates import RENDER_ERRORS, TemplateSet
from batchgen.records import RowFailure

DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(60) %}STEP{% endfor %}{{ ns.x }}"


def doubling(start: str, step: str) -> str:
    return DOUBLING.replace("START", start).replace("STEP", step)


LOOPS = {
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "over its own list": "{% set r = range(99999)|list %}{% for i in r %}{% for j in r %}"
    "{% if j in r %}{% endif %}{% endfor %}{% endfor %}",
    "macro, wide": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "macro, deep": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "calls": "{% macro f() %}{% endmacro %}{% for i in range(99999) %}"
    "{{ f() }}{{ f() }}{{ f() }}{{ f() }}{{ f() }}{{ f() }}{{ f() }}{{ f() }}{% endfor %}"
    "{% for i in range(99999) %}{{ f() }}{{ f() }}{{ f() }}{{ f() }}{% endfor %}" * 4,
    "map of a range": "{% for i in range(999) %}{{ range(99999)|map('string')|list|length }}"
    "{% endfor %}",
    "searches": "{% set t = 'ab' * 30000000 %}{% for i in range(99999) %}"
    "{{ t.count('ba') }}{% endfor %}",
}
TEXTS = {
    "times": "{{ 'a' * 10**10 }}",
    "times, turned": "{{ 10**10 * 'a' }}",
    "times a list": "{{ [1] * 10**10 }}",
    "doubled by +": doubling("'a'", "{% set ns.x = ns.x + ns.x %}"),
    "doubled by ~": doubling("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
    "one long +": "{% set x = 'a' * 10**6 %}{{ x" + " + x" * 400 + " }}",
    "one long + of lists": "{% set x = [1] * 10**6 %}{{ x" + " + x" * 400 + " }}",
    "one long ~": "{% set x = 'a' * 10**6 %}{{ x" + " ~ x" * 4000 + " }}",
    "doubled by set": doubling(
        "'a'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    ),
    "doubled by join": doubling("'a'", "{% set ns.x = [ns.x, ns.x]|join %}"),
    "doubled by a method": doubling("'a'", "{% set ns.x = ns.x.join(['', '', ns.x]) %}"),
    "doubled by replace": doubling("'aa'", "{% set ns.x = ns.x|replace('a', 'aa') %}"),
    "doubled by format": doubling("'a'", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    "doubled by %": doubling("'a'", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "doubled by a macro": "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% endif %}"
    "{% endmacro %}{{ f('ab', 60) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "center, as a method": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10**8) }}",
    "replace": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "replace, as a filter": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "join": "{{ ('b' * 10**6).join('a' * 10**6) }}",
    "join, as a filter": "{{ ('a' * 10**6)|list|join('b' * 10**6) }}",
    "join of defaults": "{{ range(99999)|map(attribute='x', default='a' * 10**6)|join }}",
    "indent": "{{ ('\n' * 10**6)|indent(10**6) }}",
    "indent by text": "{{ ('\n' * 10**6)|indent('a' * 10**6) }}",
    "format": "{{ '%999999999d' % 1 }}",
    "format, starred": "{{ '%*d' % (999999999, 1) }}",
    "format, as a filter": "{{ '%999999999d'|format(1) }}",
    "format, as a method": "{{ '{:>999999999}'.format(1) }}",
    "format, nested": "{{ '{:>{}}'.format(1, 999999999) }}",
    "format_map": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "mapped": "{{ ['a']|map('center', 10**9)|list }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "json": "{{ range(9999)|list|tojson(indent=10**6) }}",
    "power": "{{ 10**(10**10) }}",
    "product of powers": doubling("3", "{% set ns.x = ns.x * ns.x %}"),
    "rounding": "{{ 1.5|round(10**9, 'floor') }}",
    "a list of itself": doubling("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    "a tuple of itself": doubling("[1]", "{% set ns.x = (ns.x, ns.x) %}"),
    "a mapping of itself": doubling("[1]", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    "a call's arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}"
    "{{ varargs }}{% endif %}{% endmacro %}{{ f(50, 1) }}",
    "dict": doubling("[1]", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "sum of lists": "{{ ([[1] * 999] * 999)|sum(start=[]) }}",
    "text in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endfor %}",
}
ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{{ ('{0.__class__}'|safe).format('') }}",
    "{{ (''|safe).__html__.__globals__ }}",
    "{{ ('{0.__class__}'|e)['format']('') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ dict.__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ loop.__class__ }}{% for a in [1] %}{{ loop._iterable }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages[0].clear() }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{{ lipsum(10**9) }}",
    "{{ (5).to_bytes(10**9) }}",
    "{{ ''.encode().ljust(10**9) }}",
    "{{ ''.translate({}) }}",
    "{{ ('<!--' * 99999)|striptags }}",
    "{{ ('<!--' * 99999)|safe.striptags() }}",
]  # fmt: skip


def chat(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"add_generation_prompt": True})


def spend(render: Any) -> tuple[float, int]:
    """Seconds and bytes (at the peak) that an attempt takes."""
    tracemalloc.start()
    began_s = time.process_time()
    try:
        with contextlib.suppress(*RENDER_ERRORS, UsageError):
            assert render() == "", "it rendered"
        return time.process_time() - began_s, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", LOOPS)
def test_an_endless_chat_template_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_SECONDS", 1.0)
    monkeypatch.setattr(budget, "MAX_STEPS", 50_000)
    seconds, _ = spend(lambda: chat(LOOPS[name]).render(user("x")))
    assert seconds < 8  # with tracemalloc, which is slow, and on any machine


@pytest.mark.parametrize("name", TEXTS)
def test_a_huge_value_is_not_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_CHARS", 2 << 20)
    monkeypatch.setattr(budget, "MAX_STEPS", 50_000)
    seconds, peak_bytes = spend(lambda: chat(TEXTS[name]).render(user("x")))
    assert seconds < 8
    assert peak_bytes < 128 << 20


@pytest.mark.parametrize("source", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(source: str) -> None:
    seconds, peak_bytes = spend(lambda: chat(source).render(user("x")))
    assert seconds < 2
    assert peak_bytes < 32 << 20


@pytest.mark.parametrize("name", ["times", "doubled by join", "center", "format, as a method"])
def test_a_template_of_the_job_has_the_same_limits(name: str) -> None:
    source = TEXTS[name]
    if "namespace" in source:
        source = "{% set x = text %}" + "{% set x = [x, x]|join %}" * 60 + "{{ x }}"
    templates = TemplateSet({"prompt.template": source})
    seconds, peak_bytes = spend(lambda: templates.render({"text": "a"}))
    assert seconds < 2
    assert peak_bytes < 512 << 20


def test_the_row_fails_and_the_next_one_does_not(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MAX_STEPS", 100_000)
    source = "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}{{ text }}"
    builder = make_builder(tokenizer, template=source)
    bad = failure(builder.build([make_row(n=5000, text="a")]))
    assert bad.kind == "template_error"
    assert bad.message == (
        "TemplateLimitError: the template takes more than 100,000 steps over this row"
    )
    for _ in range(3):  # each row has all there is
        (good,) = builder.build([make_row(n=200, text="a")])
        assert tokenizer.decode(good.token_ids) == "a"  # type: ignore[union-attr]


def test_the_limit_on_time_holds_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(budget, "MAX_STEPS", 1 << 60)
    template = chat(LOOPS["nested"])
    errors: list[BaseException] = []

    def work() -> None:
        try:
            template.render(user("x"))
        except jinja2.TemplateError as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert [str(error) for error in errors] == ["the template takes more than 0.3 s over this row"]


@pytest.mark.parametrize(
    "source",
    [
        "x" * (300 << 10),
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{{ " + "-" * 5000 + "1 }}",
        "{{ x" + ".a" * 5000 + " }}",
        "{% for a in b %}" * 50 + "{% endfor %}" * 50,
        "{% if a %}" * 2000 + "{% endif %}" * 2000,
        "{% for a in b recursive %}{{ loop(a) }}{% endfor %}",
        "{{ x|striptags }}",
    ],
)  # fmt: skip
def test_a_source_that_no_compiler_takes(source: str) -> None:
    with pytest.raises(UsageError, match=r"prompt\.template is not a jinja2 template: line \d+: "):
        TemplateSet({"prompt.template": source})
    with pytest.raises(UsageError, match="the chat template cannot be used: line"):
        chat(source)


def deep(depth: int) -> object:
    value: object = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [100, 900, 5000])
def test_a_row_nested_deeply_is_that_rows_failure(tokenizer: Any, depth: int) -> None:
    chat_row = make_row(chat=[{"role": "user", "content": deep(depth)}])
    text_row = make_row(chat='[{"role": "user", "content": ' + "[" * depth + "]" * depth + "}]")
    builder = make_builder(tokenizer, messages_column="chat")
    for row in (chat_row, text_row):
        assert failure(builder.build([row])).kind == "template_error"
    template = PromptSpec(template="{{ chat }}")
    check_first_row(template, chat_row)
    (made,) = make_builder(tokenizer, template="{{ chat }}").build([chat_row])
    assert depth == 100 or isinstance(made, RowFailure)


def test_the_text_of_a_row_may_be_long() -> None:
    text = "word " * (10 << 20)
    (rendered,) = TemplateSet({"prompt.template": "{{ text | upper }}!"}).render({"text": text})
    assert len(rendered.plain) == len(text) + 1
    assert len(chat(CHATML).render(user(text))) > len(text)


PARITY = {
    "chatml": CHATML,
    "namespace": "{% set ns = namespace(n=0, s='') %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% set ns.s = ns.s ~ m.role ~ '/' %}{% endfor %}{{ ns.n }}{{ ns.s }}",
    "macro": "{% macro show(m, end='!') -%}\n  [{{ m['content'] | trim }}]{{ end }}\n"
    "{%- endmacro %}{% for m in messages %}{{ show(m) }}{{ show(m, end='?') }}{% endfor %}",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{{ loop.length }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
    "{{ tools | tojson(separators=(',', ':'), sort_keys=True) }}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content')"
    " | join(', ') }}{{ messages | length }}{{ messages[-1].content.split(' ')[::-1] | list }}"
    "{{ messages | map(attribute='role') | unique | list }}{{ messages[0] | dictsort }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\n{# c #}\n b {{- bos_token }}\n"
    "{% for m in messages %}\n  {{ m.content }}\n{% endfor %}\n",
    "odd values": "{{ messages[0].none }}{{ undefined }}{{ tools is none }}{{ documents }}"
    "{{ 1.5 }}{{ true }}{{ [1, 'a'] }}{{ {'a': none} }}{{ messages[1].get('x', 'y') }}"
    "{{ 'a%s' % 1 }}{{ '{}-{:>3}'.format(1, 2) }}{{ 'a' * 3 }}{{ 2 ** 3 }}{{ 7 % 4 }}"
    "{{ [1] + [2] }}",
    "loop": "{% for k, v in messages[0].items() %}{{ loop.index0 }}{{ loop.revindex }}"
    "{{ k }}{{ v }}"
    "{{ loop.previtem }}{{ loop.nextitem is defined }}{{ loop.last }}{% else %}none{% endfor %}"
    "{% for x in [] %}{% else %}empty{% endfor %}"
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% endfor %}",
}  # fmt: skip
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "one two three <é>"},
    {"role": "assistant", "content": "four", "reasoning": "because"},
    {"role": "user", "content": "five"},
]


@pytest.mark.parametrize("name", PARITY)
def test_a_chat_template_says_what_it_says_in_transformers(name: str) -> None:
    tokenizer = make_tokenizer(PARITY[name])
    given = {"add_generation_prompt": True, "tools": [{"type": "function", "b": 1, "a": None}]}
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, **given)
    template = ChatTemplate(PARITY[name], {**tokenizer.special_tokens_map, **given})
    assert template.render(CHAT) == expected
    assert template.render(CHAT) == expected


@pytest.mark.parametrize("field", [True, "content"])
@pytest.mark.parametrize("source", [CHATML, CHATML.replace("'content']", "'content'] | trim")])
def test_the_last_message_can_be_left_open(source: str, field: object) -> None:
    tokenizer = make_tokenizer(source)
    messages = [*CHAT[:2], {"role": "assistant", "content": "The answer "}]
    expected = tokenizer.apply_chat_template(
        messages, tokenize=False, continue_final_message=field, add_generation_prompt=False
    )
    template = ChatTemplate(source, {"continue_final_message": field})
    assert template.render(messages) == expected


def test_a_message_is_not_both_continued_and_answered() -> None:
    with pytest.raises(UsageError, match="continue_final_message needs add_generation_prompt"):
        ChatTemplate(CHATML, {"continue_final_message": True, "add_generation_prompt": True})
