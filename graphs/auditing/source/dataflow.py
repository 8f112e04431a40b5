"""Following a number through the source of a program: from the expression that has it to what is done with it."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator

from graphs.auditing.remedies import ADDRESSING, ARITHMETIC, BOUND, CONTROL_FLOW, UNSUPPORTED

Function = ast.FunctionDef | ast.AsyncFunctionDef

_CONVERSIONS = {"__int__": "int", "__float__": "float", "__bool__": "bool"}
_PASSED_ON = frozenset(
    "int float bool abs min max round sum len divmod list tuple sorted set zip reversed ceil floor pairwise enumerate".split()  # noqa: SIM905
)
SIZES = frozenset(
    "range arange zeros ones empty rand randn eye linspace new_zeros new_ones new_empty view reshape "  # noqa: SIM905
    "expand repeat topk split chunk unflatten nonzero_static repeat_interleave tril_indices triu_indices".split()
)
POSITIONS = frozenset("select index_select narrow roll gather index_copy_ index_fill_".split())  # noqa: SIM905
_FILLED = frozenset(("full", "new_full"))
_OPERANDS = frozenset(
    "add sub mul div pow clamp clip lerp lerp_ where masked_fill masked_fill_ fill_ add_ sub_ mul_ div_ clamp_".split()  # noqa: SIM905
)
_OUTWARD = frozenset("print write debug info warning error exception".split())  # noqa: SIM905
_COLLECTING = frozenset("append add extend insert appendleft".split())  # noqa: SIM905
_UPLOADS = frozenset(("tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor"))


class Flow:
    """Where a value goes, within one file.

    Attributes:
        classes: the classes of its uses.
        calculates: whether an expression calculates with it.
    """

    def __init__(self, frame: tuple[str, int], function: str, scaling: frozenset[int]) -> None:
        """Follow what ``function`` of torch gives at a line.

        Args:
            scaling: lines with operators that take a number which is not written there: a calculation with the value is
                theirs, and its result a tensor.
        """
        self.tree = tree_of(frame[0])
        self.scaling = scaling
        self.classes: set[str] = set()
        self.calculates = False
        self._held: list[tuple[ast.AST, str]] = []
        for node in ast.walk(scope_of(self.tree, frame[1])):
            if _covers(node, frame[1]) and _asks(node, function):
                self._follow(node)
        done = 0
        while done < len(self._held):
            scope, name = self._held[done]
            done += 1
            for node in _loads(scope):
                if ast.unparse(node) == name:
                    self._follow(node)

    def _follow(self, node: ast.AST) -> None:
        parent = _parent(node)
        while parent is not None:
            self.calculates |= isinstance(parent, (ast.BinOp, ast.Compare))
            if self._scales_a_tensor(parent):
                self.classes.add(ARITHMETIC)
                return
            if self._ends(node, parent):
                return
            node, parent = parent, _parent(parent)

    def _scales_a_tensor(self, node: ast.AST) -> bool:
        """Whether a calculation is an operator's. One with a written number, or inside an index, is Python's own."""
        if not isinstance(node, (ast.BinOp, ast.AugAssign)) or node.lineno not in self.scaling:
            return False
        sides = (node.left, node.right) if isinstance(node, ast.BinOp) else ()
        return not isinstance(_parent(node), (ast.Slice, ast.Subscript)) and not any(isinstance(s, ast.Constant) for s in sides)

    def _ends(self, node: ast.AST, parent: ast.AST) -> bool:
        """Whether the path of the value ends at ``parent``; what it means there is noted."""
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
            self._hold(_element(parent))
        elif isinstance(parent, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for target in parent.targets if isinstance(parent, ast.Assign) else [parent.target]:
                self._hold(target)
        elif isinstance(parent, ast.NamedExpr):
            self._hold(parent.target)
            return False
        elif isinstance(parent, ast.keyword):
            call = _parent(parent)
            return isinstance(call, ast.Call) and self._given(call, parent.arg or "", parent.value)
        elif isinstance(parent, ast.Call) and node is not parent.func:
            position = next((i for i, argument in enumerate(parent.args) if argument is node), 0)
            return self._given(parent, position, node)
        else:
            if isinstance(parent, ast.JoinedStr):
                self.classes.add(UNSUPPORTED)
            return isinstance(parent, (ast.stmt, ast.Lambda, ast.JoinedStr))
        return True

    def _given(self, call: ast.Call, argument: int | str, value: ast.AST) -> bool:
        """What it means to be an argument of a call. False where the result has the value too."""
        called = last_name(call.func)
        if called in _PASSED_ON:
            return False
        last = argument == len(call.args) - 1
        if called in SIZES or (called == "narrow" and last) or (called in _FILLED and not last):
            self.classes.add(BOUND)
        elif called in POSITIONS:
            self.classes.add(ADDRESSING)
        elif called in _COLLECTING and isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            self._hold(call.func.value)
        elif (called in _COLLECTING and isinstance(_parent(call), ast.Expr)) or called in _OUTWARD:
            self.classes.add(UNSUPPORTED)
        elif called in _OPERANDS or called in _FILLED or called in _UPLOADS:
            self.classes.add(ARITHMETIC)
        else:
            for function in _functions(self.tree):
                name = _parameter(function, argument)
                if name and (function.name == called or (function.name == "forward" and name == last_name(value))):
                    self._remember(function, name)
        return True

    def _hold(self, target: ast.AST) -> None:
        if isinstance(target, (ast.Name, ast.Attribute)):
            self._remember(scope_of(self.tree, target.lineno), ast.unparse(target))
        elif isinstance(target, (ast.Tuple, ast.List)):
            for item in target.elts:
                self._hold(item)

    def _remember(self, scope: ast.AST, name: str) -> None:
        if (scope, name) not in self._held:
            self._held.append((scope, name))


def tree_of(file: str) -> ast.Module:
    """The syntax tree of a file, its nodes with their parents; an empty one where the file holds no Python."""
    return _parsed("".join(linecache.getlines(file)))


@functools.lru_cache(maxsize=64)
def _parsed(source: str) -> ast.Module:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell of a notebook with magic commands
        tree = ast.parse("")
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


@functools.lru_cache(maxsize=4096)
def scope_of(tree: ast.Module, line: int) -> ast.AST:
    """The innermost function around a line, or the module."""
    return max((f for f in _functions(tree) if _covers(f, line)), key=lambda function: function.lineno, default=tree)


@functools.lru_cache(maxsize=4096)
def numbers_written(tree: ast.Module, line: int) -> frozenset[object]:
    """The constants in the expressions of a line."""
    return frozenset({node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and _covers(node, line)})


def last_name(node: ast.AST) -> str:
    """``c`` of ``a.b.c``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _parameter(function: Function, argument: int | str) -> str:
    """The name of the parameter that takes an argument, or an empty string."""
    given = function.args
    names = [parameter.arg for parameter in (*given.posonlyargs, *given.args)]
    if isinstance(argument, str):
        return argument if argument in (*names, *(parameter.arg for parameter in given.kwonlyargs)) else ""
    position = argument + (names[:1] in (["self"], ["cls"]))
    return names[position] if position < len(names) else ""


