"""Templates that are traced give what they give when they are run for every row."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from model_chat_templates import MODEL_CHAT_TEMPLATES
from prompt_factories import CHATML, make_tokenizer

from batchgen.errors import UsageError
from batchgen.prompts import budget, symbols
from batchgen.prompts import chat_template as chat_template_module
from batchgen.prompts.budget import TemplateLimitError
from batchgen.prompts.chat_template import ChatTemplate
from batchgen.prompts.symbols import Texts
from batchgen.prompts.templates import RENDER_ERRORS, Data, TemplateSet
from batchgen.prompts.tracing import MakeContext, TracedTemplate

# Random templates may be code that Python's compiler warns of, such as 5[:2].
pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")

TEXTS = (
    "", " ", "\n", "\n\n x\n", "a", "ab", "b", "A", " a ", "x\u00a0", "</think>", "e\u0301", "é",
    "1", "<think>\nwhy\n</think>\n\nyes", "<tool_response>r</tool_response>", "{{ a }}",
    "{% raw %}", "n", "<|im_end|>", "\ue000", "\ufdd0", "real", "first", "content", "x /no_think",
    "%s", "{}", "/nothink", "aaa\nb", "😀", "<b>&'\"", "None", "True", "user",
)  # fmt: skip
KWARGS = {"add_generation_prompt": True}
CHATML_TEMPLATES = {"chatml": CHATML, **MODEL_CHAT_TEMPLATES}


def result_of(render: Callable[[Any], Any], row: object) -> Any:
    """What it gives, or the type of error that it raises, with its text."""
    try:
        return render(row)
    except TemplateLimitError:
        raise  # nothing here should take so much
    except RENDER_ERRORS as error:
        return type(error), str(error)


def count_runs(template: Any) -> list[None]:
    """A list with an item for each time that the template is run from now on."""
    runs: list[None] = []
    generate = template.generate

    def counted(context: Mapping[str, object]) -> Sequence[str]:
        runs.append(None)
        pieces: Sequence[str] = generate(context)
        return pieces

    template.generate = counted
    return runs


TOKENIZER = make_tokenizer()


def reference(source: str, messages: list[dict[str, str]]) -> Any:
    """What transformers makes of a chat."""

    def render(chat: list[dict[str, str]]) -> object:
        return TOKENIZER.apply_chat_template(chat, chat_template=source, tokenize=False, **KWARGS)

    return result_of(render, messages)


def chat_template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {**TOKENIZER.special_tokens_map, **KWARGS})


def chat(*turns: str) -> list[dict[str, str]]:
    """A chat of these texts, after a system prompt, the user's first."""
    roles = ["system"] + ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


chats = st.builds(
    lambda roles, texts: [
        {"role": role, "content": text} for role, text in zip(roles, texts, strict=False)
    ],
    st.sampled_from(
        [("user",), ("system", "user"), ("system", "user", "assistant", "user"),
         ("user", "assistant"), ("assistant", "user"), ("system", "system", "user", "tool")]
    ),
    st.lists(
        st.sampled_from(TEXTS) | st.builds(str.__add__, st.sampled_from(TEXTS), st.text()),
        min_size=4,
        max_size=4,
    ),
)  # fmt: skip


@pytest.mark.parametrize("name", CHATML_TEMPLATES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(chats, max_size=12))
def test_chats_are_those_of_transformers(name: str, rows: list[list[dict[str, str]]]) -> None:
    source = CHATML_TEMPLATES[name]
    template = chat_template(source)
    for messages in rows:
        assert result_of(template.render, messages) == reference(source, messages)


@pytest.mark.parametrize("name", sorted(set(CHATML_TEMPLATES) - {"smollm3"}))
def test_chat_templates_of_models_are_run_for_the_first_row_only(name: str) -> None:
    template = chat_template(CHATML_TEMPLATES[name])
    template.render(chat("Be brief.", "What is it?"))
    runs = count_runs(template._traced)
    template.render(chat("Be kind.", "Who?"))
    template.render(chat("Be quick.", " Where? \n"))
    assert not runs
    template.render(chat("Be brief.", "What?", "This.", "Why?"))
    assert len(runs) == 2  # to render, and to trace
    template.render(chat("Be kind.", "Who?", "She.", "Where?"))
    assert len(runs) == 2


