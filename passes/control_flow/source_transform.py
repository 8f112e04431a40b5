"""The source of a function, rewritten so that both sides of some branches run.

Before::

    if n > 0:
        keys = torch.cat([keys, more])

After::

    branch = ENTRY.if_stmt(ENTRY.truth(n > 0, asked), locals(), ("keys",), ("keys",), start)
    if branch.enter(True):
        keys = torch.cat([keys, more])
        branch.leave(locals())
    if branch.restarts("keys"): keys = branch.start("keys")
    if branch.enter(False):
        branch.leave(locals())
    if branch.joins("keys"): keys = branch.joined("keys")

A body that ends in ``continue`` or ``return`` has what follows for its other side. ``a if c else b`` becomes
``ENTRY.if_exp(c, lambda: a, lambda: b, start)``. Lines and columns stay where they
are; ``asked`` is what Python's own question for a truth is compiled from. Branches are left alone whose sides leave in other
ways (``break``, ``raise``, ``yield``, ``del``), catch exceptions, or bind names that are not the function's own.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from passes.control_flow.syntax import (
    PREFIX,
    RESULT,
    SCOPES,
    Names,
    Start,
    acts,
    assigned_in,
    definition_of,
    is_plain,
    is_private,
    leaves,
    questions,
    start_of,
    within_scope,
)

PLACEHOLDER = "the branches of the trace"
"""A constant of the code that is made here, for the object that answers."""
_FUTURE = 0x1FF0000  # the flags of `from __future__ import`, of which `annotations` is one


def with_branches(text: str, code: CodeType, starts: frozenset[Start]) -> CodeType | None:
    """The code of a function that has both sides of the branches run that begin at ``starts``; None where it has none such.

    Branches that have to be rewritten with them are, too: one whose condition the host knows goes its one way.
    """
    found = definition_of(text, code)
    if found is None or any(map(is_private, ast.walk(found))):
        return None
    if any(isinstance(node, (ast.Global, ast.Nonlocal)) for node in within_scope(found)):
        return None
    definition = _copied(found)
    leaving = [start_of(n) for n in within_scope(definition) if isinstance(n, ast.If) and leaves([n])]
    if not starts.isdisjoint(leaving):  # a side that leaves has what follows for its other side, with the branches there
        starts = starts.union(leaving)
    rewriter = _Rewriter(starts, Names(definition))
    definition.body = rewriter.body(definition.body, "function")
    return _compiled(definition, code) if not starts.isdisjoint(rewriter.done) else None


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


class _Rewriter(ast.NodeTransformer):
    """Rewrites the branches of one function that begin at ``starts``; those that were are ``done``."""

    def __init__(self, starts: frozenset[Start], names: Names) -> None:
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
                made = [*self._both_sides(branch, done=branch is not statement), *rest]
        return made

    def _within(self, statement: Any) -> Any:
        """A statement that is no branch to be rewritten, with those inside of it."""
        if id(statement) in self._made or isinstance(statement, SCOPES):
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
        return node if isinstance(node, SCOPES) else super().visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        """``body if test else orelse``."""
        made: Any = self.generic_visit(node)
        plain = is_plain(node.body) and is_plain(node.orelse) and not acts([node.body, node.orelse])
        if start_of(node) not in self._starts or not plain:
            return made  # type: ignore[no-any-return]
        self.done.add(start_of(node))
        test = self._condition(node.test, start_of(node), questions(node))
        return _call(node, "if_exp", test, _delayed(node.body), _delayed(node.orelse), _constant(start_of(node)))

    def _is_wanted(self, statement: ast.stmt) -> bool:
        if not isinstance(statement, ast.If) or id(statement) in self._made or start_of(statement) not in self._starts:
            return False
        return not acts([*statement.body, *statement.orelse])

    def _whole(self, branch: Any, rest: list[ast.stmt], kind: str) -> tuple[ast.If | None, list[ast.stmt]]:
        """The branch with all that belongs to its sides, and what is left to do behind it; None where a side leaves."""
        if not leaves(branch.body) and not leaves(branch.orelse):
            return branch, rest
        body, last = self.body(branch.body, kind if kind == "loop" else "function"), branch.body[-1]
        branch.body = body
        if leaves(body[:-1]) or not isinstance(last, (ast.Continue, ast.Return)):
            return None, []
        if isinstance(last, ast.Continue):
            whole = self.body(branch.orelse, kind, rest)
            return (None, []) if kind != "loop" or leaves(whole) else (self._with(branch, body[:-1], whole), [])
        if branch.orelse and isinstance(branch.orelse[-1], ast.Return):
            whole = self.body(branch.orelse, "function")
        elif kind == "function":
            whole = self.body(branch.orelse, kind, rest)
        else:
            return None, []
        if not whole or not isinstance(whole[-1], ast.Return) or leaves(whole[:-1]):
            return None, []
        ends: list[Any] = [ast.copy_location(_assign(RESULT, end.value), end) for end in (body[-1], whole[-1])]  # type: ignore[attr-defined]
        result = ast.copy_location(ast.Return(ast.Name(RESULT, ast.Load())), whole[-1])
        return self._with(branch, [*body[:-1], ends[0]], [*whole[:-1], ends[1]]), [result]

    def _with(self, branch: ast.If, body: list[ast.stmt], orelse: list[ast.stmt]) -> ast.If:
        made = ast.copy_location(ast.If(branch.test, body or [ast.copy_location(ast.Pass(), branch)], orelse), branch)
        self._names.stands_for(made, branch)
        return made

    def _both_sides(self, branch: ast.If, *, done: bool) -> list[ast.stmt]:
        """The statements that stand for a branch, whose other side may be rewritten already."""
        assigned = sorted(name for name in assigned_in([*branch.body, *branch.orelse]) if not name.startswith(PREFIX))
        joined = sorted(set(assigned) & self._names.read_behind(branch))
        variable = f"{PREFIX}{self._count}__"
        self._count += 1
        self.done.add(start_of(branch))
        lines = [
            f"{variable} = {PLACEHOLDER!r}.if_stmt(None, locals(), {tuple(assigned)!r}, {tuple(joined)!r}, {start_of(branch)!r})",
            f"if {variable}.enter(True):\n    pass\n    {variable}.leave(locals())",
            *(f"if {variable}.restarts({name!r}): {name} = {variable}.start({name!r})" for name in assigned),
            f"if {variable}.enter(False):\n    pass\n    {variable}.leave(locals())",
            *(f"if {variable}.joins({name!r}): {name} = {variable}.joined({name!r})" for name in joined),
        ]
        made: list[Any] = ast.parse("\n".join(lines)).body
        for statement in made:
            for node in ast.walk(statement):
                ast.copy_location(node, branch.test)
        made[0].value.args[0] = self._condition(branch.test, start_of(branch), questions(branch))
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
        if isinstance(test, ast.BoolOp) and all(map(is_plain, test.values)):
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
