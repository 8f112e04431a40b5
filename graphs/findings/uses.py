"""How a number that the host read is used: told from the source of the function that reads it, else from later operators."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator, Sequence
from typing import Any

from graphs.contract.host_values import HostRead
from graphs.findings.cures import ADDRESSING, ARITHMETIC, BOUND, CONTROL_FLOW
from graphs.watch import Operation, TensorUse

_CONVERSIONS = {"__int__": "int", "__float__": "float", "__bool__": "bool"}
_PASSED_ON = frozenset(
    "int float bool abs min max round sum len divmod list tuple sorted set enumerate zip reversed ceil floor".split()  # noqa: SIM905
)
_SIZES = frozenset(
    "arange zeros ones empty full rand randn eye linspace new_zeros new_ones new_empty new_full view reshape expand repeat "  # noqa: SIM905
    "topk split chunk unflatten nonzero_static repeat_interleave tril_indices triu_indices".split()
)
_POSITIONS = frozenset("select index_select narrow roll gather index_copy_ index_fill_".split())  # noqa: SIM905
_ROLES = {
    ADDRESSING: frozenset(("index", "start", "storage_offset", "shifts", "diagonal", "offset")),
    BOUND: frozenset("size sizes split_size split_sizes shape length end k repeats steps output_size n m pad".split()),  # noqa: SIM905
    ARITHMETIC: frozenset("other value alpha beta exponent fill_value scalar min max eps p".split()),  # noqa: SIM905
}


def uses_of(read: HostRead, operations: Sequence[Operation]) -> set[str]:
    """The classes of a number's uses; empty where they cannot be told.

    Args:
        read: what was read, and where.
        operations: the operators of the step.
    """
    if read.function in ("__contains__", "__bool__"):
        return {CONTROL_FLOW}
    found = _source_uses(read, operations[read.index + 1 :])
    if found:
        return found
    following = next((o for o in operations[read.index + 1 :] if not o.func._schema.name.endswith("_local_scalar_dense")), None)
    if following is None:
        return set()
    if following.frame == read.frame:
        found = _roles(read, [following])
    scope = _scope(_tree("".join(linecache.getlines(read.frame[0]))), read.frame[1])
    return found or _roles(read, [o for o in operations[read.index + 1 :] if _within(o, read.frame[0], scope)])


def _within(operation: Operation, file: str, scope: ast.AST) -> bool:
    return operation.frame[0] == file and scope.lineno <= operation.frame[1] <= scope.end_lineno  # type: ignore[attr-defined]


def _roles(read: HostRead, operations: Sequence[Operation]) -> set[str]:
    """Classes of the arguments, of these operators, that hold the value. Small numbers would be found everywhere."""
    values = {v for v in (read.value if isinstance(read.value, list) else [read.value]) if type(v) in (int, float)}
    values = {value for value in values if len(operations) == 1 or value not in (-2, -1, 0, 1, 2)}
    held = {
        name
        for operation in operations
        for name, value in operation.named()
        if any(number in values for number in _numbers(value))
    }
    return {role for role, names in _ROLES.items() if names & held}


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, TensorUse):
        return
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif type(value) in (int, float):
        yield value


@functools.lru_cache(maxsize=64)
def _tree(source: str) -> ast.Module:
    """The syntax tree of a file, each node with its ``parent``; an empty one where the source is not that of Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell of a notebook with magic commands
        tree = ast.parse("")
    tree.lineno, tree.end_lineno = 1, 1 << 30  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


def _scope(tree: ast.Module, line: int) -> ast.AST:
    """The innermost function around a line, or the module."""
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and _covers(n, line)]
    return max(functions, key=lambda node: node.lineno, default=tree)  # type: ignore[arg-type, return-value]


def _covers(node: ast.AST, line: int) -> bool:
    return getattr(node, "lineno", line + 1) <= line <= getattr(node, "end_lineno", 0)


def _source_uses(read: HostRead, operations: Sequence[Operation]) -> set[str]:
    """Classes met by following the value through the expressions and names of its function."""
    scope = _scope(_tree("".join(linecache.getlines(read.frame[0]))), read.frame[1])
    flow = _Flow([operation for operation in operations if operation.frame[0] == read.frame[0]])
    for node in ast.walk(scope):
        if _covers(node, read.frame[1]) and _asks(node, read.function):
            flow.follow(node)
    names: set[str] = set()
    while flow.names - names:
        new, names = flow.names - names, set(flow.names)
        for node in ast.walk(scope):
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load) and ast.unparse(node) in new:
                flow.follow(node)
    return flow.classes


