"""The ATen graph of a whole step, with the values that the host reads as symbols.

The step's Python runs once on fake tensors (``make_fx``), so that nothing is computed and every line that runs is the
user's own, Hugging Face caches and other opaque objects included. ``.item()``, ``nonzero`` and their like give
*hinted* symbols: numbers without a value whose hint is what an eager run of the same step read at the same place. A
branch on a symbol takes the way the hint takes, and the predicate becomes a `Decision` of the graph: an assumption that
has to hold whenever the graph runs. In-place operators stay in place.

Python turns symbols into plain numbers where it converts: ``int(t)``, ``range(n)``, ``min(a, b)``. In the modules whose
lines read values, these names mean symbolic versions while the step is traced (`symbolic_builtins`). Composite operators
are decomposed by torch's Python versions where it has them: those in C++ ask some sizes for their number.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MappingProxyType
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, should_allow_numbers_as_tensors
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.printers import PythonPrinter

from passes.builtins import symbolic_builtins
from passes.errors import Unremovable
from passes.exchange import Plan, Written, forked
from passes.fakes import StepFakes
from passes.forks import Forks, Snapshot, Unmergeable
from passes.loops import LIMIT, Arm, Loops
from passes.python_entry import SymbolicEntry, traced_tensor
from passes.sites import Site, user_frame, user_site

Tensor = torch.Tensor
aten = torch.ops.aten
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Read:
    """A value that the host read in an eager run of the step.

    Attributes:
        operator, site: which operator gave it, at which line.
        call: the same number for values that one call gave.
    """

    operator: str
    site: Site
    value: Any
    call: int = 0


@dataclass(frozen=True)
class Decision:
    """A predicate over host values and the outcome that the traced way depends on."""

    predicate: sympy.Basic
    outcome: bool
    site: Site

    @property
    def holds(self) -> sympy.Basic:
        """The condition under which the graph is the step."""
        return self.predicate if self.outcome else sympy.Not(self.predicate)


@dataclass
class Facts:
    """What is known of the symbols of a graph; found as ``module.meta["facts"]``.

    Attributes:
        hints: the value of each symbol in the eager run.
        definitions: symbols that are functions of others (the length of a slice).
        decisions: what the graph assumes.
        sources: file and line that read each symbol.
        names: what symbols are called that stand for numbers of Python.
        limits: largest values of counts.
        loops, outcomes: the loops that are being traced, and which way branches inside of them went, by line.
        branches: the functions whose lines ask for the truth of a symbol, by line.
        unmerged: why branches have only one of their sides in the graph, by file and first line.
        offsets: symbols that stand for places of views in their storage, which no value depends on.
        mode: the fake mode of the values in ``node.meta["val"]``.
    """

    mode: FakeTensorMode
    hints: dict[sympy.Symbol, int | float] = field(default_factory=dict)
    definitions: dict[sympy.Symbol, sympy.Basic] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    sources: dict[sympy.Symbol, Site] = field(default_factory=dict)
    names: dict[sympy.Symbol, str] = field(default_factory=dict)
    offsets: set[sympy.Symbol] = field(default_factory=set)
    limits: dict[sympy.Symbol, int] = field(default_factory=dict)
    loops: Loops | None = None
    outcomes: dict[Site, bool] = field(default_factory=dict)
    branches: dict[Site, CodeType] = field(default_factory=dict)
    unmerged: dict[Site, str] = field(default_factory=dict)
    shorter: dict[Any, sympy.Basic] = field(default_factory=dict)  # of `passes.bounds`, for which sympy takes long
    _resolved: dict[sympy.Basic, sympy.Basic] = field(default_factory=dict)
    _hinted: dict[sympy.Basic, sympy.Basic] = field(default_factory=dict)
    _known: set[sympy.Basic] = field(default_factory=set)

    def happened(self) -> bool:
        """Whether the eager run came to where the traced one is: into these trips, and sides of branches."""
        trips = self.loops.trips if self.loops is not None else ()
        return all(self.hint(trip.runs) == sympy.true for trip in trips)

    def resolve(self, expression: sympy.Basic) -> sympy.Basic:
        """``expression`` with defined symbols replaced by what they stand for."""
        made = self._resolved.get(expression)
        if made is None:
            made = expression.replace(sympy.ITE, _without_choice) if expression.has(sympy.ITE) else expression
        while any(symbol in self.definitions for symbol in made.free_symbols):
            made = made.xreplace(self.definitions)
        self._resolved[expression] = made
        return made

    def forget(self, decisions: int, definitions: Mapping[sympy.Symbol, sympy.Basic]) -> None:
        """Go back to the first ``decisions``, and to these definitions."""
        del self.decisions[decisions:]
        self.definitions = dict(definitions)
        self._resolved.clear()
        self._known = {decision.holds for decision in self.decisions}

    def hint(self, expression: sympy.Basic) -> sympy.Basic | None:
        """The value of ``expression`` in the eager run, or None."""
        resolved = self.resolve(expression)
        symbols = resolved.free_symbols
        if any(symbol not in self.hints for symbol in symbols):
            value = resolved.xreplace({s: sympy.sympify(self.hints[s]) for s in symbols if s in self.hints})
        else:
            value = self._hinted.get(resolved)
            if value is None:
                value = self._hinted[resolved] = resolved.xreplace({s: sympy.sympify(self.hints[s]) for s in symbols})
        return value if not value.free_symbols else None

    def decide(self, predicate: sympy.Basic, outcome: bool, site: Site) -> None:
        """Add an assumption, unless it is there."""
        decision = Decision(self.resolve(predicate), outcome, site)
        if self.loops is not None and self.loops.trips:  # what a trip assumes matters if it takes place
            skipped = [sympy.Not(trip.runs) for trip in self.loops.trips]
            if self.happened():
                self.outcomes[site] = bool(outcome)
            decision = Decision(sympy.Or(*skipped, decision.holds), True, site)
        if decision.holds not in self._known and decision.holds != sympy.true:
            self._known.add(decision.holds)
            self.decisions.append(decision)


def _without_choice(holds: sympy.Basic, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """One of two conditions, in terms that torch knows the bounds of."""
    return sympy.Or(sympy.And(holds, a), sympy.And(sympy.Not(holds), b))


def _is_condition(expression: sympy.Basic) -> bool:
    """Whether an expression is true or false. A plain symbol is a number, though sympy takes it for either."""
    return isinstance(expression, (sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction))


class _Hinted(ShapeEnv):
    """A shape environment that answers questions about symbols with hints, and writes down that it did."""

    facts: Facts

    def static(self, expression: sympy.Basic) -> Any:
        """The value of an expression that has it whatever the data, else None."""
        known: dict[sympy.Basic, Any] = self.__dict__.setdefault("_static_values", {})
        if expression not in known:
            known[expression] = self._maybe_evaluate_static(expression)
        return known[expression]

    def bound_sympy(self, expr: sympy.Expr, size_oblivious: bool = False) -> Any:
        return super().bound_sympy(self.facts.resolve(expr), size_oblivious)  # type: ignore[arg-type]

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(ShapeEnv.evaluate_expr).bind(self, orig_expr, *args, **kwargs).arguments
        expression = self.facts.resolve(orig_expr)
        known = self.static(expression)
        if known is not None:
            return known
        if bound.get("fallback_value") is not None:  # torch asks, and goes a way that is right for either answer
            return sympy.sympify(bound["fallback_value"])
        value = self.facts.hint(expression) if self.facts.happened() else None
        if value is None and _is_condition(expression):  # where the eager run did not come
            value = self.facts.outcomes.get(user_site())
        if value is None:
            value = self.facts.hint(expression)
        if value is None and not self.facts.happened() and isinstance(expression, sympy.Ge) and expression.rhs == 0:
            value = sympy.true  # an index that is not known, which counts from the front
        if value is None and not self.facts.happened() and _is_condition(expression):
            value = sympy.false  # any way will do, until both are in the graph
        if value is None:
            raise Unremovable("a branch depends on a value that the eager run did not read", "branch", user_site())
        if isinstance(value, (sympy.logic.boolalg.BooleanAtom, bool)):
            self.facts.decide(expression, bool(value), user_site())
            frame = user_frame()
            if frame is not None:
                self.facts.branches[frame.f_code.co_filename, frame.f_lineno] = frame.f_code
        elif not value.is_Integer:
            raise Unremovable("Python needs the number itself, which will hardly ever be the same again", "float", user_site())
        else:
            self.facts.decide(sympy.Eq(expression, value), True, user_site())
        return value

    def guard_or_defer_runtime_assert(  # type: ignore[override]  # of a method that torch caches
        self, orig_expr: Any, msg: str, fx_node: Any = None, **_: Any
    ) -> bool:
        expression = self.facts.resolve(orig_expr)
        if self.static(expression) is None:
            self.facts.decide(expression, True, user_site())
        return True


class _Follow(TorchDispatchMode):
    """Gives the symbols that an operator makes their hints, in the order of the eager run."""

    def __init__(self, facts: Facts, reads: Sequence[Read], loops: Loops, forks: Forks) -> None:
        super().__init__()
        self.forks = forks
        self.facts, self.loops = facts, loops
        self.reads = list(reads)
        self.given: list[Any] = []  # values of a list, for the items it is made of

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        site = user_site()
        if func is aten._local_scalar_dense.default:
            args = (traced_tensor(args[0]),)
        args, kwargs = _not_computed(func, args, kwargs or {})
        result = func(*args, **kwargs)
        self._mark(site)
        self._forget_offsets(result, (args, kwargs))
        if func is aten.nonzero.default and isinstance(args[0].numel(), int):
            facts = self.facts
            facts.limits |= {s: args[0].numel() for s in _fresh(result, facts)}
        if func is aten.split_with_sizes.default:
            self._define_rest(args[0], args[1], *args[2:])
        if func is aten.slice.Tensor:
            self._define_slice(result, *args, **kwargs)
        elif self.forks.naming or not self.facts.happened():
            return result
        elif func is aten._local_scalar_dense.default and (self.given or self._lists()):
            self._name(result, [self.given.pop(0)], site)
        elif (values := self._next(str(func), site)) is not None:
            self._name(result, values, site)
        return result

    def _mark(self, site: Site) -> None:
        """Note the line at the nodes that have just been made."""
        tracing = get_proxy_mode()
        for node in reversed(tracing.tracer.graph.nodes) if tracing is not None else ():
            if "site" in node.meta:
                break
            node.meta.update(site=site, trips=self.loops.trips, joins=self.forks.joining)

    def rows(self, x: Tensor) -> Any:
        """The rows of ``x`` for a Python loop, if it can be unrolled."""
        size = x.shape[0] if x.dim() else 0
        symbol = self.facts.resolve(size.node.expr) if isinstance(size, torch.SymInt) else None
        limit, hint = self.facts.limits.get(symbol, LIMIT + 1), self.facts.hints.get(symbol)
        if self.loops.unroll == "no" or hint is None or limit > LIMIT:
            return NotImplemented
        return self.loops.rows(x, symbol, limit, int(hint))

    def drop(self, operator: str) -> None:
        """Forget a read that has no value: a conversion that the traced step does without."""
        if self.reads and self.reads[0].operator == operator and self.facts.happened():
            self.reads.pop(0)

    def _next(self, operator: str, site: Site) -> list[Any] | None:
        """The values of the reads of one operator call; None where the eager run read none here.

        Reads that the traced step does not make are passed over: some operators check their arguments on a CPU only.
        """
        index = next((i for i, r in enumerate(self.reads) if (r.operator, r.site) == (operator, site)), None)
        if index is None:
            return None
        del self.reads[:index]
        first = self.reads.pop(0)
        values = [first.value]
        while self.reads and (self.reads[0].operator, self.reads[0].call) == (operator, first.call):
            values.append(self.reads.pop(0).value)
        return values

    def _lists(self) -> bool:
        """Whether the host read a list here, of which the traced step reads one item after the other."""
        if self.reads and self.reads[0].operator in _OTHER_READS:
            self.given = _flat(self.reads.pop(0).value)
        return bool(self.given)

    def _name(self, result: Any, values: list[Any], site: Site) -> None:
        facts = self.facts
        for symbol in _fresh(result, facts):
            value = values[0]
            if value is None:
                continue
            facts.hints[symbol] = float(value) if isinstance(value, float) else int(value)
            facts.sources[symbol] = site

    def _define_slice(self, result: Tensor, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> None:
        size = result.shape[dim]
        fresh = _fresh(result, self.facts)
        if not isinstance(size, torch.SymInt) or size.node.expr not in fresh or not isinstance(step, int):
            return
        facts, whole = self.facts, _expression(x.shape[dim])
        joins = self.forks.joining is not None
        first, last = (facts.resolve(bound) for bound in (_index(start, 0, whole, joins), _index(end, whole, whole, joins)))
        count = sympy.simplify(last - first)
        hint = facts.hint(sympy.Le(last, whole))
        if step == 1 and count.is_Integer and hint == sympy.true:  # a window of fixed size that ends before its tensor does
            facts.decide(sympy.Le(last, whole), True, user_site())
            length = sympy.Max(0, count)
        else:
            length = sympy.Max(0, sympy.Min(last, whole) - sympy.Min(first, whole))
            length = length if step == 1 else FloorDiv(length + step - 1, step)
        facts.definitions[size.node.expr] = facts.resolve(length)

    def _define_rest(self, x: Tensor, sizes: Sequence[Any], dim: int = 0) -> None:
        """The last part of a split is what the others leave: torch requires the sizes to add up."""
        facts = self.facts
        lengths = [facts.resolve(_expression(size)) for size in sizes]
        last = lengths[-1]
        rest = facts.resolve(_expression(x.shape[dim])) - sum(lengths[:-1])
        if isinstance(last, sympy.Symbol) and last not in rest.free_symbols:
            facts.definitions[last] = rest

    def _forget_offsets(self, result: Any, arguments: Any) -> None:
        """The place of a view in its storage may be a symbol of its own; nothing reads it."""
        offset = result.storage_offset() if isinstance(result, Tensor) and result.layout == torch.strided else 0
        if isinstance(offset, torch.SymInt):
            given = {symbol for leaf in tree_leaves(arguments) for symbol in _symbols_of(leaf)}
            known = {*self.facts.hints, *self.facts.definitions, *given}
            self.facts.offsets |= {symbol for symbol in offset.node.expr.free_symbols if symbol not in known}


def _symbols_of(value: Any) -> Iterator[sympy.Symbol]:
    """The symbols of a number, or of where and how a tensor lies."""
    parts = (*value.shape, *value.stride(), value.storage_offset()) if isinstance(value, FakeTensor) else (value,)
    for part in parts:
        if isinstance(part, _SYMBOLS):
            yield from part.node.expr.free_symbols


_OTHER_READS = (
    *("Tensor.tolist", "Tensor.numpy", str(aten.equal.default), str(aten.allclose.default)),
    *("torch.tensor", "torch.as_tensor", "torch.asarray", "Tensor.new_tensor"),
)


def _not_computed(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of an operator that fake tensors do not stand for yet, as views, for which they do.

    An operator that takes a number for a tensor would be run, to find its constant: written, or taken for the same always.
    """
    if not should_allow_numbers_as_tensors(func):
        return args, kwargs
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return args, kwargs
    if not (func._schema.is_mutable or all(tensor.numel() <= 1 for tensor in tensors)):
        return args, kwargs
    made: tuple[Any, Any] = tree_map_only(Tensor, aten.alias.default, (args, kwargs))
    return made


