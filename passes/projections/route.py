"""Grouped projections become one operator with a weight that was prepared once.

Before::

    %view : call_method[target=view](args = (%weight, 2, -1, 256), kwargs = {})
    %w : call_method[target=transpose](args = (%view, 1, 2), kwargs = {})
    %o : call_method[target=reshape](args = (%x, -1, 2, 256), kwargs = {})
    %grouped : call_method[target=transpose](args = (%o, 0, 1), kwargs = {})
    %bmm : call_function[target=torch.bmm](args = (%grouped, %w), kwargs = {})
    %y : call_method[target=transpose](args = (%bmm, 0, 1), kwargs = {})

After::

    %reshape : call_method[target=reshape](args = (%x, -1, 2, 256), kwargs = {})
    %routed : call_function[target=torch.ops.graphs.wo_a_einsum](args = (%reshape, %_routed_weight_0), kwargs = {})

Left alone is what is no such projection: another contraction, an operator that adds a bias, an activation or weight that is
repeated over the groups, a weight that is not constant, an activation that something writes in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

from passes.core.names import ROUTED_WEIGHT, fresh_name
from passes.core.node_calls import attribute
from passes.core.schema import may_write
from passes.projections.graph_views import GraphViews
from passes.projections.grouped_projection import GroupedProjection, grouped_projections
from passes.projections.layouts import Layout, compose
from passes.projections.rearrange import Emitter, Rows, Step, activation_steps, result_steps

Tensor = torch.Tensor


class Target(Protocol):
    """What computes a projection: ``operator(o, *tensors, *constants)`` gives ``[M, G, N]`` for ``o [M, G, K]``."""

    @property
    def operator(self) -> OpOverload:
        """The operator."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The prepared weight and what belongs to it."""
        ...

    @property
    def constants(self) -> Sequence[Any]:
        """Numbers, flags and strings that follow."""
        ...


class Routes(Protocol):
    """Says what computes a projection, by its weight."""

    def __call__(self, weight: Tensor, name: str, tokens: int | None) -> Target | None:
        """The target for ``weight [G, N, K]``, or None to leave the projection alone.

        Args:
            weight: a view of the original where that is possible, in the dtype of the activation.
            name: of the parameter or placeholder that the weight comes from.
            tokens: M, or None where the graph serves several.
        """
        ...


def routing(
    module: GraphModule,
    routes: Routes,
    *,
    constants: Mapping[str, Tensor] | None = None,
    inputs: Sequence[Any] | None = None,
) -> list[tuple[str, str]]:
    """Replace grouped projections by the operators that ``routes`` names; see this file's description.

    Weights are computed and prepared now, each once, and become buffers of ``module``; parameters of ``module`` that nothing
    else reads are deleted from it. Parameters count as constant: change one later, and route again. For inference only.

    Args:
        module: a graph of functions and methods (`torch.fx.symbolic_trace`, Dynamo) or of ATen operators (make_fx,
            `torch.export`, AOTAutograd).
        routes: the routing table.
        constants: further tensors that never change, by the name or target of the node that reads them: where a tracer
            makes the parameters inputs, as Dynamo and AOTAutograd do, they are given here.
        inputs: example inputs, needed for a graph without metadata only (`torch.fx.symbolic_trace`). Nothing is computed
            with them, and the graph goes on serving other numbers of rows; a size of 1 stands in the way of that.

    Returns:
        For each projection what it was and what it is, as printed nodes.
    """
    with unset_fake_temporarily():  # AOTAutograd calls compilers under its own fake tensors
        graph = GraphViews(module, constants or {}, inputs)
        rewrite = _Rewrite(module, graph, routes)
        for node in list(module.graph.nodes):
            if not node._erased:
                rewrite.visit(node)
        if rewrite.changes:
            rewrite.release()
            module.graph.lint()
            module.recompile()
    return rewrite.changes


