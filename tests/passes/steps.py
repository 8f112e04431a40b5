"""Steps for tests of the passes: traced with the values that an eager run reads, rewritten, printed, compared with eager."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import passes
from graphs.observation.eager_trace import trace_eager
from graphs.state.python_state import PythonState
from passes.remove_host_values import TABLES

Step = Callable[..., Any]
ALL = (*TABLES, "branches")
OLDER = torch.__version__ < (2, 13)
"""Whether torch asks some sizes for their number, or whether they are zero, that later releases leave open."""


def traced(step: Step, *tensors: Tensor, merge: bool = False) -> passes.TracedStep:
    """``step`` traced with the values that it reads when it is run on copies of ``tensors``.

    Args:
        merge: whether both sides of branches are traced.
    """
    arguments = [tensor.clone() for tensor in tensors]
    _, trace = trace_eager(lambda: step(*arguments), arguments)
    trace.written.restore()
    reads = [passes.Read(r.operator, r.frame, r.value, r.index, r.place, r.turn, r.source) for r in trace.reads]
    modules = {read.site[0] for read in reads}
    names = [name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None) in modules]
    snapshot = functools.partial(PythonState, tensors=False) if merge else None
    return passes.trace_step(lambda leaves, _: flat(step(*leaves)), tensors, reads, names, snapshot=snapshot)


def flat(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


@dataclass
class Rewritten:
    """A rewritten graph and what the passes said of it."""

    graph: passes.RewrittenGraph

    @property
    def module(self) -> GraphModule:
        return self.graph.module

    @property
    def changes(self) -> list[tuple[str, str]]:
        return [(change.before, change.after) for change in self.graph.changes]

    @property
    def assumes(self) -> bool:
        return self.graph.assumes

    def __call__(self, *tensors: Tensor) -> tuple[list[Tensor], bool, list[Tensor]]:
        """Results, whether the graph's assumptions held, and what undoes its writes."""
        made = list(self.module(*tensors))
        if not self.assumes:
            return made, True, []
        count = self.graph.results
        return made[:count], not bool(made[count]), made[count + 1 :]

    def undo(self, saved: Sequence[Tensor]) -> None:
        passes.undo(self.graph.undo, saved)


def rewritten(
    step: Step, *tensors: Tensor, bounds: Mapping[str, int] | None = None, only: Sequence[str] = ALL, merge: bool = False
) -> Rewritten:
    """``step`` without host values."""
    graph = passes.remove_host_values(traced(step, *tensors, merge=merge), bounds, only)
    graph.module.graph.lint()
    graph.module.recompile()
    return Rewritten(graph)


def printed(graph: GraphModule | passes.TracedStep) -> str:
    """The graph as text: one operator a line, with its arguments and the shape of its result."""
    module = graph if isinstance(graph, GraphModule) else graph.module
    return "\n".join(_line(node) for node in module.graph.nodes)


def _line(node: Node) -> str:
    if node.op == "output":
        return f"return {_arguments(node.args[0])}"
    value = node.meta.get("val")
    shape = f" {list(map(str, value.shape))}".replace("'", "") if isinstance(value, Tensor) else ""
    target = str(node.target).removeprefix("aten.") if node.op == "call_function" else node.op
    keywords = [f"{name}={_arguments(value)}" for name, value in node.kwargs.items()]
    given = [*map(_arguments, node.args), *keywords] if node.op == "call_function" else [str(node.target)]
    return f"{node.name}{shape} = {target}({', '.join(given)})"


def _arguments(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_arguments, value))}]"
    return getattr(value, "__name__", None) or str(value)


def check(graph: Rewritten, step: Step, *tensors: Tensor, exact: bool = True, may_break: bool = False) -> bool:
    """Run ``graph`` and ``step`` on copies of ``tensors`` and compare results and writes.

    Where the graph says that its assumptions failed, its writes are undone and every byte must be as before.

    Args:
        exact: bit for bit; otherwise as close as another order of additions allows.
        may_break: whether the assumptions may fail although the step itself runs.

    Returns:
        Whether the assumptions held.
    """
    ours, theirs = ([tensor.clone() for tensor in tensors] for _ in range(2))
    try:
        expected: list[Any] | None = flat(step(*theirs))
    except (RuntimeError, IndexError, AssertionError):
        expected = None  # what eager refuses, the graph has to notice
    try:
        results, held, saved = graph(*ours)
    except (RuntimeError, IndexError):
        assert expected is None, "the graph raises for a step that runs"
        return False
    if not held:
        assert expected is None or may_break, "the assumptions failed for a step that runs"
        graph.undo(saved)
        same(ours, tensors, exact=True)
        return False
    assert expected is not None, "eager raises, and the graph did not notice"
    same(results, expected, exact)
    same(ours, theirs, exact)
    return True


def same(ours: Sequence[Any], theirs: Sequence[Any], exact: bool) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, (a, b)
        tolerance = {"rtol": 0, "atol": 0} if exact else {}
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
