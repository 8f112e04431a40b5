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
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.printers import PythonPrinter

from passes.control_flow.branches import Forks, Snapshot, Stopped, Unmergeable
from passes.control_flow.code_patching import Plan, Written, forked
from passes.control_flow.stopping import EndlessError, Hook
from passes.core.facts import Assumption, Facts
from passes.core.host_reads import Read
from passes.core.predicates import BranchArm, Loops
from passes.core.source_location import user_site
from passes.core.symbols import expression_of
from passes.errors import Unremovable
from passes.tracing.fake_kernels import StepFakes
from passes.tracing.float_operations import opaque_floats
from passes.tracing.hints import HintedShapes, HintMode
from passes.tracing.number_builtins import symbolic_builtins
from passes.tracing.torch_functions import SymbolicEntry

Tensor = torch.Tensor
aten = torch.ops.aten
_STARTS_STEPS = True  # see `passes.control_flow.branches.TRACER`


class _Tracing(threading.local):
    """Whether this thread traces a step."""

    now = False


_tracing = _Tracing()
_metadata_of = getattr(proxy_tensor, "_extract_tensor_metadata", None)


def _metadata(value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return None if _tracing.now else _metadata_of(value, *args, **kwargs)  # type: ignore[misc]


@contextlib.contextmanager
def _without_metadata() -> Iterator[None]:
    """Leave out ``meta["tensor_meta"]``, of which nothing here makes use.

    Which memory formats symbolic sizes may have are a fifth of the questions that tracing asks.
    """
    if _metadata_of is not None:
        setattr(proxy_tensor, "_extract_tensor_metadata", _metadata)  # noqa: B010  # it stays: other threads get what they always got
    before, _tracing.now = _tracing.now, True
    try:
        yield
    finally:
        _tracing.now = before


def _made(step: Callable[..., Any], fakes: Sequence[Tensor], forks: Forks) -> GraphModule:
    """The graph of ``step``.

    Raises:
        Unmergeable: a side of a branch cannot be traced. One that is not taken may raise anything.
    """
    try:
        with _without_metadata():
            module = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False)(*fakes)
    except Unmergeable:
        raise
    except (Stopped, EndlessError):
        assert forks.failed is not None
        raise forks.failed from None
    except Exception as error:
        arm = next((trip for trip in reversed(forks.loops.trips) if isinstance(trip, BranchArm)), None)
        if arm is None:
            raise
        text = str(error).partition("\n")[0]
        raise Unmergeable(f"a side raises {type(error).__name__}: {text}", arm.site) from error
    except SystemExit:  # what a handler of the step's makes of `Stopped`
        if forks.failed is None:
            raise
        raise forks.failed from None
    finally:
        forks.watch(False)
    if forks.failed is not None:
        raise forks.failed
    left = next((trip for trip in forks.loops.trips if isinstance(trip, BranchArm)), None)
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
    expressions = [facts.resolve(expression_of(value)) for value in advanced]
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
    forbidding: Hook | None = None,
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
        unroll: what becomes of loops over data; see `passes.core.predicates.Loops`.
        structure: gives, after the step, what is to be found as `module.meta["structure"]`.
        plan, functions: branches of which both sides are traced, and the functions that they stand in; see `branches`.
        snapshot, restore: see `passes.trace_step.trace_step`.
        forbidding: stops sides of branches before they act outside of the step; see `passes.control_flow.branches`.
        modules: names of modules in whose lines ``int``, ``float``, ``range``, ``len``, ``min`` and ``max`` keep symbols.

    Returns:
        The graph of ATen operators, with `Facts` in ``meta["facts"]``, the storages of its inputs, which may be those of tensors
        that it holds, in ``meta["storages"]``, and file and line in ``node.meta["site"]``.

    Raises:
        Unremovable: the step does with a host value what no graph can do.
        Unmergeable: both sides of a branch cannot be in the graph.
    """
    restore()
    environment = HintedShapes(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    mode = StepFakes(allow_non_fake_inputs=True, shape_env=environment, static_shapes=True)
    facts = environment.facts = Facts(mode)
    with mode:
        inputs = [*tensors, *(number.tensor for number in numbers)]
        fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in inputs]
    facts.loops = Loops(unroll)
    forks = Forks(facts, facts.loops, environment.static, snapshot, forbidding)
    follow = HintMode(facts, reads, facts.loops, forks)
    meta: dict[str, Any] = {}

    def followed(*arguments: Tensor) -> list[Any]:
        with SymbolicEntry(follow.drop, follow.rows), opaque_floats(facts, forks), follow:
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
    if follow.raised is not None:
        raise follow.raised
    resolved = [Assumption(facts.resolve(d.predicate), d.outcome, d.site) for d in facts.decisions]
    kept = [d for d in resolved if not d.predicate.free_symbols & facts.offsets]
    facts.decisions = list({d.condition: d for d in reversed(kept)}.values())[::-1]
    _hold(module, [number.tensor for number in numbers])
    _name_state(module)
    inputs = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    given = [(name, tensor) for name, tensor in zip(inputs, tensors, strict=False) if tensor.layout == torch.strided]
    storages = {name: tensor.untyped_storage()._cdata for name, tensor in given}
    module.meta.update(meta, facts=facts, storages=storages)
    return module