# Of expressions, conditions and statements. T is an expression, C a condition, S statements.
EXPRESSIONS = (
    "m.content", "m.content", "m['content']", "messages[0].content", "messages[-1]['content']",
    "(T | trim)", "T.strip()", "T.lstrip('\\n')", "T.rstrip('ab')", "T.strip(none)", "(T ~ 'x')",
    "(1 ~ T ~ T)", "('<' + T + '>')", "m.role", "(T | default('d'))", "(T | d('e', true))",
    "(T | string)", "(T | upper)", "(T | replace('a', 'b'))", "T.replace('a', '')",
    "T.split('</think>')[-1]", "T[:3]", "T[0]", "('%s' % T)", "'{}'.format(T)", "ns.x", "f(T)",
    "(T or 'e')", "(T and 'e')", "(T if C else T)", "([T, 'b'] | join('-'))", "(T | tojson)",
    "(T | length)", "{'a': 1, 'b': 2}.get(T, 'n')", "ns[T]", "m[T]", "(T | attr('real'))",
    "m.get('content')", "(messages | map(attribute='content') | first)",
    "(messages | map(attribute='content') | map('trim') | last)", "([T] | first)", "(T | first)",
    "(T | indent(2))", "(T | int(7))", "('x' | int(T))", "(T * 2)", "[T]", "(T, T)[1]", "T.foo",
    "('a,b' | replace(',', T))", "{'k': T}.k", "(T | e)", "(T | safe)", "cycler(T, 'c').next()",
    "joiner(T)()", "loop.cycle(T, 'c')", "loop.previtem.content", "[T, T] | unique | list | length",
    "(messages | selectattr('content', 'equalto', T) | list | length)", "(T | title)", "loop.index",
    "(messages | groupby('content') | length)", "(messages | sort(attribute='content') | length)",
    "(messages | selectattr('content') | list | length)", "T.startswith('a')",
    "(T | reverse | join)", "[T].index('a')", "[T, 'a'].count('a')", "(none | default(T))",
    "dict(k=T)['k']", "b", "(T | capitalize)", "(T | lower)", "(T | truncate(3))",
    "'a'.join([T, T])", "(T % ())",
)  # fmt: skip
CONDITIONS = (
    "'a' in T", "'a' not in T", "T in 'abc'", "T == 'a'", "T != ''", "'a' == T", "T == T",
    "T.startswith('a')", "T.endswith(('a', 'b'))", "T is string", "T is defined", "T is none",
    "T is iterable", "T is sequence", "T is mapping", "T is number", "T is boolean", "T is true",
    "T is callable", "T is sameas T", "T is lower", "T is eq('a')", "T is in ['a', 'b']",
    "T in ['a', 'ab', none]", "T in ('a', T)", "not C", "(C and C)", "(C or C)", "T", "loop.first",
    "loop.last", "m.role == 'user'", "(T | length) > 1", "T < 'b'", "T == none", "T == 1",
    "[T] == ['a']", "{'k': T} == {'k': 'a'}", "T in {'a': 1}", "loop.changed(T)", "T is escaped",
    "T.strip == T.strip", "T.strip is defined", "T is undefined", "x is defined", "T > T",
    "(T ~ 'x') == 'ax'", "'\\n' in (T | trim)", "f(T) == '[a]'", "T.strip() is sameas T",
)  # fmt: skip
STATEMENTS = (
    "{{ T }}", "{{ T }}", "{{ T }}", "words ", "{% if C %}S{% endif %}",
    "{% if C %}S{% else %}S{% endif %}", "{% if C %}S{% elif C %}S{% else %}S{% endif %}",
    "{% set ns.x = T %}", "{% set ns.x = ns.x ~ T %}", "{% set b %}S{% endset %}{{ b }}",
    "{{ f(T) }}", "{% call g(T) %}S{% endcall %}",
    "{% if C %}{{ raise_exception('no') }}{% endif %}", "{% filter trim %}S{% endfilter %}",
    "{% for n in messages[:2] %}{{ n.content }}{% if C %}S{% endif %}{% endfor %}",
    "{% for n in messages %}{% if C %}{% break %}{% endif %}{{ n.content }}{% endfor %}",
    "{% for n in messages %}{% if C %}{% continue %}{% endif %}S{% endfor %}",
    "{% generation %}S{% endgeneration %}", "{% set b = T %}", "{% with b = T %}S{% endwith %}",
    "{% autoescape true %}S{% endautoescape %}", "{% for c in T %}{{ c }}{% endfor %}",
)  # fmt: skip
FRAME = (
    "{% set ns = namespace(x='', a='1') %}{% set b = 'bb' %}"
    "{% macro f(t) %}[{{ t }}{% if t %}+{% endif %}]{% endmacro %}"
    "{% macro g(t) %}{{ caller() }}{{ t | trim }}{% endmacro %}"
    "{% for m in messages %}BODY{% endfor %}"
)