def _asks(node: ast.AST, function: str) -> bool:
    """Whether an expression is one by which ``function`` of torch is called."""
    if isinstance(node, ast.Call):
        called = _last_name(node.func)
        return called == _CONVERSIONS.get(function, function)
    parent = getattr(node, "parent", None)
    if function in ("__getitem__", "__setitem__"):  # an index or the bounds of a slice, unpacked by torch
        return isinstance(parent, (ast.Subscript, ast.Slice)) and node is not getattr(parent, "value", None) and _varies(node)
    indexed = isinstance(parent, ast.Subscript) and node is parent.slice
    ranged = isinstance(parent, ast.Call) and _last_name(parent.func) == "range"
    return function == "__index__" and (indexed or ranged) and _varies(node)


def _varies(node: ast.AST) -> bool:
    return isinstance(node, ast.expr) and not isinstance(node, (ast.Constant, ast.Slice, ast.Tuple))


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


class _Flow:
    """Where a value goes: classes of its uses met so far, and names that hold it."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations
        self.classes: set[str] = set()
        self.names: set[str] = set()

    def follow(self, node: ast.AST) -> None:
        """Climb from an expression that has the value to what is done with it."""
        parent = getattr(node, "parent", None)
        while parent is not None:
            if isinstance(parent, (ast.BinOp, ast.AugAssign)) and self._scales_a_tensor(parent):
                self.classes.add(ARITHMETIC)
                return
            if self._ends(node, parent):
                return
            node, parent = parent, getattr(parent, "parent", None)

    def _scales_a_tensor(self, node: ast.BinOp | ast.AugAssign) -> bool:
        """Whether a calculation is that of an operator which takes a number that is not written in the source."""
        parent = getattr(node, "parent", None)
        if isinstance(parent, (ast.Slice, ast.Subscript)) or _is_number(node):
            return False
        written = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
        taken = (o.named() for o in self.operations if o.frame[1] == node.lineno)
        return any(
            name in _ROLES[ARITHMETIC] and any(number not in written for number in _numbers(value))
            for named in taken
            for name, value in named
        )

    def _ends(self, node: ast.AST, parent: ast.AST) -> bool:
        """Whether the way ends at ``parent``; what it means there is noted."""
        if isinstance(parent, ast.Subscript):
            if node is parent.value:
                return False
            self.classes.add(ADDRESSING)
        elif isinstance(parent, ast.Slice):
            self.classes.add(ADDRESSING if _constant_length(parent) else BOUND)
        elif isinstance(parent, (ast.If, ast.While, ast.Assert, ast.IfExp)) and node is parent.test:
            self.classes.add(CONTROL_FLOW)
        elif isinstance(parent, (ast.For, ast.comprehension)):
            if node in getattr(parent, "ifs", ()):
                self.classes.add(CONTROL_FLOW)
            self._hold(parent.target)
        elif isinstance(parent, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for target in parent.targets if isinstance(parent, ast.Assign) else [parent.target]:
                self._hold(target)
        elif isinstance(parent, ast.NamedExpr):
            self._hold(parent.target)
            return False
        elif isinstance(parent, ast.Call) and node is not parent.func:
            return self._given_to(_last_name(parent.func))
        else:
            return isinstance(parent, (ast.stmt, ast.Lambda, ast.JoinedStr))
        return True

    def _given_to(self, called: str) -> bool:
        if called in _PASSED_ON:
            return False
        if called == "range" or called in _SIZES:
            self.classes.add(BOUND)
        elif called in _POSITIONS:
            self.classes.add(ADDRESSING)
        return True

    def _hold(self, target: ast.AST) -> None:
        if isinstance(target, (ast.Name, ast.Attribute)):
            self.names.add(ast.unparse(target))
        elif isinstance(target, (ast.Tuple, ast.List)):
            for item in target.elts:
                self._hold(item)


def _is_number(node: ast.BinOp | ast.AugAssign) -> bool:
    """Whether one side is written as a number: then the result is as much a number as the other side."""
    return isinstance(node, ast.BinOp) and any(isinstance(side, ast.Constant) for side in (node.left, node.right))


def _constant_length(node: ast.Slice) -> bool:
    """Whether a slice is ``x[a : a + n]``: it moves, and its length does not change with ``a``."""
    if node.lower is None or not isinstance(node.upper, ast.BinOp) or not isinstance(node.upper.op, ast.Add):
        return False
    return ast.dump(node.lower) in (ast.dump(node.upper.left), ast.dump(node.upper.right))
