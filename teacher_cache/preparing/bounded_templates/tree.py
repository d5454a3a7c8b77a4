"""A template's tree, given the looks at what it makes."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

PIECES = 16
"""Joined in one expression without a look at the sum."""
QUICK_TESTS = {
    *("boolean", "callable", "defined", "divisibleby", "escaped", "even", "false", "filter", "float", "integer"),
    *("iterable", "mapping", "none", "number", "odd", "sameas", "sequence", "string", "test", "true", "undefined"),
}
"""Whatever they are asked of."""
TURN, KEPT, LOOKED, CUT = "kdcli_turn", "kdcli_kept", "kdcli_looked", "kdcli_cut"


class CountedNode(NodeTransformer):
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
