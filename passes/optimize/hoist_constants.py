"""Host constants are uploaded once.

Before::

    %c : get_attr[target=_tensor_constant0]               # made from host data by the step
    %d : call_function[target=aten._to_copy.default](args = (%c,), kwargs = {device: cuda:0})

After::

    %_hoisted_constant_0 : get_attr[target=_hoisted_constant_0]   # on the device already
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.core.aliasing import parent_of, written
from passes.core.names import HOISTED, fresh_name, is_host_constant
from passes.core.node_calls import attribute
from passes.core.schema import is_mutable

aten = torch.ops.aten
_MOVES = (aten._to_copy.default, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.detach.default, aten.clone.default)
_SAME = (aten.alias.default, aten.detach.default)


def hoist_constants(module: GraphModule) -> list[tuple[str, str]]:
    """Evaluate copies, casts and uploads of constant tensors now, and keep the result as a buffer.

    Parameters and buffers are left alone, since they may be updated, and so is a constant that the step writes to: each
    call needs its fresh copy.
    """
    return hoist(module)[0]


def hoist(module: GraphModule) -> tuple[list[tuple[str, str]], list[torch.Tensor]]:
    """`hoist_constants`, and the tensors of the step's own that were uploaded as they are now.

    A step that writes to one of these later (``tensor._version``) needs another graph.
    """
    changes: list[tuple[str, str]] = []
    uploaded: list[torch.Tensor] = []
    for node in list(module.graph.nodes):
        if node.op != "call_function" or _is_written(node):
            continue
        value = _folded(module, node)
        if value is None and node.target in _MOVES:
            constant = _constant(module, node.args[0])
            if constant is None and (constant := _host_table(module, node)) is not None:
                uploaded.append(constant)
            value = _moved(node, constant) if constant is not None else None
        if value is not None:
            changes.append(_replaced(module, node, value))
    return changes, uploaded


def _moved(node: Node, constant: torch.Tensor) -> torch.Tensor:
    """What a copy of a constant gives."""
    with torch.no_grad():
        made: torch.Tensor = node.target(constant, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return made


def _replaced(module: GraphModule, node: Node, value: torch.Tensor) -> tuple[str, str]:
    """Put a buffer in the place of a node; returns both, as they are printed."""
    before, name = node.format_node() or str(node), fresh_name(module, HOISTED)
    module.register_buffer(name, value, persistent=False)
    with module.graph.inserting_before(node):
        hoisted = module.graph.get_attr(name)
    hoisted.meta = dict(node.meta)
    node.replace_all_uses_with(hoisted)
    module.graph.erase_node(node)
    return before, hoisted.format_node() or str(hoisted)


def _constant(module: GraphModule, node: object) -> torch.Tensor | None:
    """The tensor behind a ``get_attr`` node that a tracer made for host data; None for a model's own tensors."""
    if not isinstance(node, Node) or node.op != "get_attr" or _is_written(node) or not is_host_constant(node.target):
        return None
    value = attribute(module, str(node.target))
    return value if isinstance(value, torch.Tensor) else None


def _folded(module: GraphModule, node: Node) -> torch.Tensor | None:
    """What an operator on constants of the host gives, if that is on the host too."""
    target: Any = node.target
    pure = isinstance(target, torch._ops.OpOverload) and not is_mutable(target)
    if not pure or target in _MOVES or torch.Tag.nondeterministic_seeded in target.tags or len(target._schema.returns) != 1:
        return None
    inputs = {n: _constant(module, n) for n in node.all_input_nodes}
    if not (inputs or _is_moved(node)) or any(value is None or value.device.type != "cpu" for value in inputs.values()):
        return None
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), inputs.__getitem__)  # type: ignore[arg-type]
    with torch.no_grad():
        value = target(*args, **kwargs)
    return value.clone() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else None


def _is_moved(node: Node) -> bool:
    """Whether a tensor of the host, or what is made of it, is brought to a device."""
    seen, waiting = {node}, [node]
    while waiting:
        value = waiting.pop()
        made = value.meta.get("val")
        if isinstance(made, torch.Tensor) and made.device.type != "cpu":
            return value is not node
        waiting += [user for user in value.users if user not in seen]
        seen.update(value.users)
    return False


def _host_table(module: GraphModule, node: Node) -> torch.Tensor | None:
    """A tensor of the step's own that lives on the host and is uploaded by ``node``; its content is taken as it is now."""
    source, device = node.args[0], node.kwargs.get("device")
    while isinstance(source, Node) and source.target in _SAME:
        source = source.args[0]
    if not isinstance(source, Node) or source.op != "get_attr" or node.target is not aten._to_copy.default or device is None:
        return None
    value = getattr(module, str(source.target), None)
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or torch.device(str(device)).type == "cpu":
        return None
    same = [n for n in module.graph.nodes if n.op == "get_attr" and n.target == source.target]
    return None if any(map(_is_written, same)) else value


def _is_written(node: Node) -> bool:
    """Whether a user of ``node``, or of a view of it, writes to it."""
    return any(node in written(user) or (parent_of(user) is node and _is_written(user)) for user in node.users)
