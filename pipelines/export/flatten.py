"""One Python file out of several: a module with everything of the project that it uses, so that it runs where the project is not.

An exported student brings its compressor's own source, not a second version of it. Definitions are taken as text, comments and
docstrings with them; what a module imports from elsewhere stays an import.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from teacher_cache.errors import KdcliError

OWN = ("cli", "pipelines", "student_train", "teacher_cache")
Place = tuple[str, str]
"""(module, name) of a definition on a module's top level."""


@dataclass
class SourceFile:
    """A module's top level: text of every definition by name, and where every imported name comes from."""

    module: str
    order: list[str] = field(default_factory=list)
    text: dict[str, str] = field(default_factory=dict)
    uses: dict[str, set[str]] = field(default_factory=dict)
    imports: dict[str, Place] = field(default_factory=dict)


def flatten(module: str, instead: Mapping[str, str] | None = None) -> str:
    """The module's source without an import of the project.

    Args:
        instead: modules to read in place of others, which define the same names.

    Raises:
        KdcliError: two definitions of one name, or an import that cannot be flattened.
    """
    instead = instead or {}
    wanted = [(module, name) for name in read_source(module).order]
    found = list(dict.fromkeys(_closure(wanted, instead)))
    names = [name for _, name in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise KdcliError(
            f"{module} cannot be one file: {', '.join(twice)} is defined twice in what it uses: rename one"
        )
    pieces = [read_source(where).text[name] for where, name in found]
    return "\n\n\n".join(["from __future__ import annotations\n\n" + _import_block(found), *pieces]) + "\n"


def _import_block(found: list[Place]) -> str:
    """Import statements of what the definitions use from outside of the project, the standard library's first."""
    modules: dict[str, set[str]] = {}
    for module, name in found:
        source = read_source(module)
        for used in source.uses[name] & source.imports.keys():
            origin, original = source.imports[used]
            if origin.split(".")[0] not in OWN:
                renamed = used not in (original, origin.split(".")[0])
                modules.setdefault(origin if original else "", set()).add(
                    (original or origin) + (f" as {used}" if renamed else "")
                )
    lines = [f"import {name}" for name in sorted(modules.pop("", ()))]
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(modules.items())]
    standard = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    return "\n".join([*standard, "", *(line for line in lines if line not in standard)])


def _closure(wanted: list[Place], instead: Mapping[str, str]) -> Iterator[Place]:
    """The definitions and all that they use, used ones first."""
    seen: set[Place] = set()

    def visit(place: Place) -> Iterator[Place]:
        if place in seen:
            return
        seen.add(place)
        module, name = place
        source = read_source(module)
        if name not in source.text:
            if name not in source.imports:
                raise KdcliError(f"{module} defines no {name}")
            yield from visit(_origin(source.imports[name], instead))
            return
        for used in sorted(source.uses[name]):
            if used in source.text:
                yield from visit((module, used))
            elif used in source.imports and _own(source.imports[used]):
                yield from visit(_origin(source.imports[used], instead))
        yield place

    for place in wanted:
        yield from visit(place)


def _origin(place: Place, instead: Mapping[str, str]) -> Place:
    return instead.get(place[0], place[0]), place[1]


def _own(place: Place) -> bool:
    return place[0].split(".")[0] in OWN


@cache
def read_source(module: str) -> SourceFile:
    """Top level of a module of the project, from its file; the module is not run."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin, module
    text = Path(spec.origin).read_text()
    source = SourceFile(module)
    previous = ""
    for node in ast.parse(text).body:
        segment = _segment(text, node)
        if isinstance(node, ast.Import):
            for alias in node.names:
                source.imports[alias.asname or alias.name.split(".")[0]] = (alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                source.imports[alias.asname or alias.name] = (node.module or "", alias.name)
        elif isinstance(node, ast.Expr) and previous:  # the docstring of a constant
            source.text[previous] += f"\n{segment}"
        for name in _defined(node):
            source.order.append(name)
            source.text[name] = segment
            source.uses[name] = _used(node) - {name}
            previous = name
    source.imports.pop("annotations", None)
    _join_shared(source)
    return source


def _join_shared(source: SourceFile) -> None:
    """``a = b = value`` and ``a, b = values`` define several names in one text: the first stands for all."""
    for i, name in enumerate(source.order):
        first = next(one for one in source.order if source.text[one] == source.text[name])
        if first != name and i:
            source.text[name] = f"{name} = {first}"
            source.uses[name] = {first}


def _segment(text: str, node: ast.stmt) -> str:
    lines = text.splitlines()
    start = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    return "\n".join(lines[start - 1 : node.end_lineno])


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]


def _used(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
