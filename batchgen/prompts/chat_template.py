"""A model's chat template, as transformers runs it, within the limits of the sandbox.

transformers sets none on time or memory, and a chat template is a stranger's program.

Source for what a chat template may use (variables, tags, filters):
https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.parser import Parser

from batchgen.errors import UsageError
from batchgen.prompts.sandbox import BoundedEnvironment
from batchgen.prompts.tracing import Symbol, Texts, TracedTemplate

_END_OF_OPEN_MESSAGE = "END_OF_OPEN_MESSAGE "
# The names that a message's reasoning goes by; templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PLAIN_KEYS = ("role", "content")
_JSON_SCALARS = (str, int, float, bool, type(None))

Messages = Sequence[Mapping[str, object]]


class ChatTemplate:
    """A compiled chat template with its variables. For one thread."""

    def __init__(self, source: str, variables: Mapping[str, object]) -> None:
        """`variables` are what the template sees beside the messages.

        `continue_final_message` among them leaves the last message open, as in transformers.
        Raises UsageError for a template that cannot be compiled.
        """
        self._environment = _environment()
        given = {"tools": None, "documents": None, **variables}
        self._open_field = given.pop("continue_final_message", False)
        if self._open_field and given.get("add_generation_prompt"):
            raise UsageError(
                "prompt.chat_template_kwargs: continue_final_message needs add_generation_prompt "
                "to be false: the last message is either continued or answered"
            )
        self._variables = {name: _plain(value) for name, value in given.items()}
        try:
            self._template = self._environment.compile_bounded(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template cannot be used: line {error.lineno}: {error.message}"
            ) from error
        self._traced = TracedTemplate(self._generate, self._environment, str)

    def render(self, messages: Messages) -> str:
        """The chat as text. Raises one of templates.RENDER_ERRORS."""
        if not self._open_field and all(map(_is_plain_message, messages)):
            roles = tuple(message["role"] for message in messages)
            texts = [str(message["content"]) for message in messages]
            return "".join(self._traced.render(roles, texts, self._context_of(roles)))
        chat = [_with_reasoning(_plain(message)) for message in messages]
        if self._open_field:
            return self._render_open(chat)
        return self._render(chat)

    def _context_of(self, roles: Sequence[object]) -> Callable[[Sequence[object]], dict[str, Any]]:
        def context(texts: Sequence[object]) -> dict[str, Any]:
            pairs = zip(roles, texts, strict=True)
            chat = [{"role": role, "content": text} for role, text in pairs]
            return {"messages": chat, **self._variables}

        return context

    def _render(self, chat: list[dict[str, Any]]) -> str:
        return "".join(self._generate({"messages": chat, **self._variables}))

    def _generate(self, context: Mapping[str, object]) -> list[str]:
        self._environment.budget.start()
        return list(self._template.generate(context))

    def _render_open(self, chat: list[dict[str, Any]]) -> str:
        """The chat up to the end of its last message's text, which is marked to find it."""
        name = self._open_field if isinstance(self._open_field, str) else "content"
        last = chat[-1]
        text = last.get(name)
        if isinstance(text, list):
            blocks = [block for block in text if isinstance(block, dict) and "text" in block]
            last, name = (blocks or [{}])[-1], "text"
            text = last.get(name)
        if not isinstance(text, str):
            raise ValueError("continue_final_message is set, and the last message has no text")
        last[name] = text + _END_OF_OPEN_MESSAGE
        rendered = self._render(chat)
        end = rendered.rfind(_END_OF_OPEN_MESSAGE.strip())
        if end < 0:
            raise ValueError("the chat template does not write the last message's text")
        # Without its last space the template has trimmed the text, and is to have it trimmed.
        is_whole = rendered.startswith(_END_OF_OPEN_MESSAGE, end)
        return rendered[:end] if is_whole else rendered[:end].rstrip()


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's words for training, and changes nothing."""

    tags = {"generation"}  # noqa: RUF012  jinja's own way

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    budget = environment.budget

    def written(value: object) -> str:
        if type(value) is Symbol:
            return value.written()
        text = value if type(value) is str else str(value)
        budget.chars(len(text))
        return text

    environment.finalize = written
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = functools.partial(_strftime_now, environment)
    return environment


@dataclass(frozen=True, slots=True)
class _Now:
    """The time, as a question that a way through the template depends on."""

    form: str

    def answer(self, _: Texts = ()) -> str:
        return datetime.now().strftime(self.form)


def _strftime_now(environment: BoundedEnvironment, form: str) -> str:
    now = _Now(form)
    return now.answer() if environment.trace is None else str(environment.trace.ask(now))


def _is_plain_message(message: Mapping[str, object]) -> bool:
    return tuple(message) == _PLAIN_KEYS and all(type(each) is str for each in message.values())


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _plain(value: Any) -> Any:
    """The value as what JSON has; of anything else the name of its type."""
    if type(value) in _JSON_SCALARS:
        return value
    if isinstance(value, dict):
        return {
            _plain(key): item if type(item) is str else _plain(item) for key, item in value.items()
        }
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates look for."""
    if message.keys().isdisjoint(_REASONING):
        return message
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}
