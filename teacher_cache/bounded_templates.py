"""Chat templates are programs of a stranger: here they run with a bound on their turns, their time and what they make.

transformers renders them in jinja's sandbox, which keeps them from files and modules, but not from looping for ever or from a text of
ten billion letters. Its environment is exchanged for one that counts. What is counted: every turn of a loop, call and filter; the size of
whatever is stored, handed over, or written; and, before it is made, what an operation on sizes would make (``*``, widths, ``replace``).
Between two of these a template can grow a text only by as many pieces as stand in one expression. The clock is looked at inside of loops
and by every operation on a large value, wherever it stands, since one of them may take milliseconds. Honest templates stay orders of
magnitude below every bound, so what they write is the same, to the letter.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, wraps
from itertools import islice
from threading import local
from types import BuiltinFunctionType, GeneratorType
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg, pass_context
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from teacher_cache.errors import CompatibilityError

TURNS = 1_000_000
"""Of loops, calls and filters, for one row. A row of 1,000 turns takes some 40,000."""
SECONDS = 2.0
"""Of this thread's processor time, for one row; plain ones take a thousandth of it."""
LARGEST = 4_000_000
"""Characters (and items) of one value: a million tokens."""
ITEM = 8
"""Characters that an item of a list stands for."""
MADE = 64_000_000
"""Characters of all larger values together that one row makes."""
SMALL = 1024
"""Characters of a value that is not counted."""
SOURCE = 1 << 18
"""Characters of a template."""
MADE_ONE_BY_ONE = (GeneratorType, map, filter, zip)
LAZY_KINDS = frozenset(MADE_ONE_BY_ONE)
LISTS: tuple[type, ...] = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
WITH_LENGTH: frozenset[type] = frozenset({str, bytes, dict, Markup, *LISTS})
DEEPEST = 64
"""Lists in lists."""
GATHERED = 8
"""Written pieces between two sums."""
BITS = 4096
"""Of a whole number."""
PIECES = 16
"""Joined in one expression without a look at the sum."""
FEW_TURNS = 8
"""Of a loop that is counted as its most, without a look at the clock."""
LOOK_EVERY = 64
"""Turns between two looks at the clock."""
HEAVY = 4096
"""Characters or items of a value whose every use is a reason to look at the clock."""
SETS = 256
"""Characters that a text may be stripped of."""
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
FEW = ("replace", "string", "tojson", "capitalize", "title", "items", "lower", "upper", "safe", "float")
"""Filters that make little of little."""
LAZY = ("map", "select", "reject", "selectattr", "rejectattr")
SLOW = ("urlize", "striptags", "wordwrap", "pprint", "int", "xmlattr")
"""Filters whose time may grow with the square of their input."""
SLOW_INPUT = 1 << 14
BY_ATTRIBUTE = ("sort", "groupby", "unique", "min", "max", "sum", "join", *LAZY)
"""Filters that may look up an attribute (several, with dots and commas) of every item."""
LOOKED_INTO = {*BY_ATTRIBUTE, *SLOW, "indent", "tojson", "round", "replace", "format"}
"""Filters of whose arguments more is asked than their size."""
BACKWARDS = ("rfind", "rindex", "rsplit", "rpartition")
"""Methods whose time grows with the product of both texts."""
ENCODINGS = ("utf-8", "utf8", "utf-16", "utf-32", "ascii", "latin-1")
"""Of long texts; others may take the square of their length."""
QUICK_TESTS = {
    *("boolean", "callable", "defined", "divisibleby", "escaped", "even", "false", "filter", "float", "integer"),
    *("iterable", "mapping", "none", "number", "odd", "sameas", "sequence", "string", "test", "true", "undefined"),
}
"""Whatever they are asked of."""
TURN, KEPT, LOOKED, CUT = "kdcli_turn", "kdcli_kept", "kdcli_looked", "kdcli_cut"
WIDTHS = re.compile(r"%[^a-zA-Z%{}]*\*|:[^{}]*\{")
"""In a format: a width that comes from elsewhere."""
NUMBERS = re.compile(r"\d+", re.ASCII)


class TooMuch(Exception):
    """What a template does is beyond a bound."""


class _Row:
    """What is left to the row that this thread renders."""

    __slots__ = ("known", "looks", "made", "turns", "until")

    def __init__(self) -> None:
        self.turns, self.made, self.looks = TURNS, MADE, 0
        self.until = 0.0  # of the thread's clock; 0: it was not looked at yet
        self.known: Known = {}


