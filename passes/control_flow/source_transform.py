"""The source of a function, rewritten so that both sides of some branches run.

Before::

    if n > 0:
        keys = torch.cat([keys, more])

After::

    fork = ENTRY.if_stmt(ENTRY.truth(n > 0, asked), locals(), ("keys",), ("keys",), start)
    if fork.enter(True):
        keys = torch.cat([keys, more])
        fork.leave(locals())
    if fork.restarts("keys"): keys = fork.start("keys")
    if fork.enter(False):
        fork.leave(locals())
    if fork.joins("keys"): keys = fork.joined("keys")

A body that ends in ``continue`` or ``return`` has what follows for its other side. ``a if c else b`` becomes
``ENTRY.if_exp(c, lambda: a, lambda: b, start)``. Lines and columns stay where they
are; ``asked`` is what Python's own question for a truth is compiled from. Branches are left alone whose sides leave in other
ways (``break``, ``raise``, ``yield``, ``del``), catch exceptions, or bind names that are not the function's own.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

from passes.core.source_location import Place

PLACEHOLDER = "the forks of the trace"
"""A constant of the code that is made here, for the object that answers."""
_EXITS = (ast.Return, ast.Raise, ast.Yield, ast.YieldFrom, ast.Await)
_REFUSED = (ast.Delete, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith, ast.ClassDef, ast.Import, ast.ImportFrom)
_SCOPES = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
_FUTURE = 0x1FF0000  # the flags of `from __future__ import`, of which `annotations` is one
Start = tuple[int, int]
"""Line and column at which a branch begins."""
FORK = "__fork_"
"""What names begin with that the code that is made here has for itself."""
_RESULT = "__result__"


def branch_at(text: str, code: CodeType, place: Place) -> Start | None:
    """Where the innermost branch of a function begins whose condition is asked for at ``place``."""
    definition = definition_of(text, code)
    nodes = _within_scope(definition) if definition is not None else ()
    branches = [node for node in nodes if isinstance(node, (ast.If, ast.IfExp))]
    asked = [node for node in branches if _span(node) == place[1:]]  # until Python 3.11 the whole branch asks
    found = asked or [node for node in branches if _is_within(place, node.test)]
    return _start(found[-1]) if found else None


def _start(node: ast.AST) -> Start:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _span(node: ast.AST) -> tuple[int, int, int, int]:
    """What a node is written as, as in `passes.core.source_location.Place`."""
    return (*_start(node), node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def _is_within(place: Place, node: ast.expr) -> bool:
    """Whether a place is part of an expression, as far as is known of it."""
    line, column, last_line, last_column = _span(node)
    if place.column < 0:
        return line <= place.line <= last_line
    return (line, column) <= (place.line, place.column) and (place.last_line, place.last_column) <= (last_line, last_column)


def _questions(branch: ast.If | ast.IfExp) -> dict[int, tuple[int, int, int, int] | None]:
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


def with_forks(text: str, code: CodeType, starts: frozenset[Start]) -> CodeType | None:
    """The code of a function that has both sides of the branches run that begin at ``starts``; None where it has none such.

    Branches that have to be rewritten with them are, too: one whose condition the host knows goes its one way.
    """
    found = definition_of(text, code)
    if found is None or any(map(_is_private, ast.walk(found))):
        return None
    if any(isinstance(node, (ast.Global, ast.Nonlocal)) for node in _within_scope(found)):
        return None
    definition = _copied(found)
    leaving = [_start(n) for n in _within_scope(definition) if isinstance(n, ast.If) and _leaves([n])]
    if not starts.isdisjoint(leaving):  # a side that leaves has what follows for its other side, with the branches there
        starts = starts.union(leaving)
    rewriter = _Rewriter(starts, _Names(definition))
    definition.body = rewriter.body(definition.body, "function")
    return _compiled(definition, code) if not starts.isdisjoint(rewriter.done) else None


def definition_of(text: str, code: CodeType) -> ast.FunctionDef | None:
    """The ``def`` that a code was compiled from."""
    return _definitions(text).get((code.co_name, code.co_firstlineno))


@functools.lru_cache(maxsize=64)
def _definitions(text: str) -> dict[tuple[str, int], ast.FunctionDef]:
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {(node.name, min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])): node for node in found}


def _copied(node: Any) -> Any:
    if isinstance(node, ast.AST):
        made = type(node)(**{name: _copied(value) for name, value in ast.iter_fields(node)})
        return ast.copy_location(made, node)
    return [_copied(item) for item in node] if isinstance(node, list) else node


def _compiled(definition: ast.FunctionDef, code: CodeType) -> CodeType | None:
    """The code of a definition, with the names that ``code`` has from around it."""
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]  # the function object has its own
    arguments.kw_defaults = [ast.Constant(None) if default is not None else None for default in arguments.kw_defaults]
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    factory = ast.parse(f"def factory({', '.join(code.co_freevars)}): pass")
    factory.body[0].body = [definition]  # type: ignore[attr-defined]
    ast.fix_missing_locations(factory)
    made = compile(factory, code.co_filename, "exec", dont_inherit=True, flags=code.co_flags & _FUTURE)
    outer = next(constant for constant in made.co_consts if isinstance(constant, CodeType))
    new = next(constant for constant in outer.co_consts if isinstance(constant, CodeType))
    if new.co_freevars != code.co_freevars:
        return None
    if sys.version_info >= (3, 11):
        new = new.replace(co_qualname=code.co_qualname)
    return new


def _is_private(node: ast.AST) -> bool:
    """Whether a name means another one inside of its class."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.startswith("__") and not name.endswith("__")