def _asks(node: ast.AST, function: str) -> bool:
    """Whether an expression is one by which ``function`` of torch is called."""
    if isinstance(node, ast.Call):
        return last_name(node.func) == _CONVERSIONS.get(function, function)
    parent = _parent(node)
    varies = isinstance(node, ast.expr) and not isinstance(node, (ast.Constant, ast.Slice, ast.Tuple))
    indexed = isinstance(parent, (ast.Subscript, ast.Slice)) and node is not getattr(parent, "value", None)
    if function in ("__getitem__", "__setitem__"):  # an index or the bounds of a slice, unpacked by torch
        return indexed and varies
    ranged = isinstance(parent, ast.Call) and last_name(parent.func) == "range"
    return function == "__index__" and (indexed or ranged) and varies


def _element(loop: ast.For | ast.comprehension) -> ast.AST:
    """What holds an element in each turn; of ``enumerate``, not its count."""
    counted = isinstance(loop.iter, ast.Call) and last_name(loop.iter.func) == "enumerate"
    return loop.target.elts[-1] if counted and isinstance(loop.target, ast.Tuple) else loop.target


def _constant_length(node: ast.Slice) -> bool:
    """Whether a slice is ``x[a : a + n]``: it moves, and its length does not change with ``a``."""
    if node.lower is None or not isinstance(node.upper, ast.BinOp) or not isinstance(node.upper.op, ast.Add):
        return False
    return ast.dump(node.lower) in (ast.dump(node.upper.left), ast.dump(node.upper.right))


def _loads(scope: ast.AST) -> Iterator[ast.Name | ast.Attribute]:
    for node in ast.walk(scope):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            yield node


def _covers(node: ast.AST, line: int) -> bool:
    return getattr(node, "lineno", line + 1) <= line <= getattr(node, "end_lineno", 0)


def _parent(node: ast.AST) -> ast.AST | None:
    return getattr(node, "parent", None)
