"""Jinja for templates that nobody has looked at: bounded in time and in memory.

A chat template is a program that comes with a checkpoint. Jinja's sandbox keeps it from the rest of
the process, not from running for ever or from filling the memory: so every step of a loop, every
call, filter and operator is charged here to one budget, and is weighed before it is done.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, cast

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

_CHARACTERS: Final = 10_000_000
# A template may do so much for each character of what it is given
_TIMES: Final = 100
_SECONDS: Final = 5.0
# What a step of a loop, a call, a filter or an operator costs at least
_STEP: Final = 100
_LONGEST_SOURCE: Final = 1_000_000
# What a number takes where it is written out
_NUMBER: Final = 24
_STEPS, _JOIN = "bounded_steps", "bounded_join"
# A width of a million and more, or one that is an argument
_WIDE: Final = re.compile(r"\d{7}|%[^a-zA-Z%]*\*|\{[^}]*\{")


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment for one rendering, with a budget."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self, given: object, **options: Any) -> None:
        """Set the budget.

        Args:
            given: What the template will be given.
            options: As of Jinja's own environment.
        """
        super().__init__(finalize=self._show, **options)
        self._limit = _CHARACTERS + _TIMES * _size(given)
        self._left = self._limit
        self._deadline = time.thread_time() + _SECONDS
        self.filters[_STEPS] = self._steps
        self.filters[_JOIN] = self._join
        # A single call of it may take minutes
        self.globals.pop("lipsum", None)

    def bound_filters(self) -> None:
        """Weigh what filters do; call it when all of them are there."""
        for name, function in self.filters.items():
            if name not in (_STEPS, _JOIN):
                self.filters[name] = self._bounded_filter(function)

    def from_string(self, source: Any, *arguments: Any, **named: Any) -> jinja2.Template:
        """See Jinja; refuses what is too long to be compiled."""
        if len(source) > _LONGEST_SOURCE:
            raise jinja2.TemplateError(f"it has {len(source):,} characters")
        return super().from_string(source, *arguments, **named)

    def call(
        self, context: jinja2.runtime.Context, obj: Any, /, *arguments: Any, **named: Any
    ) -> Any:
        """See Jinja."""
        # The sandbox wraps some methods of texts
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(obj, jinja2.runtime.LoopContext):
            arguments = (self._steps(arguments[0], 0),) if arguments else ()
        is_format = getattr(obj, "__name__", "") in ("format", "format_map")
        if is_format and isinstance(owner, str):
            self._check_format(owner)
        sizes = [
            value if type(value) is int and not is_format else _size(value)
            for value in (*arguments, *named.values())
        ]
        if isinstance(owner, str | list | tuple | dict):
            sizes.append(_size(owner))
        self._weigh(sizes)
        return self._charged(super().call(context, obj, *arguments, **named))

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """See Jinja."""
        if operator == "%" and isinstance(left, str):
            self._check_format(left)
            self._weigh([_size(left), _size(right)])
        elif type(left) is int and type(right) is int:
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            # Beyond a few thousand digits, no number is one of a chat's
            self._weigh([bits * 100])
        elif operator == "*":
            self._weigh([value if type(value) is int else _size(value) for value in (left, right)])
        return self._charged(super().call_binop(context, operator, left, right))

    def _generate(self, source: jinja2.nodes.Template, *arguments: Any, **named: Any) -> str:
        """Put what counts around loops and joins before code is made of a template."""
        for loop in list(source.find_all(jinja2.nodes.For)):
            text = sum(len(part.data) for part in loop.find_all(jinja2.nodes.TemplateData))
            loop.iter = _filtered(loop.iter, _STEPS, jinja2.nodes.Const(text))
        for join in list(source.find_all(jinja2.nodes.Concat)):
            join.nodes = [_filtered(jinja2.nodes.List(join.nodes, lineno=join.lineno), _JOIN)]
        return super()._generate(source, *arguments, **named)

    def _show(self, value: Any) -> Any:
        """Charge what is written out."""
        size = _size(value)
        self._weigh([size])
        self._charge(size)
        return value

    def _steps(self, values: Iterable[Any], text: int) -> Iterator[Any]:
        """Charge every step of a loop, with the plain text that it writes."""
        for value in values:
            self._charge(text + _STEP)
            yield value

    def _join(self, values: list[Any]) -> str:
        self._weigh([_size(values)])
        return str(self._charged("".join(map(str, values))))

    def _bounded_filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Those of Jinja that take a context or an environment first say so in an attribute
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def bounded(*arguments: Any, **named: Any) -> Any:
            value, *others = arguments[first:]
            if isinstance(value, str) and function.__name__ == "do_format":
                self._check_format(value)
            further = (*others, *named.values())
            self._weigh([_size(value), *(v if type(v) is int else _size(v) for v in further)])
            return self._charged(function(*arguments, **named))

        return bounded

    def _check_format(self, text: str) -> None:
        if _WIDE.search(text):
            raise jinja2.TemplateRuntimeError(f"it asks for a width in {text[:80]!r}")

    def _weigh(self, sizes: list[int]) -> None:
        """Refuse an operation before it is done: the largest may be repeated as often as another.

        Jinja has no operation whose result is longer than the product of the two.
        """
        *_, second, first = (1, 1, *sorted(map(abs, sizes)))
        if first * max(second, 1) > self._limit:
            raise jinja2.TemplateRuntimeError(
                f"it makes something that may be {first * max(second, 1):.0e} characters long"
            )

    def _charged(self, value: Any) -> Any:
        self._charge(_STEP + (len(value) if isinstance(value, str | bytes | list | tuple) else 0))
        return value

    def _charge(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise jinja2.TemplateRuntimeError(f"it makes more than {self._limit:,} characters")
        if time.thread_time() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"it runs for more than {_SECONDS:.0f} s")


def _filtered(node: jinja2.nodes.Node, name: str, *arguments: Any) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(
        cast(jinja2.nodes.Expr, node), name, list(arguments), [], None, None, lineno=node.lineno
    )


def _size(value: object, known: dict[int, int] | None = None) -> int:
    """About how long a value is when it is written out.

    A list that is in itself many times over counts as often, and is looked at once.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return _NUMBER
    known = {} if known is None else known
    if id(value) not in known:
        # Until it is known, for a list that is inside itself
        known[id(value)] = 0
        items = value.values() if isinstance(value, dict) else value
        size = sum(_size(item, known) for item in items) + len(value)
        if isinstance(value, dict):
            size += sum(_size(key, known) for key in value)
        known[id(value)] = size
    return known[id(value)]
