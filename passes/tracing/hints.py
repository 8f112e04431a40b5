"""Following an eager run while a step is traced: its values become hints, its ways those that the trace takes.

A question about a symbol (a branch, a check of torch's) is answered with the hint, and the answer becomes an assumption.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.control_flow.branches import Branches
from passes.control_flow.stopping import inside
from passes.core.composites import run, taken_apart
from passes.core.facts import Facts
from passes.core.predicates import LIMIT, Loops
from passes.core.schema import is_mutable, shares_first_argument
from passes.core.source_location import Place, Site, place_of, user_frame, user_place, user_site
from passes.core.symbols import SYMBOLS, expression_of
from passes.core.values.host_reads import Read, Reads
from passes.errors import Unremovable
from passes.tracing.torch_functions import traced_tensor
from passes.tracing.torch_symbols import (
    FakeTensor,
    FloorDiv,
    ShapeEnv,
    TorchDispatchMode,
    newest_nodes,
    node_of,
    should_allow_numbers_as_tensors,
)

Tensor = torch.Tensor
aten = torch.ops.aten
_FALLBACK = inspect.signature(ShapeEnv.evaluate_expr)


def _is_condition(expression: sympy.Basic) -> bool:
    """Whether an expression is true or false. A plain symbol is a number, though sympy takes it for either."""
    return isinstance(expression, (sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction))


class HintedShapes(ShapeEnv):
    """A shape environment that answers questions about symbols with hints, and writes down that it did."""

    facts: Facts

    def static(self, expression: sympy.Basic) -> Any:
        """The value of an expression that has it whatever the data, else None."""
        known: dict[sympy.Basic, Any] = self.__dict__.setdefault("_static_values", {})
        if expression not in known:
            known[expression] = self._maybe_evaluate_static(expression)
        return known[expression]

    def bound_sympy(self, expr: sympy.Expr, size_oblivious: bool = False) -> Any:
        """The range of an expression, by what its symbols are defined as."""
        return super().bound_sympy(self.facts.resolve(expr), size_oblivious)  # type: ignore[arg-type]

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        """The answer to a question about symbols, which becomes an assumption.

        Raises:
            Unremovable: the eager run did not read what it depends on, or Python needs the number itself.
        """
        expression = self.facts.resolve(orig_expr)
        known = self.static(expression)
        if known is not None:
            return known
        fallback = _FALLBACK.bind(self, orig_expr, *args, **kwargs).arguments.get("fallback_value")
        if fallback is not None:  # torch asks, and goes a way that is right for either answer
            return sympy.sympify(fallback)
        value = self.facts.hint(expression) if self.facts.executed() else None
        if value is None and _is_condition(expression):  # where the eager run did not come
            value = self.facts.outcomes.get(user_place())
        if value is None:
            value = self.facts.hint(expression)
        if value is None and not self.facts.executed() and isinstance(expression, sympy.Ge) and expression.rhs == 0:
            value = sympy.true  # an index that is not known, which counts from the front
        if value is None and not self.facts.executed() and _is_condition(expression):
            value = sympy.false  # any way will do, until both are in the graph
        if value is None:
            raise Unremovable("a branch depends on a value that the eager run did not read", "branch", user_site())
        if isinstance(value, (sympy.logic.boolalg.BooleanAtom, bool)):
            frame = user_frame()
            place = place_of(frame) if frame is not None else Place("", 0)
            self.facts.decide(expression, bool(value), user_site(), place)
            if frame is not None:
                self.facts.branches[place] = frame.f_code
        elif not value.is_Integer:
            raise Unremovable("Python needs the number itself, which will hardly ever be the same again", "float", user_site())
        else:
            self.facts.decide(sympy.Eq(expression, value), True, user_site())
        return value

    def guard_or_defer_runtime_assert(  # type: ignore[override]  # of a method that torch caches
        self, orig_expr: Any, msg: str, fx_node: Any = None, **_: Any
    ) -> bool:
        """Assume what torch would check when the graph runs."""
        expression = self.facts.resolve(orig_expr)
        if self.static(expression) is None:
            self.facts.decide(expression, True, user_site())
        return True


class HintMode(TorchDispatchMode):
    """Gives the symbols that an operator makes their hints, in the order of the eager run."""

    def __init__(self, facts: Facts, reads: Sequence[Read], loops: Loops, branches: Branches) -> None:
        super().__init__()
        self.branches = branches
        self.facts, self.loops = facts, loops
        self.reads = Reads(reads)
        self.raised: Unremovable | None = None  # for the step's own lines may catch what tracing raises

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with inside(func, args):
            return self._traced(func, args, kwargs)

    def _traced(self, func: Any, args: Any, kwargs: Any) -> Any:
        whole = taken_apart(self, func, args, kwargs or {})
        if whole is not NotImplemented:
            return whole
        place = self.branches.asked or user_place()
        self.branches.loops.runs(func)
        if func is aten._local_scalar_dense.default:
            args = (traced_tensor(args[0]),)
        args, kwargs = _not_computed(func, args, kwargs or {})
        try:
            result = run(func, args, kwargs)
        except Exception as error:
            detail = f"it raises {type(error).__name__} while the step is traced, which the step catches"
            self.raised = self.raised or Unremovable(detail, str(func), user_site())
            raise
        self._mark(place.site)
        self._forget_offsets(result, (args, kwargs))
        if func is aten.nonzero.default and isinstance(args[0].numel(), int):
            facts = self.facts
            facts.limits |= {s: args[0].numel() for s in _fresh(result, facts)}
        if func is aten.split_with_sizes.default:
            self._define_rest(args[0], args[1], *args[2:])
        if func is aten.slice.Tensor:
            self._define_slice(result, *args, **kwargs)
        elif not self.branches.naming and self.facts.executed():
            source = _source(args[0]) if func is aten._local_scalar_dense.default else None
            self._follow(str(func), result, place, source)
        elif not self.branches.naming and func is aten._local_scalar_dense.default:
            _note(str(func), unread=place)
        return result

    def _follow(self, operator: str, result: Any, place: Place, source: str | None) -> None:
        """Give the symbols that an operator has made what the eager run read there.

        Args:
            source: what made the tensor, for an operator that gives its one number.
        """
        if source is not None or operator in self.reads.operators:
            reads = self.reads.next(operator, place, number=source is not None, source=source or "")
            if reads:
                self._name(result, reads, place.site)
                _note(operator, reads=reads)

    def _mark(self, site: Site) -> None:
        """Note the line at the nodes that have just been made."""
        for node in newest_nodes():
            if "site" in node.meta:
                break
            node.meta.update(site=site, trips=self.loops.trips, joins=self.branches.joining)

    def rows(self, x: Tensor) -> Any:
        """The rows of ``x`` for a Python loop, if it can be unrolled."""
        size = x.shape[0] if x.dim() else 0
        symbol = self.facts.resolve(size.node.expr) if isinstance(size, torch.SymInt) else None
        limit, hint = self.facts.limits.get(symbol, LIMIT + 1), self.facts.hints.get(symbol)
        if self.loops.unroll == "no" or hint is None or limit > LIMIT:
            return NotImplemented
        return self.loops.rows(x, symbol, limit, int(hint))

    def drop(self, operator: str) -> None:
        """Forget a read of a whole tensor: the traced step knows its outcome."""
        if self.facts.executed():
            self.reads.drop(operator, user_place())

    def _name(self, result: Any, reads: list[Read], site: Site) -> None:
        facts, value = self.facts, reads[0].value
        for symbol in _fresh(result, facts) if _is_kind(value, result) else ():
            facts.hints[symbol] = float(value) if isinstance(value, float) else int(value)
            facts.sources[symbol] = site
            facts.reads[symbol] = reads

    def _define_slice(self, result: Tensor, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> None:
        size = result.shape[dim]
        fresh = _fresh(result, self.facts)
        if not isinstance(size, torch.SymInt) or size.node.expr not in fresh or not isinstance(step, int):
            return
        facts, whole = self.facts, expression_of(x.shape[dim])
        joins = self.branches.joining is not None
        first, last = (facts.resolve(bound) for bound in (_index(start, 0, whole, joins), _index(end, whole, whole, joins)))
        count = sympy.simplify(last - first)
        hint = facts.hint(sympy.Le(last, whole))
        if step == 1 and count.is_Integer and hint == sympy.true:  # a window of fixed size that ends before its tensor does
            facts.decide(sympy.Le(last, whole), True, user_site())
            length = sympy.Max(0, count)
        else:
            length = sympy.Max(0, sympy.Min(last, whole) - sympy.Min(first, whole))
            length = length if step == 1 else FloorDiv(length + step - 1, step)
        facts.replacements[size.node.expr] = facts.resolve(length)

    def _define_rest(self, x: Tensor, sizes: Sequence[Any], dim: int = 0) -> None:
        """The last part of a split is what the others leave: torch requires the sizes to add up."""
        facts = self.facts
        lengths = [facts.resolve(expression_of(size)) for size in sizes]
        last = lengths[-1]
        rest = facts.resolve(expression_of(x.shape[dim])) - sum(lengths[:-1])
        if isinstance(last, sympy.Symbol) and last not in rest.free_symbols:
            facts.replacements[last] = rest

    def _forget_offsets(self, result: Any, arguments: Any) -> None:
        """The place of a view in its storage may be a symbol of its own; nothing reads it."""
        offset = result.storage_offset() if isinstance(result, Tensor) and result.layout == torch.strided else 0
        if isinstance(offset, torch.SymInt):
            given = {symbol for leaf in tree_leaves(arguments) for symbol in _symbols_of(leaf)}
            known = {*self.facts.hints, *self.facts.replacements, *given}
            self.facts.offsets |= {symbol for symbol in offset.node.expr.free_symbols if symbol not in known}


def _symbols_of(value: Any) -> Iterator[sympy.Symbol]:
    """The symbols of a number, or of where and how a tensor lies."""
    parts = (*value.shape, *value.stride(), value.storage_offset()) if isinstance(value, FakeTensor) else (value,)
    for part in parts:
        if isinstance(part, SYMBOLS):
            yield from part.node.expr.free_symbols


def _not_computed(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of an operator that fake tensors do not stand for yet, as views, for which they do.

    An operator that takes a number for a tensor would be run, to find its constant: written, or taken for the same always.
    """
    if not should_allow_numbers_as_tensors(func):
        return args, kwargs
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return args, kwargs
    if not (is_mutable(func) or all(tensor.numel() <= 1 for tensor in tensors)):
        return args, kwargs
    made: tuple[Any, Any] = tree_map_only(Tensor, aten.alias.default, (args, kwargs))
    return made


