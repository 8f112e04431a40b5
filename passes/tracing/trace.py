"""The ATen graph of a whole step, with the values that the host reads as symbols.

The step's Python runs once on fake tensors (``make_fx``), so that nothing is computed and every line that runs is the
user's own, Hugging Face caches and other opaque objects included. ``.item()``, ``nonzero`` and their like give
*hinted* symbols: numbers without a value whose hint is what an eager run of the same step read at the same place. A
branch on a symbol takes the way the hint takes, and the predicate becomes a `Assumption` of the graph: an assumption that
has to hold whenever the graph runs. In-place operators stay in place.

Python turns symbols into plain numbers where it converts: ``int(t)``, ``range(n)``, ``min(a, b)``. In the modules whose
lines read values, these names mean symbolic versions while the step is traced (`symbolic_builtins`). Composite operators
are decomposed by torch's Python versions where it has them: those in C++ ask some sizes for their number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule

from passes.control_flow.branches import Branches, Stopped, Unmergeable
from passes.control_flow.code_patching import Plan, Written, patched
from passes.control_flow.python_changes import Snapshot
from passes.control_flow.stopping import EndlessError, Hook
from passes.core.facts import Assumption, Facts
from passes.core.names import NUMBER, STATE, is_traced_constant
from passes.core.predicates import BranchArm, Loops
from passes.core.source_location import user_site
from passes.core.symbols import expression_of
from passes.core.traced_step import Advance, TracedStep, note_storages, placeholders
from passes.core.values.host_reads import Read
from passes.errors import Unremovable
from passes.tracing.fake_kernels import StepFakes, outlive_first_thread
from passes.tracing.float_operations import opaque_floats
from passes.tracing.hints import HintedShapes, HintMode
from passes.tracing.number_builtins import symbolic_builtins
from passes.tracing.torch_functions import SymbolicEntry
from passes.tracing.torch_symbols import PythonPrinter, enable_python_dispatcher, graph_of

Tensor = torch.Tensor
aten = torch.ops.aten
_STARTS_STEPS = True  # see `passes.control_flow.python_changes.TRACER`
_LIFTS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)


@dataclass(frozen=True)
class Number:
    """A number of Python that the step advances, with the 0-d int64 tensor that will hold it, and its value now."""

    tensor: Tensor
    value: int
    name: str


def _nothing() -> None:
    """Leave Python as it is."""


@dataclass(frozen=True)
class TraceRequest:
    """What to trace, and how.

    Attributes:
        step: takes ``tensors`` and symbols for ``numbers``, and returns a flat list. Python state it changes is the
            caller's to restore; tensors that it reaches without being given them become ``get_attr`` nodes, and nothing
            is written to them.
        tensors: real tensors, for their shapes, dtypes and devices.
        reads: what an eager run read, in order.
        modules: names of modules in whose lines ``int``, ``float``, ``range``, ``len``, ``min`` and ``max`` keep symbols.
        numbers: numbers of Python that the step advances.
        advanced: gives, after the step, what they became; `TracedStep.advance` computes the same from the old ones.
        structure: gives, after the step, what is to be found as `TracedStep.structure`.
        restore: puts Python back to what it was before the step ran.
        snapshot: takes snapshots of Python objects, which tell whether a side of a branch changes any; without it no branch
            is merged.
        forbidding: stops sides of branches before they act outside of the step; see `passes.control_flow.branches`.
        unroll: what becomes of loops over data; see `passes.core.predicates.Loops`.
        partial: whether a step that does what no graph can do is traced up to there.
        plan, functions: branches of which both sides are traced, and the functions that they stand in; see `branches`.
    """

    step: Callable[[Sequence[Tensor], Sequence[Any]], list[Any]]
    tensors: Sequence[Tensor]
    reads: Sequence[Read] = ()
    modules: Iterable[str] = ()
    numbers: Sequence[Number] = ()
    advanced: Callable[[], Sequence[Any]] = tuple
    structure: Callable[[], Any] = _nothing
    restore: Callable[[], None] = _nothing
    snapshot: Snapshot | None = None
    forbidding: Hook | None = None
    unroll: str = "no"
    partial: bool = False
    plan: Plan = field(default_factory=dict)
    functions: Mapping[Written, Sequence[FunctionType]] = field(default_factory=dict)


def trace_once(request: TraceRequest) -> TracedStep:
    """Trace a step without running anything on a device.

    Raises:
        Unremovable: the step does with a host value what no graph can do; not where it is traced up to there.
        Unmergeable: both sides of a branch cannot be in the graph.
    """
    request.restore()
    trace = _Trace(request)
    module = trace.run()
    _forget_unread(trace.facts)
    _hold(module, [number.tensor for number in request.numbers])
    _name_state(module)
    note_storages(module, list(request.tensors))
    return TracedStep(module, trace.facts, trace.structure, trace.advance, stopped=trace.stopped)


class _Trace:
    """One run of a step on fake tensors.

    Attributes:
        facts: what is found out of its symbols.
        structure, advance, stopped: as in `TracedStep`, when it has run.
    """

    def __init__(self, request: TraceRequest) -> None:
        self._request = request
        environment = HintedShapes(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
        outlive_first_thread()
        self._mode = StepFakes(allow_non_fake_inputs=True, shape_env=environment, static_shapes=True)
        self.facts = environment.facts = Facts(self._mode)
        self.facts.loops = loops = Loops(request.unroll)
        self._branches = Branches(self.facts, loops, environment.static, request.snapshot, request.forbidding)
        self._hints = HintMode(self.facts, request.reads, loops, self._branches)
        self.structure: Any = None
        self.advance: Advance | None = None
        self.stopped: Unremovable | None = None

    def run(self) -> GraphModule:
        """The operators of the step; raises as `trace_once` does."""
        request = self._request
        with self._mode:
            inputs = [*request.tensors, *(number.tensor for number in request.numbers)]
            fakes = [self._mode.from_tensor(tensor, static_shapes=True) for tensor in inputs]
        as_written = torch.compiler.set_stance("force_eager")
        named, merged = symbolic_builtins(request.modules), patched(request.plan, self._branches, request.functions)
        ours = contextlib.nullcontext() if fakes else self._mode  # torch takes the mode of the inputs, else one of its own
        with named, merged, torch.no_grad(), as_written, enable_python_dispatcher(), ours:
            module = _made(self._step, fakes, self._branches)
        if self._hints.raised is not None and not request.partial:
            raise self._hints.raised
        self.stopped = self.stopped or self._hints.raised
        return module

    def _step(self, *arguments: Tensor) -> list[Any]:
        """The step, given fake tensors for its tensors and for those that hold its numbers."""
        request, facts = self._request, self.facts
        with SymbolicEntry(self._hints.drop, self._hints.rows), opaque_floats(facts, self._branches), self._hints:
            count = len(arguments) - len(request.numbers)
            given, held = arguments[:count], arguments[count:]
            symbols: list[Any] = [tensor.item() for tensor in held]
            for symbol, number in zip(symbols, request.numbers, strict=True):
                facts.hints[symbol.node.expr] = number.value
                facts.names[symbol.node.expr] = number.name
            try:
                results = request.step(given, symbols)
            except Unremovable as reason:
                if not request.partial:
                    raise
                self.stopped = reason
                return []
            self.structure = request.structure()
            if request.numbers:
                self.advance = _advance(facts, request.numbers, held, symbols, request.advanced())
            return results


def _forget_unread(facts: Facts) -> None:
    """Keep each assumption once, and none of where views lie in their storage: no value depends on that."""
    resolved = [Assumption(facts.resolve(d.predicate), d.outcome, d.site) for d in facts.assumptions]
    kept = [d for d in resolved if not d.predicate.free_symbols & facts.offsets]
    facts.assumptions = list({d.condition: d for d in reversed(kept)}.values())[::-1]


def _made(step: Callable[..., Any], fakes: Sequence[Tensor], branches: Branches) -> GraphModule:
    """The graph of ``step``.

    Raises:
        Unmergeable: a side of a branch cannot be traced. One that is not taken may raise anything.
    """
    try:
        module = graph_of(step, fakes)
    except Unmergeable:
        raise
    except (Stopped, EndlessError):
        assert branches.failed is not None
        raise branches.failed from None
    except Exception as error:
        arm = next((trip for trip in reversed(branches.loops.trips) if isinstance(trip, BranchArm)), None)
        if arm is None:
            raise
        text = str(error).partition("\n")[0]
        raise Unmergeable(f"a side raises {type(error).__name__}: {text}", arm.site) from error
    except SystemExit:  # what a handler of the step's makes of `Stopped`
        if branches.failed is None:
            raise
        raise branches.failed from None
    finally:
        branches.watch(False)
    if branches.failed is not None:
        raise branches.failed
    left = next((trip for trip in branches.loops.trips if isinstance(trip, BranchArm)), None)
    if left is not None:
        raise branches.unmergeable("a side raises an exception, which is caught elsewhere", left.site)
    return module


def _hold(module: GraphModule, tensors: Sequence[Tensor]) -> None:
    """Make the last inputs of a graph tensors that it holds itself."""
    inputs = placeholders(module)
    for index, (node, tensor) in enumerate(zip(inputs[len(inputs) - len(tensors) :], tensors, strict=True)):
        module.register_buffer(f"{NUMBER}{index}", tensor, persistent=False)
        with module.graph.inserting_after(inputs[-1]):
            held = module.graph.get_attr(f"{NUMBER}{index}")
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)
        module.graph.erase_node(node)


def _name_state(module: GraphModule) -> None:
    """Tell the step's own tensors from constants made of host data, which `make_fx` names alike."""
    constants = {n.args[0].target for n in module.graph.nodes if n.target in _LIFTS and isinstance(n.args[0], torch.fx.Node)}
    names: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr" or node.target in constants or not is_traced_constant(node.target):
            continue
        if node.target not in names:
            names[node.target] = f"{STATE}{len(names)}"
            module.register_buffer(names[node.target], getattr(module, node.target), persistent=False)
            delattr(module, node.target)
        node.target = names[node.target]
    module.recompile()


def _advance(
    facts: Facts, numbers: Sequence[Number], tensors: Sequence[Tensor], symbols: Sequence[Any], advanced: Sequence[Any]
) -> Advance:
    """Write the new numbers to their tensors, and return a function that computes them from the old ones."""
    for tensor, value in zip(tensors, advanced, strict=True):
        tensor.copy_(torch.scalar_tensor(value, dtype=torch.int64, device=tensor.device))
    names = [symbol.node.expr for symbol in symbols]
    expressions = [facts.resolve(expression_of(value)) for value in advanced]
    for number, expression in zip(numbers, expressions, strict=True):
        if not expression.free_symbols <= set(names):
            detail = f"{number.name} advances by a value that only the device knows"
            raise Unremovable(detail, number.name, user_site(), "Keep it in a tensor")
    printer = PythonPrinter()
    source = f"lambda {', '.join(map(str, names))}: ({', '.join(map(printer.doprint, expressions))},)"
    made: Advance = eval(source, {"math": math})  # printed from expressions of whole numbers, nothing of the user's
    return made