class _Here(local):
    row: _Row | None = None


Known = dict[int, tuple[Any, int, int]]
"""By identity: the list (kept, so that no other takes its identity), its size, how deeply it is nested. No template changes a list."""
_here = _Here()


class bounded:
    """In here a template of transformers is rendered within the bounds; it ends in an exception otherwise, ``TooMuch`` in most cases.
    Outside nothing is counted."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        install()
        self._before = _here.row
        _here.row = _Row()

    def __exit__(self, *_: object) -> None:
        _here.row = self._before


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


def turn(count: int = 1) -> None:
    row = _here.row
    if row is None:
        return
    row.turns -= count
    row.looks += 1
    if row.turns < 0:
        raise TooMuch(f"it takes more than {TURNS:,} turns for one row")
    if not row.looks % LOOK_EVERY:
        clock(row)


def clock(row: _Row) -> None:
    now = time.thread_time()
    row.until = row.until or now + SECONDS
    if now > row.until:
        raise TooMuch(f"it takes more than {SECONDS:g} seconds for one row")


def heavy(values: Iterable[Any]) -> None:
    """A look at the clock where one of them is large."""
    for one in values:
        if type(one) in WITH_LENGTH and len(one) >= HEAVY and (row := _here.row) is not None:
            clock(row)
            return


def kept(value: Any) -> Any:
    """``value``, where it is not too large to be stored, handed over or written."""
    kind = type(value)
    if kind is str:
        if len(value) < SMALL:
            return value
    elif kind is int or kind is bool or value is None:
        return value
    row = _here.row
    if row is None or id(value) in row.known:
        return value
    size = measure(value)
    if size >= SMALL:
        row.made -= size
        if row.made < 0:
            raise TooMuch(f"it makes more than {MADE:,} characters for one row")
    return value


def measure(value: Any) -> int:
    """Characters and items, those that stand in several places counted in each."""
    row = _here.row
    if row is None:
        return 0
    size, _ = _measured(value, row.known)
    limit(size)
    return size


def _measured(value: Any, known: Known) -> tuple[int, int]:
    """(size, depth)"""
    kind = type(value)
    if kind is str:
        return len(value), 0
    if kind in LISTS:
        parts = value
    elif isinstance(value, dict):
        parts = (*value.keys(), *value.values())
    elif isinstance(value, (str, bytes)):
        return len(value), 0
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    else:
        return 1, 0
    if found := known.get(id(value)):
        return found[1:]
    total, depth = 1, 0
    for one in parts:
        if isinstance(one, Namespace):
            raise TooMuch("it puts a namespace into a list")
        size, below = _measured(one, known)
        total += ITEM + size
        depth = max(depth, below + 1)
        if total > LARGEST:
            limit(total)
    if depth > DEEPEST:
        raise TooMuch("it puts lists into lists too deeply")
    known[id(value)] = value, total, depth
    return total, depth


def limit(size: int) -> None:
    if size > LARGEST and _here.row is not None:
        raise TooMuch(f"it makes a value of more than {LARGEST:,} characters")


def taken(values: Any) -> Any:
    """What is made one by one, as a list within the bounds; anything else as it is."""
    if type(values) not in MADE_ONE_BY_ONE:
        return values
    listed, size = [], 0
    for one in values:
        turn()
        size += ITEM + measure(one)
        limit(size)
        listed.append(one)
    return listed


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
            self.filters[name] = _trim if name == "trim" else _guarded_filter(name, self.filters[name])
            self._guarded.add(name)
        self.filters |= OWN
        return super()._generate(_Counted().visit(source), *arguments, **settings)

    def _compile(self, source: str, filename: str) -> Any:
        try:
            return super()._compile(source, filename)
        except MemoryError:  # Python's own, of what is nested too deeply for its compiler
            raise TooMuch("it is nested too deeply") from None

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:  # type: ignore[override]
        """Of all that a template writes, and what a macro or a block does."""
        if _here.row is None:
            return "".join(pieces)
        total, listed, rest = 0, [], iter(pieces)
        while some := list(islice(rest, GATHERED)):
            total += sum(map(len, some))
            limit(total)
            listed += some
        return "".join(listed)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_format(str(left), right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(one, (int, float)):
                    limit(measure(one) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 1) if abs(left) > 1 else 1)
        return kept(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        own = {key: one for key, one in kwargs.items() if key not in JINJAS} if kwargs else kwargs
        if type(__obj) is BuiltinFunctionType and not own and __obj.__name__ in LIGHT and _is_light(args):
            owner = __obj.__self__
            if type(owner) is dict or (type(owner) is str and len(owner) < HEAVY):
                return __obj(*args)  # a plain method of a text or a dictionary
        turn()
        if not LAZY_KINDS.isdisjoint(map(type, (*args, *own.values()))):
            args = tuple(taken(one) for one in args)
            kwargs |= {key: taken(one) for key, one in own.items()}
            own = {key: kwargs[key] for key in own}
        given = (*args, *own.values()) if own else args
        _check_given(given)
        if type(__obj) is Macro:
            return kept(super().call(__context, __obj, *args, **kwargs))
        if isinstance(__obj, LoopContext) and args:
            args = (_turn_filter(__context, args[0]), *args[1:])  # a recursive loop
        # Of `format` the sandbox makes a function of its own.
        function = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(function, "__self__", None)
        heavy((owner,))
        if isinstance(owner, (str, bytes)):
            _check_method(function.__name__, owner, given)
        return kept(super().call(__context, __obj, *args, **kwargs))

    def call_test(self, *arguments: Any, **settings: Any) -> Any:
        turn()
        heavy(arguments)
        return super().call_test(*arguments, **settings)


def _is_light(args: tuple[Any, ...]) -> bool:
    """Whether a call has nothing but short texts and small numbers to store."""
    for one in args:
        kind = type(one)
        if kind is str:
            if len(one) > SETS:
                return False
        elif kind is int:
            if not -SETS < one < SETS:
                return False
        elif one is not None and kind is not bool:
            return False
    return True


@pass_context
def _turn_filter(context: Any, values: Any) -> Any:
    """Of what a loop goes through: all its turns are counted before the first."""
    if type(values) is not list:
        values = taken(values)
        if not hasattr(values, "__len__"):
            return values
    if len(values) > FEW_TURNS:
        turn(len(values) + 1)
        return _Turns(values)
    if (row := _here.row) is not None:  # the same, for the many short loops of honest templates
        row.turns -= FEW_TURNS
        row.looks += 1
        if row.turns < 0 or not row.looks % LOOK_EVERY:
            turn()
            clock(row)
    return values


class _Turns:
    """What a longer loop goes through, with looks at the clock on the way."""

    __slots__ = ("values",)

    def __init__(self, values: Any):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        rest = iter(self.values)
        while some := list(islice(rest, LOOK_EVERY)):
            if (row := _here.row) is not None:
                clock(row)
            yield from some


@pass_context
def _kept_filter(context: Any, value: Any) -> Any:
    return value if type(value) is str and len(value) < SMALL else kept(value)


@pass_context
def _looked_filter(context: Any, value: Any) -> Any:
    if type(value) in WITH_LENGTH and len(value) >= HEAVY and (row := _here.row) is not None:
        clock(row)
    return value


@pass_context
def _cut_filter(context: Any, value: Any) -> Any:
    """A part of a list counts by its items alone: what is in them was there before."""
    if type(value) not in (list, tuple):
        return _kept_filter(context, value)
    if len(value) >= SMALL and (row := _here.row) is not None:
        clock(row)
        row.made -= ITEM * len(value)
        if row.made < 0:
            raise TooMuch(f"it makes more than {MADE:,} characters for one row")
    return value


OWN: dict[str, Callable[..., Any]] = {
    TURN: _turn_filter,
    KEPT: _kept_filter,
    LOOKED: _looked_filter,
    CUT: _cut_filter,
}
"""Filters that the tree of a template is given (``_Counted``)."""


def _trim(value: Any, chars: str | None = None) -> str:
    """jinja's own, of few characters."""
    if chars is not None and len(chars) > SETS:
        raise TooMuch("it strips a text of too many characters")
    return (value if isinstance(value, str) else str(kept(value))).strip(chars)


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if _PassArg.from_obj(function) else 0

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        turn()
        if not kwargs and name in FEW and _is_light(args[first:]):
            return function(*args)
        if name not in LAZY:
            args = tuple(taken(one) for one in args)
        given = [*args, *kwargs.values()]
        _check_given(given)
        if name not in LOOKED_INTO:
            return kept(function(*args, **kwargs))
        texts: list[Any] = [one for one in given if isinstance(one, (str, bytes))]
        numbers = [abs(one) for one in given if isinstance(one, int)]
        if name in LAZY and texts and isinstance(args[1 if len(args) > 1 else 0], str) and len(texts[0]) > SLOW_INPUT:
            raise TooMuch(f"its filter {name} goes through a long text")
        if name in SLOW and any(
            measure(one) > SLOW_INPUT for one in given if isinstance(one, (str, list, tuple, dict))
        ):
            raise TooMuch(f"its filter {name} is given a long text")
        if name == "indent" and numbers and texts:
            limit(len(texts[0]) + (texts[0].count("\n") + 1) * max(numbers))
        if name == "tojson" and len(given) > first + 1:
            rest = sum(measure(one) for one in given[first + 1 :])
            limit(measure(args[first]) * max([rest, *numbers]))
        if name in BY_ATTRIBUTE:
            _check_by_attribute(name, given[first:], kwargs, texts)
        if name == "indent" and len(texts) > 1:
            limit((texts[0].count("\n") + 1) * max(map(len, texts[1:])))
        if name == "round" and len(numbers) and max(numbers[-1:]) > SLOW_INPUT and len(given) > 1:
            raise TooMuch("it rounds to too many digits")
        if name == "replace" and len(texts) > 2:
            _check_method("replace", texts[0], tuple(texts[1:]))
        if name == "format" and texts:
            _check_format(str(texts[0]), tuple(given[1:]))
        if name == "join":
            _check_join(given)
        return kept(function(*args, **kwargs))

    return guarded


