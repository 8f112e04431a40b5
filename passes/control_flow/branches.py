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

`source_transform` has a function run both sides of a branch; here is what its lines call while a step is traced. Names that
a side assigns are joined at its end: tensors by ``where``, numbers by a choice, tensors of different length by length. A side
that does what cannot be put under a condition is `Unmergeable`: what `legality` finds in its operators, and here whatever
changes Python: an attribute, a list, a variable of another function. Such a branch stays an assumption of the graph.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import sympy
import torch

from passes.control_flow.python_changes import PythonBefore, Snapshot, State
from passes.control_flow.stopping import Hook, Stopping
from passes.control_flow.syntax import Start
from passes.core.predicates import BranchArm, Loops
from passes.core.source_location import Branch, Place
from passes.core.symbols import SYMBOLS, expression_of

if TYPE_CHECKING:
    from passes.core.facts import Facts

Tensor = torch.Tensor
_KINDS: tuple[tuple[type, ...], ...] = ((bool, torch.SymBool), (int, torch.SymInt), (float, torch.SymFloat))
LONG = 120
"""Parts of an expression above which it is given a name."""
_CONSTANTS = (type(None), complex, str, bytes, torch.dtype, torch.device)


class Unmergeable(Exception):
    """A branch whose sides cannot both be part of a graph.

    Attributes:
        site: where the branch begins.
    """

    def __init__(self, detail: str, site: Branch) -> None:
        super().__init__(detail)
        self.site = site


class Stopped(BaseException):
    """A side that was about to act outside of the step: not to be caught by what the step catches."""

    def __init__(self, reason: Unmergeable) -> None:
        super().__init__(reason)
        self.reason = reason


class Branches:
    """What the lines of `passes.control_flow.source_transform` call, in one trace.

    Args:
        static: the value of a condition that holds or fails whatever the data, else None.
        snapshot: takes snapshots of Python objects.
        forbidding: sees every call of a side, and stops it before it acts outside of the step.

    Attributes:
        naming: whether the operators that run now give a long expression a name.
        joining: a side of the branch whose sides are joined by the operators that run now, if they do that.
        asked: the place of the code as it is written that asks for the truth of a value now, where that is known.
        failed: the first branch that turned out not to be mergeable. The user's own lines may catch the exception.
    """

    def __init__(
        self,
        facts: Facts,
        loops: Loops,
        static: Callable[[sympy.Basic], Any],
        snapshot: Snapshot | None,
        forbidding: Hook | None = None,
    ) -> None:
        self.facts, self.loops, self.static, self.snapshot = facts, loops, static, snapshot
        self._forbidding = forbidding
        self._watch = Stopping(self._seen)
        self.naming = False
        self.joining: BranchArm | None = None
        self.asked: Place | None = None
        self.failed: Unmergeable | None = None
        self.step: State | None = None
        self._count = itertools.count()

    def if_stmt(
        self, test: Any, before: Mapping[str, Any], assigned: Sequence[str], joined: Sequence[str], at: Start
    ) -> TracedBranch:
        """The branch ``if test`` in the frame that calls.

        Args:
            before: its local names.
            assigned: those that a side assigns.
            joined: those of them that a later line may read.
        """
        return TracedBranch(self, self.truth(test), before, assigned, joined, sys._getframe(1), at)

    def if_exp(self, test: Any, first: Callable[[], Any], second: Callable[[], Any], at: Start) -> Any:
        """``first if test else second``."""
        branch = TracedBranch(self, self.truth(test), {}, (), (), sys._getframe(1), at)
        if not branch.is_data:
            return first() if branch.enter(True) else second()
        values = []
        for side, body in ((True, first), (False, second)):
            branch.enter(side)
            values.append(body())
            branch.leave({})
        return branch.join(*values)

    def truth(self, value: Any, asked: tuple[int, int, int, int] | None = None) -> Any:
        """A value as a condition: a plain one, or a symbol.

        Args:
            asked: what Python's own instruction was compiled from, as in `passes.core.source_location.Place`.
        """
        if isinstance(value, Tensor):
            self.asked = Place(sys._getframe(1).f_code.co_filename, *asked) if asked is not None else None
            try:
                value = value.item()
            finally:
                self.asked = None
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            value = value != 0
        if not isinstance(value, torch.SymBool):
            return bool(value)
        known = self.static(self.facts.resolve(value.node.expr))
        return self.short(value) if known is None else bool(known)

    def short(self, value: Any) -> Any:
        """A whole number or a flag, as a symbol of its own if its expression is long: choices of choices would grow for ever."""
        expression = self.facts.resolve(expression_of(value))
        if sum(1 for _ in itertools.islice(sympy.preorder_traversal(expression), LONG)) < LONG:
            return value
        flag, self.naming = isinstance(value, torch.SymBool), True
        try:
            number = torch.sym_ite(value, 1, 0) if flag else value
            made: Any = torch.scalar_tensor(number, dtype=torch.bool if flag else torch.int64).item()
        finally:
            self.naming = False
        hint = self.facts.hint(expression)
        (symbol,) = made.node.expr.free_symbols
        if hint is not None:
            self.facts.hints[symbol] = int(bool(hint)) if flag else int(hint)  # type: ignore[call-overload]
        return made

    def and_(self, first: Any, second: Callable[[], Any], at: Start) -> Any:
        """``first and second``, as a condition."""
        first = self.truth(first)
        if isinstance(first, bool):
            return self.truth(second()) if first else False
        return first & self._under(first, second, sys._getframe(1), at)

    def or_(self, first: Any, second: Callable[[], Any], at: Start) -> Any:
        """``first or second``, as a condition."""
        first = self.truth(first)
        if isinstance(first, bool):
            return True if first else self.truth(second())
        return first | self._under(torch.sym_not(first), second, sys._getframe(1), at)

    def opposite(self, value: Any) -> Any:
        """``not value``, as a condition."""
        value = self.truth(value)
        return not value if isinstance(value, bool) else torch.sym_not(value)

    def _under(self, condition: Any, body: Callable[[], Any], frame: FrameType, at: Start) -> Any:
        branch = TracedBranch(self, condition, {}, (), (), frame, at)
        branch.enter(True)
        value = self.truth(body())
        branch.leave({})
        return value

    def watch(self, running: bool, site: Branch | None = None) -> None:
        """Have the calls that follow seen, while a side of the branch at ``site`` runs, or not any more.

        Raises:
            Unmergeable: another profiler or tracer sees them, which cannot be joined.
        """
        if self._forbidding is None or running is self._watch.is_active:
            return
        if not running:
            self._watch.stop()
        elif Stopping.is_possible():
            self._watch.start()
        else:
            assert site is not None
            raise self.unmergeable("a profiler or a tracer is active, so nobody can see what a side does", site)

    def _seen(self, frame: FrameType, event: str, argument: Any) -> None:
        assert self._forbidding is not None
        try:
            self._forbidding(frame, event, argument)
        except BaseException as found:
            arms = [trip for trip in self.loops.trips if isinstance(trip, BranchArm)]
            raise Stopped(self.unmergeable(f"a side does what must not be done for nothing: {found}", arms[-1].site)) from None

    def unmergeable(self, detail: str, site: Branch) -> Unmergeable:
        """The exception to raise, kept for those who do not get to see it."""
        reason = Unmergeable(detail, site)
        self.failed = self.failed or reason
        return reason

    def next(self) -> int:
        """A number for a branch that is met."""
        return next(self._count)