@st.composite
def templates(
    draw: st.DrawFn,
    statements: Sequence[str],
    expressions: Sequence[str],
    conditions: Sequence[str],
) -> str:
    """Statements, nested a little."""

    def expand(source: str, depth: int) -> str:
        for sign, choices in (("S", statements), ("C", conditions), ("T", expressions)):
            parts = source.split(sign)
            # Only a letter by itself is a sign.
            source = parts[0]
            for part in parts[1:]:
                alone = not (source[-1:].isalnum() or part[:1].isalnum())
                source += (grow(choices, depth - 1) if alone else sign) + part
        return source

    def grow(choices: Sequence[str], depth: int) -> str:
        simple = choices[:2] if depth < 0 else choices
        return expand(draw(st.sampled_from(simple)), depth)

    return "".join(grow(statements, 3) for _ in range(draw(st.integers(1, 4))))


class Untraced:
    """A TracedTemplate that is run for every row."""

    def __init__(self, template: TracedTemplate) -> None:
        self.generate = template.generate

    def render(self, _: object, texts: Texts, make_context: MakeContext) -> Sequence[str]:
        return self.generate(make_context(texts))


def compiled_or_rejected(source: str) -> ChatTemplate:
    try:
        return chat_template(source)
    except UsageError:
        reject()


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=templates(STATEMENTS, EXPRESSIONS, CONDITIONS),
    rows=st.lists(chats, min_size=2, max_size=8),
)
def test_chats_in_random_templates(body: str, rows: list[list[dict[str, str]]]) -> None:
    source = FRAME.replace("BODY", body)
    template, untraced = compiled_or_rejected(source), compiled_or_rejected(source)
    untraced._traced = Untraced(untraced._traced)  # type: ignore[assignment]
    for messages in rows:
        result = result_of(template.render, messages)
        assert result == result_of(untraced.render, messages)
        expected = reference(source, messages)
        # Errors name types, which are others there.
        assert result == expected or (type(result) is type(expected) is tuple)


JOB_EXPRESSIONS = (
    "a", "b", "c", "a", "(T | trim)", "T.strip()", "(T ~ 'x')", "(T + '!')", "('<' + T)",
    "(T | upper)", "(T | default('d'))", "(T or 'e')", "(T if C else T)", "(T | length)",
    "(T | tojson)", "f(T)", "T.split()[0]", "T[:2]", "('%s: %s' % (T, T))", "'{}'.format(T)",
    "[T, T] | join", "'words'", "(T | string)", "(T | int(3))", "[T] | first", "(T | indent)",
    "T.missing", "{'a': 'b'}[T]",
)  # fmt: skip
JOB_STATEMENTS = (
    "{{ T }}", "{{ T }}", "words ", "{% if C %}S{% else %}S{% endif %}", "{% if C %}S{% endif %}",
    "{% set b = T %}", "{% set d %}S{% endset %}{{ d }}",
    "{% for i in range(2) %}{{ i }}S{% endfor %}", "{% block name %}S{% endblock %}",
    "{{ self.name() }}",
)  # fmt: skip
JOB_CONDITIONS = tuple(
    condition
    for condition in CONDITIONS
    if "m." not in condition and "loop" not in condition and "x is" not in condition
)
values = st.one_of(st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.none(), st.integers(0, 2))