def _check_by_attribute(name: str, given: list[Any], kwargs: Mapping[str, Any], texts: list[Any]) -> None:
    """What is looked up of every item, and what stands in for it where an item has none."""
    count = len(given[0]) if hasattr(given[0], "__len__") else 1
    named = [one for one in texts if one is not given[0] and name != "join"]
    steps = sum(1 + one.count(".") + one.count(",") for one in named if len(one) < LARGEST)
    turn(count * steps)
    if name in ("groupby", *LAZY) and "default" in kwargs:
        limit(count * measure(kwargs["default"]))
    elif name == "groupby" and len(given) > 2:
        limit(count * measure(given[2]))
    if name == "sum" and any(isinstance(one, (str, list, tuple)) for one in (*given[2:], kwargs.get("start"))):
        limit(count * measure(given[0]))  # each sum is a new list


def _check_given(values: Iterable[Any]) -> None:
    """What is handed over is stored under the name of a parameter."""
    for one in values:
        kind = type(one)
        if kind in WITH_LENGTH:
            size = len(one)
            if kind is not str or size >= SMALL:
                kept(one)
            if size >= HEAVY and (row := _here.row) is not None:
                clock(row)
        elif kind is int and abs(one) > LARGEST:
            raise TooMuch("it calls with a number beyond a million")