def _within_scope(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those inside of it that belong to the same function; outer ones first."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _SCOPES):
            yield from _within_scope(child)


class _Names:
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
        outside = {node.id for node in self._reads if id(node) not in inside} | {_RESULT}
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


def _assigned(body: list[ast.stmt]) -> set[str]:
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
        waiting += [n for n in ast.walk(node) if isinstance(n, ast.NamedExpr)] if isinstance(node, _SCOPES[4:]) else []
        if not isinstance(node, _SCOPES):
            waiting += ast.iter_child_nodes(node)
    return found


def _leaves(statements: list[ast.stmt]) -> bool:
    """Whether statements do anything but run to their end."""
    return any(_exits(statement) for statement in statements)


def _exits(node: ast.AST, in_loop: bool = False) -> bool:
    if isinstance(node, (ast.Break, ast.Continue)):
        return not in_loop
    if isinstance(node, (*_EXITS, *_REFUSED)):
        return True
    within = in_loop or isinstance(node, (ast.For, ast.While))
    parts = (child for child in ast.iter_child_nodes(node) if not isinstance(child, _SCOPES) or isinstance(child, _REFUSED))
    return any(_exits(child, within) for child in parts)


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


def _acts(statements: Sequence[ast.AST]) -> bool:
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


def _is_plain(expression: ast.expr) -> bool:
    """Whether an expression means the same in a lambda of its own."""
    for node in ast.walk(expression):
        if isinstance(node, (ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await)):
            return False
        if isinstance(node, ast.Name) and node.id in ("super", "locals", "vars", "dir", "eval", "exec"):
            return False
    return True


class _Rewriter(ast.NodeTransformer):
    """Rewrites the branches of one function that begin at ``starts``; those that were are ``done``."""

    def __init__(self, starts: frozenset[Start], names: _Names) -> None:
        self._starts, self._names = starts, names
        self._made: set[int] = set()
        self._count = 0
        self.done: set[Start] = set()

    def body(self, statements: list[ast.stmt], kind: str, behind: Sequence[ast.stmt] = ()) -> list[ast.stmt]:
        """A block of statements: of a ``"function"``, of a ``"loop"``, or of something else.

        Args:
            behind: what follows the block, rewritten already.
        """
        made = list(behind)
        for statement in reversed(statements):
            branch, rest = self._whole(statement, made, kind) if self._is_wanted(statement) else (None, [])
            if branch is None:
                made = [self._within(statement), *made]
            else:
                made = [*self._forked(branch, done=branch is not statement), *rest]
        return made

    def _within(self, statement: Any) -> Any:
        """A statement that is no branch to be rewritten, with those inside of it."""
        if id(statement) in self._made or isinstance(statement, _SCOPES):
            return statement
        for field, value in ast.iter_fields(statement):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                loop = isinstance(statement, (ast.For, ast.While)) and field == "body"
                setattr(statement, field, self.body(value, "loop" if loop else "block"))
            elif isinstance(value, list) and value and isinstance(value[0], (ast.excepthandler, ast.match_case)):
                for part in value:
                    part.body = self.body(part.body, "block")
            elif isinstance(value, list):
                setattr(statement, field, [self.visit(item) if isinstance(item, ast.AST) else item for item in value])
            elif isinstance(value, ast.AST):
                setattr(statement, field, self.visit(value))
        return statement

    def visit(self, node: ast.AST) -> Any:
        """An expression, with its conditional expressions rewritten; those in functions inside of it are left alone."""
        return node if isinstance(node, _SCOPES) else super().visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        """``body if test else orelse``."""
        made: Any = self.generic_visit(node)
        plain = _is_plain(node.body) and _is_plain(node.orelse) and not _acts([node.body, node.orelse])
        if _start(node) not in self._starts or not plain:
            return made  # type: ignore[no-any-return]
        self.done.add(_start(node))
        test = self._condition(node.test, _start(node), _questions(node))
        return _call(node, "if_exp", test, _delayed(node.body), _delayed(node.orelse), _constant(_start(node)))

    def _is_wanted(self, statement: ast.stmt) -> bool:
        if not isinstance(statement, ast.If) or id(statement) in self._made or _start(statement) not in self._starts:
            return False
        return not _acts([*statement.body, *statement.orelse])

    def _whole(self, branch: Any, rest: list[ast.stmt], kind: str) -> tuple[ast.If | None, list[ast.stmt]]:
        """The branch with all that belongs to its sides, and what is left to do behind it; None where a side leaves."""
        if not _leaves(branch.body) and not _leaves(branch.orelse):
            return branch, rest
        body, last = self.body(branch.body, kind if kind == "loop" else "function"), branch.body[-1]
        branch.body = body
        if _leaves(body[:-1]) or not isinstance(last, (ast.Continue, ast.Return)):
            return None, []
        if isinstance(last, ast.Continue):
            whole = self.body(branch.orelse, kind, rest)
            return (None, []) if kind != "loop" or _leaves(whole) else (self._with(branch, body[:-1], whole), [])
        if branch.orelse and isinstance(branch.orelse[-1], ast.Return):
            whole = self.body(branch.orelse, "function")
        elif kind == "function":
            whole = self.body(branch.orelse, kind, rest)
        else:
            return None, []
        if not whole or not isinstance(whole[-1], ast.Return) or _leaves(whole[:-1]):
            return None, []
        ends: list[Any] = [ast.copy_location(_assign(_RESULT, end.value), end) for end in (body[-1], whole[-1])]  # type: ignore[attr-defined]
        result = ast.copy_location(ast.Return(ast.Name(_RESULT, ast.Load())), whole[-1])
        return self._with(branch, [*body[:-1], ends[0]], [*whole[:-1], ends[1]]), [result]

    def _with(self, branch: ast.If, body: list[ast.stmt], orelse: list[ast.stmt]) -> ast.If:
        made = ast.copy_location(ast.If(branch.test, body or [ast.copy_location(ast.Pass(), branch)], orelse), branch)
        self._names.stands_for(made, branch)
        return made

    def _forked(self, branch: ast.If, *, done: bool) -> list[ast.stmt]:
        """The statements that stand for a branch, whose other side may be rewritten already."""
        assigned = sorted(name for name in _assigned([*branch.body, *branch.orelse]) if not name.startswith(FORK))
        joined = sorted(set(assigned) & self._names.read_behind(branch))
        fork = f"{FORK}{self._count}__"
        self._count += 1
        self.done.add(_start(branch))
        lines = [
            f"{fork} = {PLACEHOLDER!r}.if_stmt(None, locals(), {tuple(assigned)!r}, {tuple(joined)!r}, {_start(branch)!r})",
            f"if {fork}.enter(True):\n    pass\n    {fork}.leave(locals())",
            *(f"if {fork}.restarts({name!r}): {name} = {fork}.start({name!r})" for name in assigned),
            f"if {fork}.enter(False):\n    pass\n    {fork}.leave(locals())",
            *(f"if {fork}.joins({name!r}): {name} = {fork}.joined({name!r})" for name in joined),
        ]
        made: list[Any] = ast.parse("\n".join(lines)).body
        for statement in made:
            for node in ast.walk(statement):
                ast.copy_location(node, branch.test)
        made[0].value.args[0] = self._condition(branch.test, _start(branch), _questions(branch))
        made[1].body[:1] = self.body(branch.body, "block")
        other = branch.orelse if done else self.body(branch.orelse, "block")
        second = made[2 + len(assigned)]
        second.body[:1] = other or second.body[:1]
        self._made |= {id(statement) for statement in made}
        return made

    def _condition(self, test: ast.expr, start: Start, questions: Mapping[int, Any]) -> ast.expr:
        """A condition of the branch at ``start`` whose parts are not asked for their truth by Python."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return _call(test, "opposite", self._condition(test.operand, start, questions))
        if isinstance(test, ast.BoolOp) and all(map(_is_plain, test.values)):
            first, *others = test.values
            made = self._condition(first, start, questions)
            for other in others:
                name = "and_" if isinstance(test.op, ast.And) else "or_"
                made = _call(test, name, made, _delayed(self._condition(other, start, questions)), _constant(start))
            return made
        asked = _constant(questions.get(id(test)))
        return _call(test, "truth", self.visit(test), asked)


def _assign(name: str, value: ast.expr | None) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], value or ast.Constant(None), lineno=0)


def _constant(value: Any) -> ast.expr:
    return ast.Constant(value)


def _delayed(value: ast.expr) -> ast.expr:
    arguments = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.copy_location(ast.Lambda(arguments, value), value)


def _call(at: ast.expr, method: str, *arguments: ast.expr) -> ast.expr:
    function = ast.Attribute(ast.Constant(PLACEHOLDER), method, ast.Load())
    return ast.fix_missing_locations(ast.copy_location(ast.Call(function, list(arguments), []), at))
