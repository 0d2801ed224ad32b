"""Jinja's immutable sandbox with limits on what a template may spend (`budget`).

Templates are the job's, chat templates a stranger's, and what they work on is data. The sandbox
keeps them from Python's insides; the limits from eating the machine:

- every iteration of a loop and every call is a step, whose price grows with the template's length;
- every text, list or mapping that an operator, literal, slice, filter or call makes is paid for,
  and what can be large from small operands is checked before it is made;
- methods of texts, bytes and numbers are those that are known to be linear, and filters that are
  not are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro
from jinja2.utils import Namespace

from batchgen.prompts.budget import Budget
from batchgen.prompts.checked_calls import CHECKED_METHODS, FILTER_CHECKS, Counted, checked_method
from batchgen.prompts.symbols import Symbol, Trace, Untraceable

MAX_TEMPLATE_CHARS = 256 << 10
_CHARS_PER_STEP = 64  # of template that a step may run through
_CHARS_PER_SCAN = 4096  # of text that a method or filter goes through in the time of a step

_DICT_ATTRIBUTES = frozenset(dir(dict))
_MAX_KNOWN_ATTRIBUTES = 1024
_METHODS = (BuiltinMethodType, MethodType)
_SIZED = (str, list, tuple)

_FORMAT_METHODS = frozenset({"format", "format_map"})
_TEXT_METHODS = CHECKED_METHODS | {
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable",
    "isspace", "istitle", "isupper", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "swapcase", "title", "upper",
}  # fmt: skip
_BYTES_METHODS = frozenset({"decode", "hex", "startswith", "endswith", "find", "count"})
# Not linear, or of no use in a prompt.
_LEFT_OUT_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")


# What a text is, by jinja's tests.
_TESTS_OF_TEXTS = ("string", "iterable", "sequence")
# Filters that do with a symbol what they do with a text.
_FILTERS_OF_SYMBOLS = frozenset({"default", "d"})


class SafeNamespace(Namespace):
    """jinja's `namespace` without Python's insides, and without its values when written."""

    def __init__(self, /, *args: Any, **values: object) -> None:
        super().__init__()
        for name, value in dict(*args, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"{name!r} may not be set on a namespace")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "namespace"


def _holds_for_symbols(test: Callable[..., Any]) -> Callable[..., bool]:
    return lambda value: type(value) is Symbol or bool(test(value))


def _is_same(value: object, other: object) -> bool:
    if type(value) is Symbol or type(other) is Symbol:
        raise Untraceable  # two texts that are equal may be one object, or not
    return value is other


def _filtered_symbol(name: str, value: Symbol, args: Any, kwargs: Any) -> Symbol:
    """A text that is traced, after a filter. Raises Untraceable for all filters but two."""
    if args or kwargs or name not in ("trim", "string"):
        raise Untraceable
    return value.strip() if name == "trim" else value


class _BoundedCode(CodeGenerator):
    """Compiles what makes values or repeats work to go through the environment's checks."""

    def _output_child_to_const(self, node: Any, frame: Any, finalize: Any) -> str:
        const: str = super()._output_child_to_const(node, frame, finalize)
        if not isinstance(node, jinja2.nodes.TemplateData):
            self.environment.add_constant(const)  # type: ignore[attr-defined]
        return const

    def visit_For(self, node: jinja2.nodes.For, frame: Any) -> None:
        if node.recursive:
            self.fail("recursive loops are not supported", node.lineno)
        counted = jinja2.nodes.EnvironmentAttribute("counted")
        node.iter = jinja2.nodes.Call(counted, [node.iter], [], None, None)
        super().visit_For(node, frame)

    def visit_Call(self, node: Any, frame: Any, **options: Any) -> None:  # type: ignore[override]
        if isinstance(node.node, jinja2.nodes.EnvironmentAttribute):  # from visit_For
            self.write(f"environment.{node.node.name}(")
            self.visit(node.args[0], frame)
            self.write(")")
        else:
            super().visit_Call(node, frame, **options)

    def visit_Add(self, node: jinja2.nodes.BinExpr, frame: Any) -> None:
        terms: list[jinja2.nodes.Expr] = []
        left: jinja2.nodes.Expr = node
        while isinstance(left, jinja2.nodes.Add):  # a + b + c is one sum: chat templates add a lot
            terms.append(left.right)
            left = left.left
        self.write("environment.added(")
        self.visit(left, frame)
        for term in reversed(terms):
            self.write(", ")
            self.visit(term, frame)
        self.write(")")

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            self._made(super().visit_Concat, node, frame)
            return
        self.write("environment.concatenated(")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write(")")

    def visit_List(self, node: jinja2.nodes.List, frame: Any) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: jinja2.nodes.Dict, frame: Any) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: jinja2.nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, jinja2.nodes.Slice):
            self._made(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _made(self, visit: Callable[[Any, Any], None], node: Any, frame: Any) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class _BoundedFormatter(jinja2.sandbox.SandboxedFormatter):
    def __init__(self, environment: BoundedEnvironment) -> None:
        super().__init__(environment)
        self._budget = environment.budget

    def format_field(self, value: Any, format_spec: str) -> str:
        self._budget.format(format_spec)
        text: str = super().format_field(value, format_spec)
        self._budget.chars(len(text))
        return text


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment whose templates cannot take more than `budget` allows.

    `budget.start()` goes before every rendering. For one thread at a time.
    """

    code_generator_class = _BoundedCode
    intercepted_binops = frozenset({"*", "**", "%"})  # beside +, in _BoundedCode

    def __init__(self, **options: Any) -> None:
        self.budget = Budget()
        self.trace: Trace | None = None  # that is under way
        self._is_safe: dict[tuple[type, str], bool] = {}
        self._step_cost = 1
        self._template_chars = 0
        # Folding constants would compute them in the compiler, before there is a row to fail.
        super().__init__(optimized=False, **options)
        self.globals.pop("lipsum", None)
        self.globals["namespace"] = SafeNamespace
        self.globals["dict"] = lambda *args, **values: dict(*args, **values)
        for name in _TESTS_OF_TEXTS:
            self.tests[name] = _holds_for_symbols(self.tests[name])  # type: ignore[arg-type]
        self.tests["sameas"] = _is_same
        for name in _LEFT_OUT_FILTERS:
            del self.filters[name]
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, or replace one, and pay for what it makes."""
        check = FILTER_CHECKS.get(name)
        num_own = 1 if hasattr(function, "jinja_pass_arg") else 0  # arguments from jinja

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            value = args[num_own]
            if self.trace is not None and name == "random":
                raise Untraceable
            if type(value) is Symbol and name not in _FILTERS_OF_SYMBOLS:
                return _filtered_symbol(name, value, args[num_own + 1 :], kwargs)
            self.budget.step(len(value) // _CHARS_PER_SCAN if isinstance(value, str) else 1)
            if check is not None:
                args = (*args[:num_own], *check(self.budget, args[num_own:], kwargs))
            value = function(*args, **kwargs)
            self.budget.result(value)
            return value

        self.filters[name] = bounded

    def compile_bounded(self, source: str) -> jinja2.Template:
        """The template of a source. Raises jinja2.TemplateSyntaxError, whatever is wrong."""
        if len(source) > MAX_TEMPLATE_CHARS:
            problem = f"it has {len(source):,} characters, more than {MAX_TEMPLATE_CHARS:,}"
            raise jinja2.TemplateSyntaxError(problem, 1)
        self.budget.start()
        self.add_constant(source)
        try:
            return self.from_string(source)
        except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
            # Of Python's compiler, which has limits of its own on nesting.
            problem = f"it is nested too deeply, or not possible: {type(error).__name__}"
            raise jinja2.TemplateSyntaxError(problem, 1) from error

    def add_constant(self, text: str) -> None:
        """Note text that a single step may write."""
        self._template_chars += len(text)
        self._step_cost = 1 + self._template_chars // _CHARS_PER_STEP
        self.budget.chars(len(text))

    def made(self, value: Any) -> Any:
        """The value, paid for."""
        if type(value) is str:
            self.budget.chars(len(value))
        else:
            self.budget.result(value)
        return value

    def added(self, total: Any, *terms: Any) -> Any:
        """The sum, paid for."""
        for term in terms:
            total = total + term
            if isinstance(total, _SIZED) and len(total) > self.budget.chars_left:
                break  # made() raises
        return self.made(total)

    def concatenated(self, *values: Any) -> Any:
        """The values as one text, paid for."""
        if self.trace is None:
            pieces = list(map(str, values))
            self.budget.chars(sum(map(len, pieces)))
            return "".join(pieces)
        texts = [value if type(value) is Symbol else str(value) for value in values]
        return self.made(self.trace.joined(texts))

    def concat(self, pieces: Iterable[str]) -> Any:
        """What a macro or a block has written, as one text."""
        return "".join(pieces) if self.trace is None else self.trace.joined(pieces)

    def counted(self, items: Any) -> Any:
        """What a loop goes over, with its length if it has one."""
        if isinstance(items, jinja2.Undefined):
            return items  # raises or is empty, as it likes
        return Counted(items, self.budget, self._step_cost)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self.budget.repeated(left, right)
        elif operator == "**":
            self.budget.power(left, right)
        elif operator == "%" and isinstance(left, str | bytes):
            self.budget.format(str(left))
        return self.made(self.binop_table[operator](left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = __self.budget
        budget.step(__self._step_cost)
        if isinstance(__obj, _METHODS):
            if isinstance(__obj.__self__, str):
                budget.step(len(__obj.__self__) // _CHARS_PER_SCAN)
                if __obj.__name__ in CHECKED_METHODS:
                    args = checked_method(budget, __obj, args, kwargs)
        elif isinstance(__obj, Macro):
            budget.tree((args, kwargs))
        value = super().call(__context, __obj, *args, **kwargs)
        budget.result(value)
        return value

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if not isinstance(value, BuiltinMethodType) or value.__name__ not in _FORMAT_METHODS:
            return None
        text = value.__self__
        if type(text) is not str:
            return None
        vformat = _BoundedFormatter(self).vformat
        if value.__name__ == "format_map":
            return lambda mapping: vformat(text, (), mapping)
        return lambda *args, **kwargs: vformat(text, args, kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) is Symbol:
            raise Untraceable  # jinja looks for an attribute of that name, too
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is Symbol:
            return obj.method(attribute)
        # What jinja does too, but by way of an exception.
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = (type(obj), attr)
        is_safe = self._is_safe.get(key)
        if is_safe is None:
            if len(self._is_safe) >= _MAX_KNOWN_ATTRIBUTES:
                self._is_safe.clear()
            is_safe = self._is_safe[key] = self._find_safe(obj, attr, value)
        return is_safe

    def _find_safe(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a type's attribute may be read: that depends on nothing else."""
        if isinstance(obj, str):
            # Of a str's own format, wrap_str_format has made a harmless one.
            return attr in _TEXT_METHODS
        if isinstance(obj, bytes | bytearray):
            return attr in _BYTES_METHODS
        return attr != "to_bytes" and super().is_safe_attribute(obj, attr, value)