def _check_join(given: list[Any]) -> None:
    between = max((len(one) for one in given[1:] if isinstance(one, (str, bytes))), default=0)
    for one in given:
        if isinstance(one, (str, list, tuple, dict)):
            limit(len(one) * (between + 1))


def _check_method(name: str, text: Any, args: tuple[Any, ...]) -> None:
    texts: list[Any] = [one for one in args if isinstance(one, (str, bytes))]
    if name == "replace" and len(texts) > 1:
        found = text.count(texts[0]) if len(texts[0]) else len(text) + 1
        limit(len(text) + found * len(texts[1]))
    elif name == "expandtabs":
        limit(
            len(text)
            + text.count("\t" if isinstance(text, str) else b"\t")
            * max([8, *(one for one in args if isinstance(one, int))])
        )
    elif name == "join":
        limit(sum(len(text) + 1 for _ in args[0]) if args and hasattr(args[0], "__len__") else 0)
    elif name == "translate":
        limit(len(text) * max(1, sum(measure(one) for one in args)))
    elif name in ("strip", "lstrip", "rstrip") and texts and len(texts[0]) > SETS:
        raise TooMuch("it strips a text of too many characters")
    elif name in BACKWARDS and texts:
        limit(len(text) * len(texts[0]) // ITEM)
    elif name in ("encode", "decode") and len(text) > SETS and any(one.lower() not in ENCODINGS for one in texts[:1]):
        raise TooMuch(f"it asks for the encoding {texts[0][:40]!r} of a long text")
    elif name in ("format", "format_map"):
        _check_format(text, args)


def _check_format(text: str, values: tuple[Any, ...]) -> None:
    if WIDTHS.search(text):
        raise TooMuch("it formats with too large a width")
    numbers = NUMBERS.findall(text)
    if any(len(one) > 7 for one in numbers):
        raise TooMuch("it formats with too large a width")
    fields = text.count("%") + text.count("{")
    limit(len(text) + sum(map(int, numbers)) + fields * max((measure(one) for one in values), default=0))


def _check_bits(bits: int) -> None:
    if bits > BITS and _here.row is not None:
        raise TooMuch("it computes with too large a number")


class _Counted(NodeTransformer):
    """A template's tree with the looks in it."""

    def generic_visit(self, node: Any, *arguments: Any, **settings: Any) -> Any:
        """What is put together in the middle of an expression, or cut, is looked at where it is made."""
        super().generic_visit(node, *arguments, **settings)
        if isinstance(node, (nodes.Output, nodes.Add, nodes.Concat)):
            return node
        for name, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, name, [_looked_at_if_made(one) for one in value])
            else:
                setattr(node, name, _looked_at_if_made(value))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, CUT) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        left: nodes.Node = node.expr
        for operand in node.ops:
            right = operand.expr
            if operand.op in ("in", "notin"):
                if not isinstance(right, (nodes.Literal, nodes.Filter)):
                    operand.expr = _filtered(right, LOOKED)
            elif not _is_quick(left) and not _is_quick(right):
                operand.expr = _filtered(right, LOOKED)
            left = right
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.name not in QUICK_TESTS and not (node.args and _is_quick(node.args[0])):
            node.node = _filtered(node.node, LOOKED)
            node.args = [_filtered(one, LOOKED) for one in node.args]
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, TURN)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = _looked_at(node.node)
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:
        self.generic_visit(node)
        node.values = [_looked_at(one) for one in node.values]
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.defaults = [_looked_at(one) for one in node.defaults]
        return self._buffered(node)

    visit_CallBlock = visit_Macro

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        return self._buffered(node)

    visit_FilterBlock = visit_AssignBlock

    def _buffered(self, node: Any) -> nodes.Node:
        """What is written in here is gathered first: each piece is looked at."""
        for written in node.find_all(nodes.Output):
            written.nodes = [
                one if isinstance(one, nodes.TemplateData) else _looked_at(one, True) for one in written.nodes
            ]
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered(one, KEPT) if _joins(one) else one for one in node.nodes]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, KEPT) if _pieces(node) > PIECES else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        rest = list(node.nodes)
        while len(rest) > PIECES:
            rest = [_filtered(nodes.Concat(rest[:PIECES]), KEPT), *rest[PIECES:]]
        node.nodes = rest
        return _filtered(node, KEPT) if _pieces(node) > PIECES else node