def _fresh(result: Any, facts: Facts) -> list[sympy.Symbol]:
    """Symbols in a result that nothing is known of."""
    found: list[sympy.Symbol] = []
    for value in result if isinstance(result, (tuple, list)) else (result,):
        parts = value.shape if isinstance(value, Tensor) else (value,)
        for part in parts:
            if isinstance(part, _SYMBOLS):
                found += [s for s in part.node.expr.free_symbols if s not in facts.hints and s not in facts.definitions]
    return list(dict.fromkeys(found))


def _flat(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]


def _expression(value: Any) -> sympy.Basic:
    return value.node.expr if isinstance(value, _SYMBOLS) else sympy.sympify(value)


def _index(value: Any, default: Any, whole: sympy.Basic, natural: bool = False) -> sympy.Basic:
    """A slice bound as a number from the front: one below zero, unless it is ``natural``, counts from the end."""
    if value is None or (isinstance(value, int) and value == sys.maxsize):
        return sympy.sympify(default)
    if isinstance(value, torch.SymInt):
        return value.node.expr if natural or bool(value >= 0) else sympy.Max(value.node.expr + whole, 0)
    return sympy.Integer(min(value, sys.maxsize)) if value >= 0 else sympy.Max(value + whole, 0)


def _made(step: Callable[..., Any], fakes: Sequence[Tensor], forks: Forks) -> GraphModule:
    """The graph of ``step``.

    Raises:
        Unmergeable: a side of a branch cannot be traced. One that is not taken may raise anything.
    """
    try:
        module = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False)(*fakes)
    except Unmergeable:
        raise
    except Exception as error:
        arm = next((trip for trip in reversed(forks.loops.trips) if isinstance(trip, Arm)), None)
        if arm is None:
            raise
        text = str(error).partition("\n")[0]
        raise Unmergeable(f"a side raises {type(error).__name__}: {text}", arm.site) from error
    if forks.failed is not None:
        raise forks.failed
    left = next((trip for trip in forks.loops.trips if isinstance(trip, Arm)), None)
    if left is not None:
        raise forks.unmergeable("a side raises an exception, which is caught elsewhere", left.site)
    return module


