"""What is read off the source of a function: where its branches begin, which names they bind, what their sides do."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Sequence
from types import CodeType

from passes.core.source_location import Place

_EXITS = (ast.Return, ast.Raise, ast.Yield, ast.YieldFrom, ast.Await)

_REFUSED = (ast.Delete, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith, ast.ClassDef, ast.Import, ast.ImportFrom)

SCOPES = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)

Start = tuple[int, int]
"""Line and column at which a branch begins."""

PREFIX = "__branch_"
"""What names begin with that the code that is made here has for itself."""

RESULT = "__result__"

_BUILTINS = frozenset(("print", "open", "input", "exit", "quit", "setattr", "delattr"))

_EFFECTS = frozenset(
    (
        *("open", "exit", "_exit", "abort", "kill", "raise_signal", "sleep", "put", "put_nowait"),
        *("write", "writelines", "flush", "save", "dump", "system", "popen", "Popen", "check_call", "check_output", "putenv"),
        *("unlink", "rename", "mkdir", "makedirs", "rmdir", "rmtree", "chdir", "send", "sendall", "notify", "notify_all"),
        *("warn", "warning", "info", "debug", "error", "exception", "critical", "setLevel"),
        *("manual_seed", "seed", "set_num_threads", "set_default_dtype", "set_default_device", "set_float32_matmul_precision"),
    )
)
"""Names of methods, and of functions of modules, that do something outside of the tensors and objects of a step. A side that
calls one must not be run unless it is taken: its branch is left as it is."""


def branch_at(text: str, code: CodeType, place: Place) -> Start | None:
    """Where the innermost branch of a function begins whose condition is asked for at ``place``."""
    definition = definition_of(text, code)
    nodes = within_scope(definition) if definition is not None else ()
    branches = [node for node in nodes if isinstance(node, (ast.If, ast.IfExp))]
    asked = [node for node in branches if _span(node) == place[1:]]  # until Python 3.11 the whole branch asks
    found = asked or [node for node in branches if _is_within(place, node.test)]
    return start_of(found[-1]) if found else None


def start_of(node: ast.AST) -> Start:
    """Line and column at which a node begins."""
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _span(node: ast.AST) -> tuple[int, int, int, int]:
    """What a node is written as, as in `passes.core.source_location.Place`."""
    return (*start_of(node), node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def _is_within(place: Place, node: ast.expr) -> bool:
    """Whether a place is part of an expression, as far as is known of it."""
    line, column, last_line, last_column = _span(node)
    if place.column < 0:
        return line <= place.line <= last_line
    return (line, column) <= (place.line, place.column) and (place.last_line, place.last_column) <= (last_line, last_column)


def questions(branch: ast.If | ast.IfExp) -> dict[int, tuple[int, int, int, int] | None]:
    """What Python's questions for the truth of the parts of a condition are compiled from, as in `source_location.Place`.

    From Python 3.12 on that is the part itself. In 3.11 it is the last comparison before it, or the branch.
    """
    found: dict[int, tuple[int, int, int, int] | None] = {}
    last: ast.AST = branch

    def walk(test: ast.expr) -> None:
        nonlocal last
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            walk(test.operand)
        elif isinstance(test, ast.BoolOp):
            for part in test.values:
                walk(part)
        else:
            last = test if isinstance(test, ast.Compare) or sys.version_info >= (3, 12) else last
            found[id(test)] = _span(last) if sys.version_info >= (3, 11) else None

    walk(branch.test)
    return found


def definition_of(text: str, code: CodeType) -> ast.FunctionDef | None:
    """The ``def`` that a code was compiled from."""
    return _definitions(text).get((code.co_name, code.co_firstlineno))


@functools.lru_cache(maxsize=64)
def _definitions(text: str) -> dict[tuple[str, int], ast.FunctionDef]:
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {(node.name, min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])): node for node in found}


def is_private(node: ast.AST) -> bool:
    """Whether a name means another one inside of its class."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.startswith("__") and not name.endswith("__")