class _Rewrite:
    """Replaces the projections of one graph, and remembers what was prepared for them."""

    def __init__(self, module: GraphModule, graph: GraphViews, routes: Routes) -> None:
        self.module, self.graph, self.routes = module, graph, routes
        self.changes: list[tuple[str, str]] = []
        self.prepared: dict[tuple[Any, ...], _Call | None] = {}
        self.parameters: dict[str, None] = {}
        self.called = {str(node.target) for node in module.graph.find_nodes(op="call_module")}

    def visit(self, node: Node) -> None:
        """Replace ``node``, with what only rearranges its result, if it is a projection that can be written down."""
        for found in grouped_projections(self.graph, node):
            shape = self.graph.shape(found.root) or ()
            rows = Rows(shape, found.activation, free=self.graph.is_free(found.root))
            before = activation_steps(shape, found.activation, rows)
            for last, layout in self._rearranged(found) if before is not None else []:
                after = result_steps(found.sizes, layout, rows)
                if before is not None and after is not None:
                    return self._replace(found, last, before, after)
        return None

    def _rearranged(self, found: GroupedProjection) -> list[tuple[Node, Layout]]:
        """``found.node`` and users that only rearrange its result, the last first, as views of ``y [M, G, N]``."""
        chain, node = [(found.node, found.result)], found.node
        while len(node.users) == 1:
            (node,) = node.users
            view = next((view for view in self.graph.views(node) if view.root is found.node), None)
            layout = None if view is None else compose(found.result, view.layout)
            if layout is None or not layout.covers(math.prod(found.sizes)) or self.graph.disturbed(found.reads, found.root, node):
                break
            chain.append((node, layout))
        return chain[::-1]

    def _replace(self, found: GroupedProjection, last: Node, before: list[Step], after: list[Step]) -> None:
        routed = self._call(found)
        if routed is None:
            return
        printed = found.node.format_node() or str(found.node)
        emit = Emitter(self.module, last, found.node, found.root)
        o = emit.steps(found.root, before)
        y = emit.operator(routed.operator, (o, *(emit.attribute(name) for name in routed.buffers), *routed.constants))
        new = emit.steps(y, after)
        self.changes.append((printed, y.format_node() or str(y)))
        last.replace_all_uses_with(new)
        self.graph.replaced(last, new)
        self.parameters |= dict.fromkeys(found.parameters)
        self._erase(last)

    def _call(self, found: GroupedProjection) -> _Call | None:
        """The operator and what it takes after ``o``; prepared at the first use of a weight."""
        tokens = None if self.graph.is_free(found.root) else found.sizes[0]
        key = (*found.key, tokens)
        if key not in self.prepared:
            target = self.routes(found.weight(), found.parameters[0], tokens)
            self.prepared[key] = None if target is None else self._hold(target)
        return self.prepared[key]

    def _hold(self, target: Target) -> _Call:
        return _Call(target.operator, [self._buffer(tensor) for tensor in target.tensors], tuple(target.constants))

    def _buffer(self, tensor: Tensor) -> str:
        """The name of the buffer that holds ``tensor``."""
        held = self.module.named_buffers(recurse=False)
        name = next((name for name, buffer in held if buffer is tensor), None)
        if name is None:
            name = fresh_name(self.module, ROUTED_WEIGHT)
            self.module.register_buffer(name, tensor)
        return name

    def _erase(self, node: Node) -> None:
        """Remove ``node``, and what was computed only for it."""
        if node._erased or node.users or node.op in ("placeholder", "output") or may_write(node, self.module):
            return
        inputs = node.all_input_nodes
        self.module.graph.erase_node(node)
        for source in inputs:
            self._erase(source)

    def release(self) -> None:
        """Delete the parameters that weights were prepared from, where the graph no longer reads them."""
        used = {str(node.target) for node in self.module.graph.nodes if node.op in ("get_attr", "call_module")}
        for name in self.parameters:
            reads = any(name == other or name.startswith(other + ".") for other in used)
            if not reads and isinstance(attribute(self.module, name), Tensor):
                called = next((module for module in self.called if name.startswith(module + ".")), None)
                if called is not None:  # the model's own module, which is only referred to from here
                    self.module.delete_submodule(called)
                else:
                    owner, _, last = name.rpartition(".")
                    delattr(self.module.get_submodule(owner), last)


class _Call(NamedTuple):
    """An operator, the buffers that it takes after ``o``, and the constants that follow."""

    operator: OpOverload
    buffers: list[str]
    constants: tuple[Any, ...]
