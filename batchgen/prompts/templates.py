"""The job's own jinja templates: `prompt.messages` and `prompt.template`.

They render to pieces rather than to one string, so that it stays known which characters come
from the row: jinja hands each `{{ expression }}` to `finalize`, whose result it yields as it is,
and the template's own text it yields as plain strings. What a filter makes of a value is
therefore still data, and no marker characters are needed that data could hold or a filter lose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.exceptions import SecurityError

from batchgen.errors import UsageError
from batchgen.prompts.sandbox import BoundedEnvironment
from batchgen.prompts.symbols import Symbol
from batchgen.prompts.tracing import TracedTemplate

# What a template may raise over the values of one row; jinja2 lets Python's own errors through.
RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,  # RecursionError too
)


_REFUSED_BLOCKS: dict[type[jinja2.nodes.Node], str] = {
    jinja2.nodes.FilterBlock: "apply the filter inside {{ }}",
    jinja2.nodes.CallBlock: "call the macro inside {{ }}",
    jinja2.nodes.ScopedEvalContextModifier: "apply `escape` inside {{ }}, not {% autoescape %}",
    jinja2.nodes.Include: "write its text here",
    jinja2.nodes.Import: "write its macros here",
    jinja2.nodes.FromImport: "write its macros here",
    jinja2.nodes.Extends: "write its text here",
}


class Data(str):
    """Text that a `{{ expression }}` put into a prompt: the row's, not the template's."""

    __slots__ = ()

    def __str__(self) -> str:
        return self  # str(data) in jinja's compiled code must not lose the type


@dataclass(frozen=True, slots=True)
class Text:
    """A rendered text that knows which of its pieces (of type `Data`) come from the row."""

    pieces: tuple[str, ...]

    @property
    def plain(self) -> str:
        return "".join(self.pieces)

    @property
    def data(self) -> list[Data]:
        return [piece for piece in self.pieces if isinstance(piece, Data)]

    def data_spans(self) -> list[tuple[int, int]]:
        """Where the data is, as character ranges of `plain`."""
        spans = []
        end = 0
        for piece in self.pieces:
            start, end = end, end + len(piece)
            if isinstance(piece, Data):
                spans.append((start, end))
        return spans

    def map_data(self, change: Callable[[Data], str]) -> Text:
        """The text with each piece of data replaced."""
        return Text(
            tuple(
                Data(change(piece)) if isinstance(piece, Data) else piece for piece in self.pieces
            )
        )

    def replaced(self, replacements: Sequence[tuple[int, int, str]]) -> Text:
        """The text with (start, end, data) put in place of ranges, sorted and disjoint."""
        pieces: list[str] = []
        offset = 0
        for piece in self.pieces:
            kind = type(piece)
            cursor, end = offset, offset + len(piece)
            for start, stop, data in replacements:
                if start >= end or stop <= cursor:
                    continue
                pieces.append(kind(piece[cursor - offset : max(start, cursor) - offset]))
                if start >= offset:
                    pieces.append(Data(data))
                cursor = min(stop, end)
            pieces.append(kind(piece[cursor - offset :]))
            offset = end
        return Text(tuple(piece for piece in pieces if piece))


class Null(jinja2.StrictUndefined):
    """A null of the row: false, `is none`, replaceable by `default`, and an error as text."""

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False

    def __eq__(self, other: object) -> bool:  # type: ignore[override]  # StrictUndefined raises
        return other is None or isinstance(other, Null)

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not self == other

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(None)

    def __repr__(self) -> NoReturn:
        self._fail_with_undefined_error()


def _with_nulls(value: object, path: str) -> object:
    """The value with every None, at any depth, as a `Null` that knows its path."""
    if value is None:
        return Null(hint=f"{path} is null", exc=jinja2.UndefinedError)
    if isinstance(value, dict):
        return {key: _with_nulls(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nulls(item, f"{path}[{index}]") for index, item in enumerate(value)]
    return value


def _dump_json(value: object, indent: int | None = None) -> str:
    def null(item: object) -> None:
        if not isinstance(item, Null):
            raise TypeError(f"a value of type {type(item).__name__} cannot be written as JSON")

    return json.dumps(value, ensure_ascii=False, indent=indent, default=null)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(undefined=jinja2.StrictUndefined)
    budget = environment.budget

    def finalize(value: object) -> str:
        if type(value) is Symbol:
            return value.written()
        if value is None:
            raise jinja2.UndefinedError("an expression of the template is null")
        data = Data(value)
        budget.chars(len(data))
        return data

    environment.finalize = finalize
    # Names that jinja itself defines would hide a misspelt column, or a column of that name.
    environment.globals = {"range": environment.globals["range"]}
    environment.tests["none"] = lambda value: value is None or isinstance(value, Null)
    environment.add_filter("tojson", _dump_json)
    del environment.filters["random"]  # a row is the same after a restart
    return environment


class TemplateSet:
    """The templates of one job, compiled once. Raises UsageError for what cannot be compiled."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        """`sources` maps where a template stands in the job file to its text."""
        environment = self._environment = _environment()
        self._templates: list[tuple[str, jinja2.Template]] = []
        self._traced: list[tuple[Sequence[str], TracedTemplate]] = []  # columns, by template
        self._constants: dict[int, Text] = {}  # of templates without any expression
        columns: set[str] = set()
        for where, source in sources.items():
            try:
                template = environment.compile_bounded(source)
                tree = environment.parse(source)
            except jinja2.TemplateSyntaxError as error:
                raise UsageError(
                    f"{where} is not a jinja2 template: line {error.lineno}: {error.message}"
                ) from error
            _refuse_blocks(tree, where)
            if _is_literal(tree):
                self._constants[len(self._templates)] = Text((template.render(),))
            names = sorted(jinja2.meta.find_undeclared_variables(tree))
            columns.update(names)
            # jinja makes a ChainMap of them, and walks it with every row.
            template.globals = dict(template.globals)
            self._templates.append((where, template))
            self._traced.append((names, self._trace(template)))
        self.columns = frozenset(columns)

    def render(self, values: Mapping[str, object]) -> list[Text]:
        """One text for each template, in order. Raises one of RENDER_ERRORS."""
        texts = []
        for index, (names, template) in enumerate(self._traced):
            text = self._constants.get(index)
            texts.append(_render(names, template, values) if text is None else text)
        return texts

    def _trace(self, template: jinja2.Template) -> TracedTemplate:
        environment = self._environment

        def generate(context: Mapping[str, object]) -> Sequence[str]:
            environment.budget.start()
            return list(template.generate(context))

        return TracedTemplate(generate, environment, Data)

    def check(self, values: Mapping[str, object]) -> None:
        """Render one row to see that the sandbox lets the templates through.

        Raises UsageError when it does not. Anything else is that row's failure, not the job's.
        """
        try:
            context = {
                name: _with_nulls(value, f"column {name!r}") for name, value in values.items()
            }
        except RecursionError:
            return
        for where, template in self._templates:
            self._environment.budget.start()
            try:
                template.render(context)
            except SecurityError as error:
                raise UsageError(f"{where} does what a template may not do: {error}") from error
            except RENDER_ERRORS:
                continue


def _render(names: Sequence[str], template: TracedTemplate, values: Mapping[str, object]) -> Text:
    """The template's text over these columns of a row."""
    texts = [value for name in names if type(value := values.get(name)) is str]
    if len(texts) == len(names):
        pieces = template.render(None, texts, lambda texts: dict(zip(names, texts, strict=True)))
    else:
        context = {
            name: _with_nulls(values[name], f"column {name!r}") for name in names if name in values
        }
        pieces = template.generate(context)
    return Text(tuple(pieces))


def _refuse_blocks(tree: jinja2.nodes.Template, where: str) -> None:
    """Refuse the blocks whose output no longer tells data from the template's text, and files."""
    for kind, advice in _REFUSED_BLOCKS.items():
        block = tree.find(kind)
        if block is not None:
            raise UsageError(
                f"{where} uses a {kind.__name__} in line {block.lineno}, which is not "
                f"supported; {advice}"
            )


def _is_literal(tree: jinja2.nodes.Template) -> bool:
    return all(
        isinstance(output, jinja2.nodes.Output)
        and all(isinstance(node, jinja2.nodes.TemplateData) for node in output.nodes)
        for output in tree.body
    )