class TracedBranch:
    """One branch that is met: which of its sides run, and what its names are behind it."""

    def __init__(
        self,
        branches: Branches,
        condition: Any,
        before: Mapping[str, Any],
        assigned: Sequence[str],
        joined: Sequence[str],
        frame: FrameType,
        at: Start,
    ) -> None:
        self._branches, self._condition, self._names = branches, condition, joined
        self.is_data = not isinstance(condition, bool)
        self._site: Branch = (frame.f_code.co_filename, *at)
        if self.is_data:
            self._number, self._assigned = branches.next(), assigned
            self._before = {name: before[name] for name in assigned if name in before}
            self._after: list[dict[str, Any]] = []
            self._python = PythonBefore(branches, frame, assigned)

    def enter(self, side: bool) -> bool:
        """Whether to run a side. Of a branch on data both run."""
        if not self.is_data:
            return bool(self._condition is side)
        loops = self._branches.loops
        self._branches.watch(True, self._site)
        self._outer = loops.trips
        self._within = loops.trips = (*loops.trips, self._arm(side))
        return True

    def _arm(self, side: bool) -> BranchArm:
        condition = self._branches.facts.resolve(self._condition.node.expr)
        return BranchArm(self._number, condition if side else sympy.Not(condition), self._site)

    def leave(self, local: Mapping[str, Any]) -> None:
        """The end of a side, with the local names as it leaves them.

        Raises:
            Unmergeable: it changed an object of Python, or was left by an exception.
        """
        if not self.is_data:
            return
        loops = self._branches.loops
        self._branches.watch(any(isinstance(trip, BranchArm) for trip in self._outer))
        if loops.trips != self._within:
            raise self._branches.unmergeable("a side raises an exception, which is caught elsewhere", self._site)
        loops.trips = self._outer
        self._after.append({name: local[name] for name in self._names if name in local})
        changed = self._python.changed()
        if changed:
            raise self._branches.unmergeable(f"a side changes {changed}", self._site)

    def restarts(self, name: str) -> bool:
        """Whether a name has to be what it was in front of the branch, for the second side."""
        return self.is_data and name in self._before

    def start(self, name: str) -> Any:
        """What a name was in front of the branch."""
        return self._before[name]

    def joins(self, name: str) -> bool:
        """Whether both sides leave a value."""
        return self.is_data and all(name in after for after in self._after)

    def joined(self, name: str) -> Any:
        """What a name is behind the branch.

        Raises:
            Unmergeable: the sides leave things of different kinds.
        """
        return self.join(*(after[name] for after in self._after))

    def join(self, a: Any, b: Any) -> Any:
        """``a`` if the branch is taken, else ``b``; raises as `joined` does."""
        self._branches.joining = self._arm(True)
        try:
            return self._joined(a, b)
        finally:
            self._branches.joining = None

    def _joined(self, a: Any, b: Any) -> Any:
        if a is b:
            return a
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return self._joined_tensors(a, b)
        kinds = [kind for kind in _KINDS if isinstance(a, kind)]
        if kinds and [kind for kind in _KINDS if isinstance(b, kind)] == kinds:
            return self._joined_numbers(a, b)
        if type(a) is type(b) and isinstance(a, tuple) and len(a) == len(b):
            parts = [self._joined(x, y) for x, y in zip(a, b, strict=True)]
            return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)
        if type(a) is type(b) and isinstance(a, _CONSTANTS) and a == b:
            return a
        raise self._branches.unmergeable(f"the sides leave {type(a).__name__} and {type(b).__name__}", self._site)

    def _joined_numbers(self, a: Any, b: Any) -> Any:
        if not isinstance(a, SYMBOLS) and not isinstance(b, SYMBOLS) and repr(a) == repr(b):  # -0.0 equals 0.0
            return a
        if "-0.0" in (repr(side) for side in (a, b) if isinstance(side, float)):  # for sympy, zero has no sign
            return self._chosen_on_device(a, b)
        if isinstance(a, (bool, torch.SymBool)):
            return self._branches.short((self._condition & a) | (torch.sym_not(self._condition) & b))
        if isinstance(a, (int, torch.SymInt)) and expression_of(a) == expression_of(b):
            return a
        made = self._choice(a, b)
        return made if isinstance(made, torch.SymFloat) else self._branches.short(made)

    def _chosen_on_device(self, a: Any, b: Any) -> Any:
        """One of two numbers that are no symbols, as a number of its own."""
        if isinstance(a, SYMBOLS) or isinstance(b, SYMBOLS):
            raise self._branches.unmergeable("a side leaves a zero below zero", self._site)
        branches = self._branches
        outer, branches.naming = branches.naming, True
        try:
            flag = torch.scalar_tensor(torch.sym_ite(self._condition, 1, 0), dtype=torch.bool)
            first, second = (torch.scalar_tensor(float(side), dtype=torch.float64) for side in (a, b))
            made: Any = torch.where(flag, first, second).item()
        finally:
            branches.naming = outer
        taken = branches.facts.hint(self._condition.node.expr)
        if taken is not None:
            (symbol,) = made.node.expr.free_symbols
            branches.facts.hints[symbol] = float(a if taken == sympy.true else b)
        return made

    def _choice(self, a: Any, b: Any) -> Any:
        """One of two numbers, of which either may be a symbol."""
        if isinstance(a, SYMBOLS) != isinstance(b, SYMBOLS):  # `torch.sym_ite` takes two of a kind
            a, b = (side if isinstance(side, SYMBOLS) else torch.sym_ite(self._condition, side, side) for side in (a, b))
        return torch.sym_ite(self._condition, a, b)

    def _joined_tensors(self, a: Tensor, b: Tensor) -> Tensor:
        resolve = self._branches.facts.resolve

        def of(numbers: Sequence[Any]) -> list[sympy.Basic]:
            return [resolve(expression_of(number)) for number in numbers]

        alike = (a.dtype, a.device, a.layout, a.dim()) == (b.dtype, b.device, b.layout, b.dim())
        sizes = list(zip(of(a.shape), of(b.shape), strict=False))
        differing = [dim for dim, (x, y) in enumerate(sizes) if x != y]
        if not alike or len(differing) > 1:
            raise self._branches.unmergeable(f"the sides leave tensors {_text(a)} and {_text(b)}", self._site)
        if differing:  # as many rows as the side that is taken has, none of the other
            dim = differing[0]
            lengths = self._choice(a.shape[dim], 0), self._choice(0, b.shape[dim])
            return torch.cat([x.narrow(dim, 0, length) for x, length in zip((a, b), lengths, strict=True)], dim)
        strides = zip(sizes, of(a.stride()), of(b.stride()), strict=True)
        if any(x != y for (size, _), x, y in strides if size != 1):  # sums would be taken in another order
            raise self._branches.unmergeable("the sides leave tensors that lie in memory differently", self._site)
        flag = torch.scalar_tensor(torch.sym_ite(self._condition, 1, 0), dtype=torch.bool, device=a.device)
        return torch.where(flag, a, b)


def _text(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}".removeprefix("torch.")
