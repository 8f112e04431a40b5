"""The private interfaces of torch that tracing stands on: the one file that names them.

A release of torch that renames one breaks this file, and `METHODS` says what is expected of the classes besides their
names. A test goes through both, and says which one is missing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, should_allow_numbers_as_tensors
from torch.fx import GraphModule, Node
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "PythonPrinter",
    "ShapeEnv",
    "TorchDispatchMode",
    "enable_python_dispatcher",
    "graph_of",
    "inductor_decompositions",
    "newest_nodes",
    "node_of",
    "should_allow_numbers_as_tensors",
]
METHODS = {
    "torch._subclasses.fake_tensor.FakeTensorMode": ("_cached_dispatch_impl", "_dispatch_impl", "from_tensor", "shape_env"),
    "torch.Tensor": ("_has_symbolic_sizes_strides",),
    "torch.fx.experimental.symbolic_shapes.ShapeEnv": (
        *("_maybe_evaluate_static", "bound_sympy", "create_unbacked_symint", "evaluate_expr", "guard_or_defer_runtime_assert"),
    ),
    "torch.utils._sympy.printers.PythonPrinter": ("doprint",),
    "torch.fx.experimental.proxy_tensor": ("_extract_tensor_metadata",),
    "torch.SymInt": ("__eq__", "__add__", "__repr__", "__str__"),
    "torch.SymFloat": ("__add__", "__lt__", "__repr__", "__str__"),
    "torch.SymBool": ("__and__", "__or__", "__repr__", "__str__"),
}
"""What is called, overridden or put back of each class or module, besides what is imported here."""


class _Tracing(threading.local):
    """Whether this thread traces a step."""

    now = False


_tracing = _Tracing()
_metadata_of = getattr(proxy_tensor, "_extract_tensor_metadata", None)

_UNNAMED: dict[str, Any] = {name: True for name in ("_disable_torch_fn_metadata_mode",) if name in signature(make_fx).parameters}
"""Leaves out a function mode that only names nodes, and that calls what a program put in the place of torch's function again."""


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


def graph_of(function: Callable[..., Any], fakes: Sequence[Tensor]) -> GraphModule:
    """The operators that ``function`` calls on fake tensors, those that ask for data among them."""
    with _without_metadata():
        traced = make_fx(
            function, tracing_mode="fake", _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False, **_UNNAMED
        )
        return traced(*fakes)


def newest_nodes() -> Iterator[Node]:
    """The nodes of the graph that this thread traces, the last one first; none where it traces nothing."""
    tracing = get_proxy_mode()
    yield from reversed(tracing.tracer.graph.nodes) if tracing is not None else ()


def node_of(tensor: Tensor) -> Node | None:
    """The node that stands for a tensor in the graph that this thread traces."""
    tracing = get_proxy_mode()
    slot: Any = get_proxy_slot(tensor, tracing.tracer, None) if tracing is not None else None
    return slot.proxy.node if slot is not None else None


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """What Inductor takes operators apart by; imported when it is asked for, since that takes seconds."""
    from torch._inductor.decomposition import select_decomp_table

    table: Mapping[Any, Callable[..., Any]] = select_decomp_table()
    return table
