"""Functions of the user rewritten so that both bodies of an ``if`` run while a step is traced.

Before::

    if n > 0:
        keys = torch.cat([keys, more])

After::

    fork = forks(n > 0, locals(), ("keys",), line)
    if fork.enter(True):
        keys = torch.cat([keys, more])
        fork.leave(locals())
    if fork.restarts("keys"): keys = fork.start("keys")
    if fork.enter(False):
        fork.leave(locals())
    if fork.joins("keys"): keys = fork.joined("keys")

A body that ends in ``continue`` or ``return`` has what follows for its other side. The function object stays what it is: its
code is exchanged while the step is traced, with the same lines and names.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import linecache
import types
from collections.abc import Iterator, Mapping
from typing import Any

Lines = frozenset[int]
Plan = Mapping[types.CodeType, Lines]
"""Which lines of which functions hold conditions whose sides are both to run."""
NAME = "__forks__"
_EXITS = (ast.Return, ast.Break, ast.Continue, ast.Raise, ast.Yield, ast.YieldFrom, ast.Await, ast.Delete, ast.Try, ast.Match)
_SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


@contextlib.contextmanager
def forked(plan: Plan, forks: Any) -> Iterator[None]:
    """Let the functions of ``plan`` call ``forks`` at their branches."""
    changed: list[tuple[types.FunctionType, types.CodeType]] = []
    spaces: list[dict[str, Any]] = []
    try:
        for code, lines in plan.items():
            new = rewritten(code, lines)
            for function in gc.get_referrers(code) if new is not None else ():
                if isinstance(function, types.FunctionType) and function.__code__ is code and new is not None:
                    function.__globals__[NAME] = forks
                    forks.origins[new] = code
                    spaces.append(function.__globals__)
                    function.__code__ = new
                    changed.append((function, code))
        yield
    finally:
        for function, code in changed:
            function.__code__ = code
        for space in spaces:
            space.pop(NAME, None)


@functools.lru_cache(maxsize=256)
def rewritten(code: types.CodeType, lines: Lines) -> types.CodeType | None:
    """The code of a function whose conditions in ``lines`` run both sides; None where no such line can be rewritten."""
    definition = _definition(code)
    if definition is None or any(_is_private(node) for node in ast.walk(definition)):
        return None
    names = _Names(definition)
    rewriter = _Rewriter(lines, names)
    definition.body = rewriter.body(definition.body, "function")
    if not rewriter.count:
        return None
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [ast.Constant(None) if default is not None else None for default in arguments.kw_defaults]
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    factory = ast.parse(f"def factory({', '.join(code.co_freevars)}): pass")
    factory.body[0].body = [definition]  # type: ignore[attr-defined]
    ast.fix_missing_locations(factory)
    made = compile(factory, code.co_filename, "exec", dont_inherit=True, flags=code.co_flags & _FUTURE)
    new = next((c for c in _codes(made) if c.co_name == code.co_name and c.co_freevars == code.co_freevars), None)
    return new.replace(co_qualname=code.co_qualname) if new is not None else None


def holds_fork(code: types.CodeType, line: int) -> bool:
    """Whether the condition in a line of a function can be rewritten."""
    return rewritten(code, frozenset((line,))) is not None


_FUTURE = 0x1FF0000  # what `from __future__ import` sets, of which `annotations` is one


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _definition(code: types.CodeType) -> ast.FunctionDef | None:
    lines = linecache.getlines(code.co_filename)
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
            if first == code.co_firstlineno:
                return node
    return None


def _is_private(node: ast.AST) -> bool:
    """Whether a name means another one inside of its class."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.startswith("__") and not name.endswith("__")


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

    def joined(self, branch: ast.If) -> list[str]:
        """Names that a side assigns and a line elsewhere may read."""
        inside = {id(node) for part in (*branch.body, *branch.orelse) for node in ast.walk(part)}
        again = id(branch) in self._looped
        read = {node.id for node in self._reads if again or id(node) not in inside}
        return sorted(_assigned([*branch.body, *branch.orelse]) & read)