def within_scope(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those inside of it that belong to the same function; outer ones first."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, SCOPES):
            yield from within_scope(child)


class Names:
    """Which names of a function are read where."""

    def __init__(self, definition: ast.FunctionDef) -> None:
        self._reads = [n for n in ast.walk(definition) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
        self._reads += [n.target for n in ast.walk(definition) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)]
        loops = [n for n in ast.walk(definition) if isinstance(n, (ast.For, ast.While))]
        self._looped = {id(inner) for loop in loops for inner in ast.walk(loop)}

    def stands_for(self, branch: ast.If, other: ast.If) -> None:
        """Say that ``branch`` is ``other`` with what follows it."""
        self._looped |= {id(branch)} if id(other) in self._looped else set()

    def read_behind(self, branch: ast.If) -> set[str]:
        """Names that a line outside of a branch reads, or the branch itself the next time."""
        inside = {id(node) for part in (*branch.body, *branch.orelse) for node in ast.walk(part)}
        outside = {node.id for node in self._reads if id(node) not in inside} | {RESULT}
        return outside | (_needed(branch.body) | _needed(branch.orelse) if id(branch) in self._looped else set())


def _needed(body: list[ast.stmt]) -> set[str]:
    """Names that statements may read before they have bound them."""
    bound: set[str] = set()
    needed: set[str] = set()
    for statement in body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        needed |= {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound
        if isinstance(statement, ast.AugAssign):
            needed |= {node.id for node in ast.walk(statement.target) if isinstance(node, ast.Name)} - bound
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:  # no other is sure to happen
            bound |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        elif not isinstance(statement, (ast.Expr, ast.AugAssign)):
            inner = [node for node in ast.walk(statement) if isinstance(node, ast.AugAssign)]
            needed |= {node.id for part in inner for node in ast.walk(part.target) if isinstance(node, ast.Name)} - bound
    return needed


def assigned_in(body: list[ast.stmt]) -> set[str]:
    """Names that statements bind in the scope they stand in."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.NamedExpr):  # in a comprehension it binds outside of it
            found.add(node.target.id)
        waiting += [n for n in ast.walk(node) if isinstance(n, ast.NamedExpr)] if isinstance(node, SCOPES[4:]) else []
        if not isinstance(node, SCOPES):
            waiting += ast.iter_child_nodes(node)
    return found


def leaves(statements: list[ast.stmt]) -> bool:
    """Whether statements do anything but run to their end."""
    return any(_exits(statement) for statement in statements)


def _exits(node: ast.AST, in_loop: bool = False) -> bool:
    if isinstance(node, (ast.Break, ast.Continue)):
        return not in_loop
    if isinstance(node, (*_EXITS, *_REFUSED)):
        return True
    within = in_loop or isinstance(node, (ast.For, ast.While))
    parts = (child for child in ast.iter_child_nodes(node) if not isinstance(child, SCOPES) or isinstance(child, _REFUSED))
    return any(_exits(child, within) for child in parts)


def acts(statements: Sequence[ast.AST]) -> bool:
    """Whether anything in a side acts outside of the step, or ends it."""
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, (ast.Global, ast.Nonlocal)) or (isinstance(node, ast.Attribute) and node.attr == "environ"):
                return True
            raised = node.exc if isinstance(node, ast.Raise) else None
            raised = raised.func if isinstance(raised, ast.Call) else raised
            if getattr(raised, "id", None) in ("KeyboardInterrupt", "SystemExit", "GeneratorExit"):
                return True
            called = node.func if isinstance(node, ast.Call) else None
            if getattr(called, "attr", None) in _EFFECTS or getattr(called, "id", None) in _BUILTINS:
                return True
    return False


def is_plain(expression: ast.expr) -> bool:
    """Whether an expression means the same in a lambda of its own."""
    for node in ast.walk(expression):
        if isinstance(node, (ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await)):
            return False
        if isinstance(node, ast.Name) and node.id in ("super", "locals", "vars", "dir", "eval", "exec"):
            return False
    return True