def _fresh(result: Any, facts: Facts) -> list[sympy.Symbol]:
    """Symbols in a result that nothing is known of."""
    found: list[sympy.Symbol] = []
    for value in result if isinstance(result, (tuple, list)) else (result,):
        parts = value.shape if isinstance(value, Tensor) else (value,)
        for part in parts:
            if isinstance(part, SYMBOLS):
                found += [s for s in part.node.expr.free_symbols if s not in facts.hints and s not in facts.replacements]
    return list(dict.fromkeys(found))


def _source(tensor: Tensor) -> str:
    """The operator that made a traced tensor; empty for one that the step was given or holds."""
    node = node_of(tensor)
    while node is not None and _shares_memory(node):
        node = node.args[0]  # type: ignore[assignment]
    return str(node.target) if node is not None and node.op == "call_function" else ""


def _shares_memory(node: torch.fx.Node) -> bool:
    """Whether the result of a node lies where its first argument does."""
    return shares_first_argument(node.target) and isinstance(node.args[0], torch.fx.Node)


def _note(operator: str, **what: Any) -> None:
    """Write down at the node that has just been made what the eager run read there, or where it read nothing."""
    for node in newest_nodes():
        if str(node.target) == operator:
            node.meta.update(what)
            break


def _is_kind(value: Any, result: Any) -> bool:
    """Whether a value that the eager run read may be what a traced operator gives: the truth of a number is not the number."""
    if isinstance(value, bool) or isinstance(result, torch.SymBool):
        return isinstance(value, bool) and not isinstance(result, (torch.SymInt, torch.SymFloat))
    return value is not None


def _index(value: Any, default: Any, whole: sympy.Basic, natural: bool = False) -> sympy.Basic:
    """A slice bound as a number from the front: one below zero, unless it is ``natural``, counts from the end."""
    if value is None or (isinstance(value, int) and value == sys.maxsize):
        return sympy.sympify(default)
    if isinstance(value, torch.SymInt):
        return value.node.expr if natural or bool(value >= 0) else sympy.Max(value.node.expr + whole, 0)
    return sympy.Integer(min(value, sys.maxsize)) if value >= 0 else sympy.Max(value + whole, 0)