def _looked_at(node: Any, written: bool = False) -> Any:
    """An expression that makes a text or a list, with a look at it; filters and calls look themselves."""
    kinds: tuple[type, ...] = (
        nodes.Add,
        nodes.Concat,
        nodes.List,
        nodes.Tuple,
        nodes.Dict,
        nodes.CondExpr,
        nodes.Or,
        nodes.And,
    )
    if written:
        kinds = (*kinds, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Filter)
    if not isinstance(node, kinds) or (isinstance(node, nodes.Add) and _is_count(node.right)):
        return node
    return _filtered(node, KEPT)


def _looked_at_if_made(node: Any) -> Any:
    if not isinstance(node, (nodes.Add, nodes.Concat)) or (isinstance(node, nodes.Add) and _is_count(node.right)):
        return node
    return _filtered(node, KEPT)


def _is_quick(node: nodes.Node) -> bool:
    """Whether comparing with it takes no time, whatever the other side is."""
    return isinstance(node, (nodes.Const, nodes.Compare, nodes.Test, nodes.Not, nodes.Neg, nodes.Mod, nodes.Sub))


def _joins(node: nodes.Expr) -> bool:
    """Whether it puts two texts together of which neither stands in the template."""
    return (
        isinstance(node, (nodes.Add, nodes.Concat))
        and sum(not isinstance(one, nodes.Const) for one in _leaves(node)) > 1
    )


def _leaves(node: nodes.Node) -> list[nodes.Node]:
    if not isinstance(node, (nodes.Add, nodes.Concat)):
        return [node]
    return [leaf for one in node.iter_child_nodes() for leaf in _leaves(one)]


def _is_count(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, int)


def _filtered(node: Any, name: str) -> nodes.Filter:
    # Of the context, so that nothing is computed while the template is compiled.
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _pieces(node: nodes.Node) -> int:
    """How many values are put together in this expression without a look."""
    if isinstance(node, nodes.Filter) and node.name == KEPT:
        return 1
    return sum(map(_pieces, node.iter_child_nodes())) or 1
