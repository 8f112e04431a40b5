"""Branches on data of which both sides are traced: each in its own condition, joined behind the branch.

Before, with a sequence that starts in the traced run::

    if start_pos == 0:
        ring[slot].zero_()
        scale = first
    return x * scale

After, for a sequence that starts and for one that does not::

    %starts : eq.Scalar(%start_pos, 0)
    %kept : where.self(%starts, %zeros, %row)           # what the side writes, if the branch takes it
    %_ : index_put_.default(%ring, [%slot], %kept)
    %scale : where.self(%starts, %first, %scale_before)

`passes.fork_source` has a function run both bodies of an ``if``; here is what its lines call while a step is traced. Names
that a side assigns are joined at its end: tensors by ``where``, numbers by a choice, tensors of different length by length.
A branch stays an assumption of the graph if a side does what cannot be put under a condition: it changes an object of
Python, draws random numbers, assigns things of different kinds, or has more than `LIMIT` operators.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import GraphModule, Node

from passes.aliases import returns_view, written
from passes.loops import Arm, trips_of
from passes.sites import Site
from passes.symbols import SYMBOLS, expression_of

if TYPE_CHECKING:
    from passes.tracing import Facts

Tensor = torch.Tensor
LIMIT = 64
"""Operators above which a side is not cheap enough to be computed for nothing."""
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Tensor, *SYMBOLS)
_OBJECTS = 100_000


class Unmergeable(Exception):
    """A branch whose sides cannot both be part of a graph."""

    def __init__(self, detail: str, site: Site) -> None:
        super().__init__(detail)
        self.site = site


class Forks:
    """What the lines of `passes.fork_source` call, in one trace.

    Args:
        static: the value of a condition that holds or fails whatever the data, else None.

    Attributes:
        joining: the branch whose sides are joined by the operators that run now, if they do that.
        origins: the code of functions as it was written, by what stands for it.
    """

    def __init__(self, facts: Facts, static: Callable[[sympy.Basic], Any]) -> None:
        self.facts, self.static = facts, static
        self.joining: Site | None = None
        self.origins: dict[types.CodeType, types.CodeType] = {}
        self._count = itertools.count()

    def __call__(self, test: Any, before: Mapping[str, Any], names: Sequence[str], line: int) -> Fork:
        """The branch ``if test`` in the frame that calls.

        Args:
            before: its local names.
            names: those that a side assigns and a later line may read.
        """
        frame = sys._getframe(1)
        return Fork(self, next(self._count), self.truth(test), before, names, frame, (frame.f_code.co_filename, line))

    def truth(self, value: Any) -> Any:
        """A value as a condition: a plain one, or a symbol."""
        if isinstance(value, Tensor):
            value = value.item()
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            value = value != 0
        if not isinstance(value, torch.SymBool):
            return bool(value)
        known = self.static(self.facts.resolve(value.node.expr))
        return value if known is None else bool(known)

    def both(self, first: Any, second: Callable[[], Any]) -> Any:
        """``first and second``, as a condition."""
        first = self.truth(first)
        if isinstance(first, bool):
            return self.truth(second()) if first else False
        return first & self._under(first.node.expr, second)

    def either(self, first: Any, second: Callable[[], Any]) -> Any:
        """``first or second``, as a condition."""
        first = self.truth(first)
        if isinstance(first, bool):
            return True if first else self.truth(second())
        return first | self._under(sympy.Not(first.node.expr), second)

    def opposite(self, value: Any) -> Any:
        """``not value``, as a condition."""
        value = self.truth(value)
        return not value if isinstance(value, bool) else torch.sym_not(value)

    def _under(self, condition: sympy.Basic, body: Callable[[], Any]) -> Any:
        loops = self.facts.loops
        outer, loops.trips = loops.trips, (*loops.trips, Arm(next(self._count), self.facts.resolve(condition), ("", 0)))
        try:
            return self.truth(body())
        finally:
            loops.trips = outer


class Fork:
    """One branch that is met: which of its sides run, and what its names are behind it."""

    def __init__(
        self,
        forks: Forks,
        number: int,
        condition: Any,
        before: Mapping[str, Any],
        names: Sequence[str],
        frame: types.FrameType,
        site: Site,
    ) -> None:
        self._forks, self._number, self._condition, self._names, self._site = forks, number, condition, names, site
        self._before = {name: before[name] for name in names if name in before}
        self._after: dict[bool, dict[str, Any]] = {}
        self._plain, self._frame = isinstance(condition, bool), frame
        self._side = False

    def enter(self, side: bool) -> bool:
        """Whether to run a side. Of a branch on data both run."""
        if self._plain:
            return bool(self._condition is side)
        loops, condition = self._forks.facts.loops, self._forks.facts.resolve(self._condition.node.expr)
        self._side, self._outer, self._held = side, loops.trips, contents(self._frame)
        loops.trips = (*loops.trips, Arm(self._number, condition if side else sympy.Not(condition), self._site))
        return True

    def leave(self, local: Mapping[str, Any]) -> None:
        """The end of a side, with the local names as it leaves them.

        Raises:
            Unmergeable: it changed an object of Python.
        """
        if self._plain:
            return
        self._forks.facts.loops.trips = self._outer
        self._after[self._side] = {name: local[name] for name in self._names if name in local}
        now = contents(self._frame)
        if any(now.get(key, value) != value for key, value in self._held.items()):
            raise Unmergeable("a side changes an object of Python", self._site)

    def restarts(self, name: str) -> bool:
        """Whether a name has to be what it was in front of the branch, for the second side."""
        return not self._plain and name in self._before

    def start(self, name: str) -> Any:
        """What a name was in front of the branch."""
        return self._before[name]

    def joins(self, name: str) -> bool:
        """Whether both sides leave a value."""
        return not self._plain and all(name in after for after in self._after.values())

    def joined(self, name: str) -> Any:
        """What a name is behind the branch.

        Raises:
            Unmergeable: the sides leave things of different kinds.
        """
        self._forks.joining = self._site
        try:
            return self._join(self._after[True][name], self._after[False][name])
        finally:
            self._forks.joining = None

    def _join(self, a: Any, b: Any) -> Any:
        if a is b:
            return a
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return self._joined_tensors(a, b)
        for kinds in (((bool, torch.SymBool)), ((int, torch.SymInt)), ((float, torch.SymFloat))):
            if isinstance(a, kinds) and isinstance(b, kinds):
                return self._joined_numbers(a, b)
        if type(a) is type(b) and isinstance(a, (tuple, list)) and len(a) == len(b):
            parts = [self._join(x, y) for x, y in zip(a, b, strict=True)]
            return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)
        if type(a) is type(b) and isinstance(a, _ATOMS) and a == b:
            return a
        raise Unmergeable(f"the sides leave {type(a).__name__} and {type(b).__name__}", self._site)

    def _joined_numbers(self, a: Any, b: Any) -> Any:
        if expression_of(a) == expression_of(b):
            return a
        if isinstance(a, (bool, torch.SymBool)):
            return (self._condition & a) | (torch.sym_not(self._condition) & b)
        return self._choice(a, b)

    def _choice(self, a: Any, b: Any) -> Any:
        """One of two numbers, of which either may be a symbol."""
        if isinstance(a, SYMBOLS) != isinstance(b, SYMBOLS):
            nothing = torch.sym_ite(self._condition, 1, 0) * 0
            a, b = a + nothing, b + nothing
        return torch.sym_ite(self._condition, a, b)

    def _joined_tensors(self, a: Tensor, b: Tensor) -> Tensor:
        alike = (a.dtype, a.device, a.dim()) == (b.dtype, b.device, b.dim())
        resolve = self._forks.facts.resolve
        sizes = [(resolve(expression_of(x)), resolve(expression_of(y))) for x, y in zip(a.shape, b.shape, strict=False)]
        differing = [dim for dim, (x, y) in enumerate(sizes) if x != y]
        if not alike or len(differing) > 1:
            raise Unmergeable(f"the sides leave tensors {tuple(a.shape)} and {tuple(b.shape)}", self._site)
        if differing:  # as many rows as the side that is taken has, none of the other
            dim = differing[0]
            lengths = self._choice(a.shape[dim], 0), self._choice(0, b.shape[dim])
            return torch.cat([x.narrow(dim, 0, length) for x, length in zip((a, b), lengths, strict=True)], dim)
        flag = torch.scalar_tensor(torch.sym_ite(self._condition, 1, 0), dtype=torch.bool, device=a.device)
        return torch.where(flag, a, b)


def contents(frame: types.FrameType | None) -> dict[int, Any]:
    """What each container and object holds that lines of the step can reach, by identity."""
    found: dict[int, Any] = {}
    waiting: list[Any] = []
    while frame is not None and not str(frame.f_globals.get("__name__", "")).startswith(("passes.tracing", "torch.fx.")):
        waiting += frame.f_locals.values()
        frame = frame.f_back
    while waiting and len(found) < _OBJECTS:
        value = waiting.pop()
        if id(value) in found or isinstance(
            value, (*_ATOMS, Fork, Forks, type, types.ModuleType, types.FrameType, types.CodeType)
        ):
            continue
        held = list(_held_by(value))
        found[id(value)] = (value, tuple(map(id, held)))  # keeps it alive, so that no identity is used twice
        waiting += held
    return {key: ids for key, (_, ids) in found.items()}


def _held_by(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
    else:
        yield getattr(value, "__dict__", None)


def check(module: GraphModule) -> None:
    """That the sides of a traced graph may run whichever of them is taken.

    Raises:
        Unmergeable: a side draws random numbers, is long, or makes what is read elsewhere; what the sides leave is written.
    """
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    sizes: Counter[Arm] = Counter()
    for node in order:
        arms = [trip for trip in trips_of(node) if isinstance(trip, Arm) and trip.site[0]]
        sizes.update(arm for arm in arms if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor))
        if arms and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Unmergeable("a side draws random numbers", arms[-1].site)
        if arms and isinstance(node.meta.get("val"), Tensor) and any(_is_elsewhere(node, user) for user in node.users):
            raise Unmergeable("what a side makes is read elsewhere", arms[-1].site)
        if node.meta.get("joins") and _is_overtaken(node, order):
            raise Unmergeable("what the sides leave is written, or what it was made of", node.meta["joins"])
    for arm, size in sizes.items():
        if size > LIMIT:
            raise Unmergeable(f"a side has {size} operators", arm.site)


def _is_elsewhere(node: Node, user: Node) -> bool:
    """Whether ``user`` reads outside of the side that made ``node``, other than to join it."""
    root = _root(node)
    own = trips_of(root) if isinstance(root, Node) else ()
    return trips_of(user)[: len(own)] != own and not user.meta.get("joins")


def _is_overtaken(node: Node, order: Mapping[Node, int]) -> bool:
    """Whether a tensor left by two sides is written, or read after one that it is a copy of was."""
    if not isinstance(node.meta.get("val"), Tensor):
        return False
    views = [other for other in order if _root(other) is _root(node)]
    last = max((order[user] for view in views for user in view.users), default=0)
    sources = {_root(source) for source in node.all_input_nodes} - {_root(node)}
    for other, index in order.items():
        roots = {_root(target) for target in written(other)}
        if _root(node) in roots or (order[node] < index < last and roots & sources):
            return True
    return False


def _root(node: Node) -> Any:
    """What all nodes of one memory have in common."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        if not returns_view(node.target) and node.args[0] not in written(node):
            return node
        node = node.args[0]
    return (node.op, node.target) if node.op == "get_attr" else node
