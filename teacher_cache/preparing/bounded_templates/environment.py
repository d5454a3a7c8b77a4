"""jinja's immutable sandbox, counted, and its exchange for the one that transformers renders with."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import islice
from types import BuiltinFunctionType
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from teacher_cache.errors import CompatibilityError
from teacher_cache.preparing.bounded_templates.counting import (
    HEAVY,
    LAZY_KINDS,
    CountedRow,
    TooMuch,
    heavy,
    here,
    kept,
    limit,
    measure,
    taken,
    turn,
)
from teacher_cache.preparing.bounded_templates.filters import (
    OWN,
    check_bits,
    check_format,
    check_given,
    check_method,
    guarded_filter,
    is_light,
    trim,
    turn_filter,
)
from teacher_cache.preparing.bounded_templates.tree import CountedNode

SOURCE = 1 << 18
"""Characters of a template."""
GATHERED = 8
"""Written pieces between two sums."""
PLAIN = ("length", "count", "first", "last", "default", "d", "abs")
"""Filters that make nothing and take no time."""
JINJAS = ("_loop_vars", "_block_vars")
"""What jinja itself hands to every call in a loop or a block."""
LIGHT = {
    *(
        "strip",
        "lstrip",
        "rstrip",
        "split",
        "rsplit",
        "startswith",
        "endswith",
        "lower",
        "upper",
        "title",
        "capitalize",
    ),
    *("get", "items", "keys", "values", "partition", "rpartition", "splitlines", "find", "rfind", "count", "isdigit"),
}
"""Methods that make nothing larger than what they are called of."""


class bounded:
    """In here a template of transformers is rendered within the bounds; it ends in an exception otherwise, ``TooMuch`` in most cases.
    Outside nothing is counted."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        install()
        self._before = here.row
        here.row = CountedRow()

    def __exit__(self, *_: object) -> None:
        here.row = self._before


@cache
def install() -> None:
    """Exchange transformers' environment of chat templates; CompatibilityError where it has none to exchange."""
    from transformers.utils import chat_template_utils as used

    used.ImmutableSandboxedEnvironment = BoundedEnvironment  # type: ignore[attr-defined, misc]
    with_bounds = False
    if hasattr(used._compile_jinja_template, "cache_clear"):
        used._compile_jinja_template.cache_clear()
        with_bounds = isinstance(used._compile_jinja_template("").environment, BoundedEnvironment)
    if not with_bounds:
        raise CompatibilityError(
            "this release of transformers renders chat templates in a way that cannot be bounded here: install transformers 5.17 to 5.23"
        )


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja's immutable sandbox, counted."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.globals.pop("lipsum", None)
        self._guarded: set[str] = set()

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        if len(source) > SOURCE:
            raise TooMuch(f"it is longer than {SOURCE:,} characters")
        return super()._parse(source, name, filename)

    def _generate(self, source: nodes.Template, *arguments: Any, **settings: Any) -> str:
        for name in self.filters.keys() - self._guarded - {*PLAIN, *OWN}:
            self.filters[name] = trim if name == "trim" else guarded_filter(name, self.filters[name])
            self._guarded.add(name)
        self.filters |= OWN
        return super()._generate(CountedNode().visit(source), *arguments, **settings)

    def _compile(self, source: str, filename: str) -> Any:
        try:
            return super()._compile(source, filename)
        except MemoryError:  # Python's own, of what is nested too deeply for its compiler
            raise TooMuch("it is nested too deeply") from None

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:  # type: ignore[override]
        """Of all that a template writes, and what a macro or a block does."""
        if here.row is None:
            return "".join(pieces)
        total, listed, rest = 0, [], iter(pieces)
        while some := list(islice(rest, GATHERED)):
            total += sum(map(len, some))
            limit(total)
            listed += some
        return "".join(listed)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, (str, bytes)):
            check_format(str(left), right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(one, (int, float)):
                    limit(measure(one) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int):
                check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * max(right, 1) if abs(left) > 1 else 1)
        return kept(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        own = {key: one for key, one in kwargs.items() if key not in JINJAS} if kwargs else kwargs
        if type(__obj) is BuiltinFunctionType and not own and __obj.__name__ in LIGHT and is_light(args):
            owner = __obj.__self__
            if type(owner) is dict or (type(owner) is str and len(owner) < HEAVY):
                return __obj(*args)  # a plain method of a text or a dictionary
        turn()
        if not LAZY_KINDS.isdisjoint(map(type, (*args, *own.values()))):
            args = tuple(taken(one) for one in args)
            kwargs |= {key: taken(one) for key, one in own.items()}
            own = {key: kwargs[key] for key in own}
        given = (*args, *own.values()) if own else args
        check_given(given)
        if type(__obj) is Macro:
            return kept(super().call(__context, __obj, *args, **kwargs))
        if isinstance(__obj, LoopContext) and args:
            args = (turn_filter(__context, args[0]), *args[1:])  # a recursive loop
        # Of `format` the sandbox makes a function of its own.
        function = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(function, "__self__", None)
        heavy((owner,))
        if isinstance(owner, (str, bytes)):
            check_method(function.__name__, owner, given)
        return kept(super().call(__context, __obj, *args, **kwargs))

    def call_test(self, *arguments: Any, **settings: Any) -> Any:
        turn()
        heavy(arguments)
        return super().call_test(*arguments, **settings)