def plain_jinja(source: str) -> jinja2.Template:
    """The template without any of batchgen's own code, but for how null and JSON are written."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        optimized=False,  # folded constants may be code that Python's compiler warns of: 5[:2]
    )
    environment.globals = {"range": range}
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=templates(JOB_STATEMENTS, JOB_EXPRESSIONS, JOB_CONDITIONS),
    rows=st.lists(st.fixed_dictionaries({"a": values, "b": values, "c": values}), max_size=12),
)
def test_prompts_of_random_templates(body: str, rows: list[dict[str, object]]) -> None:
    source = "{% macro f(t) %}[{{ t }}{% if t %}+{% endif %}]{% endmacro %}" + body
    try:
        plain = plain_jinja(source)
        templates, untraced = TemplateSet({"a": source}), TemplateSet({"a": source})
    except (UsageError, jinja2.TemplateSyntaxError, SyntaxError):
        reject()
    untraced._traced = [
        (names, Untraced(template))  # type: ignore[misc]
        for names, template in untraced._traced
    ]
    for row in rows:
        result = result_of(templates.render, row)
        expected = result_of(untraced.render, row)
        assert result == expected
        if not isinstance(result, tuple):
            pieces, expected_pieces = result[0].pieces, expected[0].pieces
            assert list(map(type, pieces)) == list(map(type, expected_pieces))
            if None not in row.values():
                assert "".join(pieces) == plain.render(row)


def test_what_a_traced_prompt_has_of_the_row_is_known_as_data() -> None:
    source = "{% set d %}<{{ a }}>{% endset %}x{{ a }}{{ 'y' + a }}{{ d }}{{ a ~ 1 }}"
    templates = TemplateSet({"a": source})
    runs = count_runs(templates._traced[0][1])
    for text in ("one", "", "<|im_end|>"):
        (rendered,) = templates.render({"a": text})
        assert rendered.data == [text, "y" + text, f"<{text}>", text + "1"]
        assert all(type(piece) in (str, Data) for piece in rendered.pieces)
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        # What jinja finds by a text, or takes for the same as another text.
        ("{% set ns = namespace(a=1) %}{{ ns[messages[1].content] }}", ["x", "a", "b"]),
        ("{{ (5)[messages[1].content] }}", ["x", "real", "y"]),
        ("{{ messages[0].content is sameas messages[1].content }}", ["x", "", "y"]),
        # Two of a text's methods may be equal.
        ("{% set m = messages[1].content %}{{ m if m.strip == m.strip else 'n' }}", ["n", "y"]),
        # An empty text is like a symbol that got lost.
        ("{% autoescape true %}{{ messages[1].content }}{% endautoescape %}", ["", "<b>"]),
        ("{% set x %}{{ messages[1].content }}{% endset %}{{ x }}", ["", "<b>"]),
        ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[1].content) }}", ["", "<b>"]),
        # Answers that differ between rows after several that are alike.
        ("{% set c = messages[1].content %}{{ 1 if 'a' in c or 'b' in c else 2 }}", [*"xaxbcab"]),
    ],
)
def test_rows_do_not_decide_for_other_rows(source: str, texts: list[str]) -> None:
    template = chat_template(source)
    for text in texts:
        messages = chat("", text)
        assert template.render(messages) == reference(source, messages)


def test_a_random_choice_is_made_for_every_row() -> None:
    template = chat_template("{{ ['a', 'b'] | random }}")
    assert {template.render(chat("x")) for _ in range(30)} == {"a", "b"}
    assert {template.render(chat("x")) for _ in range(30)} == {"a", "b"}


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(200) %}{{ messages[0].content }}{% endfor %}",
        "{% for i in range(200) %}{{ messages[0].get('content') == 'x' }}{% endfor %}",
        "{% for i in range(200) %}{% set x = messages[0].content.strip() %}{% endfor %}",
        "{% for i in range(200) %}{% set x = messages[0].content ~ '' %}{% endfor %}",
        "{% set x = [messages[0].content] * 200 %}",
        "{% macro f(x) %}{% endmacro %}{{ f([messages[0].content] * 200) }}",
    ],
)
def test_a_long_text_does_not_pass_the_budget_by_a_short_one_s_way(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(budget, "MAX_CHARS", 200_000)
    template = chat_template(source)
    template.render(chat("short"))
    template.render(chat("words"))
    with pytest.raises(TemplateLimitError):
        template.render(chat("long" * 1000))


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% set ns.x = ns.x + messages[0].content %}{% endfor %}",
        "{% for i in range(16) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
        + "{% set y = ns.x" + " + ns.x" * 400 + " %}",
        "{% for i in range(16) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
        + "{% set y = ns.x" + " ~ ns.x" * 4000 + " %}",
    ],
)  # fmt: skip
def test_a_trace_takes_no_more_than_a_rendering_may(source: str) -> None:
    """An empty text can be added without end, and costs nothing."""
    template = chat_template("{% set ns = namespace(x=messages[0].content) %}" + source)
    tracemalloc.start()
    try:
        began_s = time.process_time()
        assert template.render(chat("")) == ""
        assert time.process_time() - began_s < 5
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_chat_of_more_texts_than_a_trace_takes_is_rendered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(symbols, "_MAX_PARTS", 3)
    template = chat_template("{{ messages[-1].content }}")
    for turns in ("ab", "abcd", "abce"):
        assert template.render(chat(*turns)) == turns[-1]


def test_the_time_is_the_row_s(monkeypatch: pytest.MonkeyPatch) -> None:
    template = chat_template("{{ strftime_now('%H') }} {{ messages[0].content }}")
    for hour in ("07", "07", "08", "07"):
        now = SimpleNamespace(now=lambda hour=hour: SimpleNamespace(strftime=lambda _: hour))
        monkeypatch.setattr(chat_template_module, "datetime", now)
        assert template.render(chat(hour + "h")) == f"{hour} {hour}h"