def _hold(module: GraphModule, tensors: Sequence[Tensor]) -> None:
    """Make the last inputs of a graph tensors that it holds itself."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for index, (node, tensor) in enumerate(zip(placeholders[len(placeholders) - len(tensors) :], tensors, strict=True)):
        module.register_buffer(f"number_{index}", tensor, persistent=False)
        with module.graph.inserting_after(placeholders[-1]):
            held = module.graph.get_attr(f"number_{index}")
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)
        module.graph.erase_node(node)


def _name_state(module: GraphModule) -> None:
    """Tell the step's own tensors from constants made of host data, which `make_fx` names alike."""
    constants = {n.args[0].target for n in module.graph.nodes if n.target in _LIFTS and isinstance(n.args[0], torch.fx.Node)}
    names: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr" or node.target in constants or not str(node.target).startswith("_tensor_constant"):
            continue
        if node.target not in names:
            names[node.target] = f"state_{len(names)}"
            module.register_buffer(names[node.target], getattr(module, node.target), persistent=False)
            delattr(module, node.target)
        node.target = names[node.target]
    module.recompile()


_LIFTS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)


@dataclass(frozen=True)
class Number:
    """A number of Python that the step advances, with the 0-d int64 tensor that will hold it, and its value now."""

    tensor: Tensor
    value: int
    name: str


