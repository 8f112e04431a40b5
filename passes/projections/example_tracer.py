"""Symbolic tracing with example inputs: the graph that `torch.fx.symbolic_trace` gives, for more programs.

Every node is evaluated on fake tensors as it is made, so that a program may iterate over what it computes (``*x.shape[:-2]``,
``for part in x.chunk(4)``). Sizes stay nodes of the graph: it serves other numbers of rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

from passes.core.node_calls import call

Tensor = torch.Tensor


def trace_with_inputs(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> GraphModule:
    """The forward pass of ``module`` as a graph of functions and methods.

    Args:
        module: what is traced; nothing of it runs on real tensors. Arguments with a default that are not given keep it.
        args, kwargs: example inputs. Tensors become placeholders, anything else is a part of the graph.

    Raises:
        torch.fx.proxy.TraceError: the program branches on a value, or leaves PyTorch in another way.
    """
    given = inspect.signature(module.forward).bind(*args, **(kwargs or {})).arguments
    tracer = _ExampleTracer(given)
    concrete = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    graph = tracer.trace(module, concrete)
    return GraphModule(module, graph, type(module).__name__)


class _ExampleTracer(Tracer):
    """Knows what every node evaluates to, for the example inputs."""

    proxy_buffer_attributes = True

    def __init__(self, examples: Mapping[str, Any]) -> None:
        super().__init__()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._examples = {n: self._mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in examples.items()}
        self._values: dict[Node, Any] = {}
        self._attributes: dict[str, Tensor] = {}
        self._fixed: set[Node] = set()  # computed from weights only

    def trace(self, root: Any, concrete_args: Any = None) -> Graph:
        """See `torch.fx.Tracer.trace`. Attributes are read now: while tracing, reading one makes a node."""
        self._attributes = dict([*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)])
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        """Every module is entered."""
        return False

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Proxy:
        """A proxy whose value is known."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        self._values[node] = self._evaluated(node)
        if kind == "get_attr" or (node.all_input_nodes and self._fixed.issuperset(node.all_input_nodes)):
            self._fixed.add(node)
        return proxy

    def _evaluated(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._examples.get(str(node.target), node.args[0] if node.args else None)
        if node.op == "get_attr":
            return self._attributes[str(node.target)]
        if node.op == "output":
            return None
        args, kwargs = map_arg((node.args, node.kwargs), self._value)  # type: ignore[misc]
        with self._mode, torch.no_grad():
            return call(node, args, kwargs)

    def _value(self, node: Node) -> Any:
        """The value of a node; one that the tracer made itself reads a tensor that it found in the program."""
        if node not in self._values:
            name = str(node.target)
            return self._attributes[name] if name in self._attributes else vars(self.root)[name]
        return self._values[node]

    def proxy(self, node: Node) -> Proxy:
        """See `torch.fx.Tracer.proxy`."""
        return _KnownProxy(node, self)

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """The elements of a tuple or list, each a node."""
        return iter([obj[index] for index in range(self.length(obj))])  # type: ignore[index]

    def length(self, obj: Proxy) -> int:
        """How many there are. The graph insists on that number, unless it follows from ranks and weights."""
        value = self._values[obj.node]
        if not isinstance(value, (tuple, list)):
            raise TraceError(f"{obj.node} is a {type(value).__name__}: its length may differ from call to call")
        if not isinstance(value, torch.Size) and obj.node not in self._fixed:
            count: Any = self.create_proxy("call_function", len, (obj,), {})
            message = f"{obj.node} does not have the {len(value)} parts it was traced with"
            self.create_proxy("call_function", torch._assert, (count == len(value), message), {})
        return len(value)


class _KnownProxy(Proxy):
    """A proxy that has a length where its value has one."""

    tracer: _ExampleTracer

    def __len__(self) -> int:
        return self.tracer.length(self)