def _assigned(body: list[ast.stmt]) -> set[str]:
    """Names that statements bind in the scope they stand in."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        if not isinstance(node, _SCOPES):
            waiting += ast.iter_child_nodes(node)
    return found


def _leaves(statements: list[ast.stmt]) -> bool:
    """Whether statements do anything but run to their end."""
    return any(isinstance(node, _EXITS) for statement in statements for node in _within_scope(statement))


def _within_scope(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement that belong to its function; breaks and continues of loops inside of it stay inside."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _SCOPES):
            continue
        inner = _within_scope(child)
        yield from (n for n in inner if not (isinstance(node, (ast.For, ast.While)) and isinstance(n, (ast.Break, ast.Continue))))


class _Rewriter:
    """Rewrites the branches of one function whose conditions stand in ``lines``."""

    def __init__(self, lines: Lines, names: _Names) -> None:
        self._lines, self._names = lines, names
        self._made: list[ast.stmt] = []
        self.count = 0

    def body(self, statements: list[ast.stmt], kind: str) -> list[ast.stmt]:
        """A block of statements: of a ``"function"``, of a ``"loop"``, or of something else."""
        made: list[ast.stmt] = []
        for statement in reversed(statements):
            branch, behind = self._whole(statement, made, kind) if self._is_wanted(statement) else (None, [])
            if branch is None:
                self._descend(statement)
                made = [statement, *made]
            else:
                made = [*self._forked(branch, done=branch is not statement), *behind]
        return made

    def _descend(self, statement: ast.stmt) -> None:
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(statement, field, None)
            if isinstance(inner, list) and inner and isinstance(inner[0], ast.stmt) and not isinstance(statement, _SCOPES):
                loop = isinstance(statement, (ast.For, ast.While)) and field == "body"
                setattr(statement, field, self.body(inner, "loop" if loop else "block"))

    def _is_wanted(self, statement: ast.stmt) -> bool:
        if not isinstance(statement, ast.If) or statement in self._made:
            return False
        return any(statement.test.lineno <= line <= (statement.test.end_lineno or 0) for line in self._lines)

    def _whole(self, branch: Any, rest: list[ast.stmt], kind: str) -> tuple[ast.If | None, list[ast.stmt]]:
        """The branch with all that belongs to its sides, and what is left to do behind it; None where a side leaves."""
        if not _leaves(branch.body) and not _leaves(branch.orelse):
            return branch, rest
        last = branch.body[-1]
        if branch.orelse or _leaves(branch.body[:-1]):
            return None, []
        if kind == "loop" and isinstance(last, ast.Continue) and not _leaves(rest):
            return self._with(branch, branch.body[:-1], rest), []
        if (
            kind == "function"
            and isinstance(last, ast.Return)
            and rest
            and isinstance(rest[-1], ast.Return)
            and not _leaves(rest[:-1])
        ):
            ends = [ast.copy_location(_assign("__result__", end.value), end) for end in (last, rest[-1])]
            result = ast.copy_location(ast.Return(ast.Name("__result__", ast.Load())), rest[-1])
            return self._with(branch, [*branch.body[:-1], ends[0]], [*rest[:-1], ends[1]]), [result]
        return None, []

    def _with(self, branch: ast.If, body: list[ast.stmt], orelse: list[ast.stmt]) -> ast.If:
        made = ast.copy_location(ast.If(branch.test, body or [ast.copy_location(ast.Pass(), branch)], orelse), branch)
        self._names.stands_for(made, branch)
        return made

    def _forked(self, branch: ast.If, *, done: bool) -> list[ast.stmt]:
        """The statements that stand for a branch, whose other side may be done already."""
        fork, names = f"__fork_{self.count}__", self._names.joined(branch)
        if "__result__" in _assigned(branch.body):
            names = [*names, "__result__"]
        self.count += 1
        lines = [
            f"{fork} = {NAME}(None, locals(), {tuple(names)!r}, {branch.lineno})",
            f"if {fork}.enter(True):\n    pass\n    {fork}.leave(locals())",
            *(f"if {fork}.restarts({name!r}): {name} = {fork}.start({name!r})" for name in names),
            f"if {fork}.enter(False):\n    pass\n    {fork}.leave(locals())",
            *(f"if {fork}.joins({name!r}): {name} = {fork}.joined({name!r})" for name in names),
        ]
        made: list[Any] = ast.parse("\n".join(lines)).body
        for statement in made:
            for node in ast.walk(statement):
                ast.copy_location(node, branch.test)
        made[0].value.args[0] = self._condition(branch.test)
        made[1].body[:1] = self.body(branch.body, "block")
        other = branch.orelse if done else self.body(branch.orelse, "block")
        made[2 + len(names)].body[:1] = other or made[2 + len(names)].body[:1]
        self._made += made
        return made

    def _condition(self, test: ast.expr) -> ast.expr:
        """A condition whose parts are not asked for their truth by Python."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return _call(test, "opposite", self._condition(test.operand))
        if isinstance(test, ast.BoolOp):
            name = "both" if isinstance(test.op, ast.And) else "either"
            first, *others = test.values
            made = self._condition(first)
            for other in others:
                made = _call(test, name, made, _delayed(self._condition(other)))
            return made
        return test


def _assign(name: str, value: ast.expr | None) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], value or ast.Constant(None), lineno=0)


def _delayed(value: ast.expr) -> ast.expr:
    arguments = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.copy_location(ast.Lambda(arguments, value), value)


def _call(at: ast.expr, method: str, *arguments: ast.expr) -> ast.expr:
    function = ast.Attribute(ast.Name(NAME, ast.Load()), method, ast.Load())
    return ast.fix_missing_locations(ast.copy_location(ast.Call(function, list(arguments), []), at))