def _advance(
    facts: Facts, numbers: Sequence[Number], tensors: Sequence[Tensor], symbols: Sequence[Any], advanced: Sequence[Any]
) -> Any:
    """Write the new numbers to their tensors, and return a function that computes them from the old ones."""
    for tensor, value in zip(tensors, advanced, strict=True):
        tensor.copy_(torch.scalar_tensor(value, dtype=torch.int64, device=tensor.device))
    names = [symbol.node.expr for symbol in symbols]
    expressions = [facts.resolve(_expression(value)) for value in advanced]
    for number, expression in zip(numbers, expressions, strict=True):
        if not expression.free_symbols <= set(names):
            detail = f"{number.name} advances by a value that only the device knows"
            raise Unremovable(detail, number.name, user_site(), "Keep it in a tensor")
    printer = PythonPrinter()
    source = f"lambda {', '.join(map(str, names))}: ({', '.join(map(printer.doprint, expressions))},)"
    return eval(source, {"math": math})  # printed from expressions of whole numbers, nothing of the user's


def trace_once(
    step: Callable[[Sequence[Tensor], Sequence[Any]], list[Any]],
    tensors: Sequence[Tensor],
    reads: Sequence[Read] = (),
    modules: Iterable[str] = (),
    numbers: Sequence[Number] = (),
    advanced: Callable[[], Sequence[Any]] = tuple,
    unroll: str = "no",
    structure: Callable[[], Any] = lambda: None,
    plan: Plan = MappingProxyType({}),
    functions: Mapping[Written, Sequence[FunctionType]] = MappingProxyType({}),
    snapshot: Snapshot | None = None,
    restore: Callable[[], None] = lambda: None,
) -> GraphModule:
    """Trace ``step`` without running anything on a device.

    Args:
        step: takes ``tensors`` and symbols for ``numbers``, and returns a flat list. Python state it changes is the
            caller's to restore; tensors that it reaches without being given them become ``get_attr`` nodes, and nothing
            is written to them.
        tensors: real tensors, for their shapes, dtypes and devices.
        reads: what an eager run read, in order.
        numbers: numbers of Python that the step advances.
        advanced: gives, after the step, what they became; `module.meta["advance"]` computes the same from the old ones.
        unroll: what becomes of loops over data; see `passes.loops.Loops`.
        structure: gives, after the step, what is to be found as `module.meta["structure"]`.
        plan, functions: branches of which both sides are traced, and the functions that they stand in; see `passes.forks`.
        snapshot, restore: see `passes.rounds.trace_step`.
        modules: names of modules in whose lines ``int``, ``float``, ``range``, ``len``, ``min`` and ``max`` keep symbols.

    Returns:
        The graph of ATen operators, with `Facts` in ``meta["facts"]``, the storages of its inputs, which may be those of tensors
        that it holds, in ``meta["storages"]``, and file and line in ``node.meta["site"]``.

    Raises:
        Unremovable: the step does with a host value what no graph can do.
        Unmergeable: both sides of a branch cannot be in the graph.
    """
    restore()
    environment = _Hinted(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    mode = StepFakes(allow_non_fake_inputs=True, shape_env=environment, static_shapes=True)
    facts = environment.facts = Facts(mode)
    with mode:
        inputs = [*tensors, *(number.tensor for number in numbers)]
        fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in inputs]
    facts.loops = Loops(unroll)
    forks = Forks(facts, facts.loops, environment.static, snapshot)
    follow = _Follow(facts, reads, facts.loops, forks)
    meta: dict[str, Any] = {}

    def followed(*arguments: Tensor) -> list[Any]:
        with SymbolicEntry(follow.drop, follow.rows), follow:
            count = len(arguments) - len(numbers)
            arguments, held = arguments[:count], arguments[count:]
            symbols: list[Any] = [tensor.item() for tensor in held]
            for symbol, number in zip(symbols, numbers, strict=True):
                facts.hints[symbol.node.expr] = number.value
                facts.names[symbol.node.expr] = number.name
            results = step(arguments, symbols)
            meta["structure"] = structure()
            if numbers:
                meta["advance"] = _advance(facts, numbers, held, symbols, advanced())
            return results

    as_written = torch.compiler.set_stance("force_eager")
    named = symbolic_builtins(modules)
    with named, forked(plan, forks, functions), torch.no_grad(), as_written, enable_python_dispatcher():
        module = _made(followed, fakes, forks)
    resolved = [Decision(facts.resolve(d.predicate), d.outcome, d.site) for d in facts.decisions]
    kept = [d for d in resolved if not d.predicate.free_symbols & facts.offsets]
    facts.decisions = list({d.holds: d for d in reversed(kept)}.values())[::-1]
    _hold(module, [number.tensor for number in numbers])
    _name_state(module)
    inputs = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    given = [(name, tensor) for name, tensor in zip(inputs, tensors, strict=False) if tensor.layout == torch.strided]
    storages = {name: tensor.untyped_storage()._cdata for name, tensor in given}
    module.meta.update(meta, facts=facts, storages=storages)
    return module
