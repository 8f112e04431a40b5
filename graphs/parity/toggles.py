"""Changing one value that a step may read, on both twins, and putting it back."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from graphs.parity.walk import PLAIN, Cell, Reached, is_users

Tensor = torch.Tensor
Undo = Callable[[], object]
KINDS = (
    *("attributes", "entries of lists and dicts", "hooks", "methods", "parameters and buffers", "training flag"),
    *("defaults", "globals and closures"),
)


@dataclass(frozen=True)
class Toggle:
    """A change: ``name`` says what it does, ``apply`` makes it and returns what puts it back."""

    name: str
    apply: Callable[[], Undo]
    target: int
    """Identity of what is changed: twins may share a class or a global, which is changed once."""


def toggles(found: Reached, kind: str) -> list[Toggle]:
    """The changes of one of `KINDS`, in the same order for both twins."""
    makers: dict[str, Callable[[Reached], Iterator[Toggle]]] = {
        KINDS[0]: lambda reached: _values(reached, "attribute"),
        KINDS[1]: _containers,
        KINDS[2]: _hooks,
        KINDS[3]: _methods,
        KINDS[4]: _tensors,
        KINDS[5]: _training,
        KINDS[6]: _defaults,
        KINDS[7]: lambda reached: _values(reached, "global"),
    }
    return list(makers[kind](found))


def other_value(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if type(value) is int:
        return value + 1
    if type(value) is float:
        return value * 1.5 + 0.25
    return value + "_" if type(value) is str else value


def _changeable(value: Any) -> bool:
    return type(value) in PLAIN


def _values(found: Reached, kind: str) -> Iterator[Toggle]:
    for cell in found.cells:
        if cell.kind == kind and _changeable(cell.value) and not cell.path.endswith(".training"):
            yield _replacement(cell, cell.value, other_value(cell.value))


def _replacement(cell: Cell, before: Any, after: Any) -> Toggle:
    def apply() -> Undo:
        cell.set(after)
        return lambda: cell.set(before)

    return Toggle(f"{cell.path} = {after!r}", apply, hash((id(cell.container), cell.path)))


def _containers(found: Reached) -> Iterator[Toggle]:
    for cell in found.cells:
        if cell.kind == "item" and _changeable(cell.value):
            yield _replacement(cell, cell.value, other_value(cell.value))
    for path, container in found.containers:
        if type(container) is list and container and all(map(_changeable, container)):
            yield Toggle(f"{path}.append({container[-1]!r})", partial(_appended, container), id(container))
        elif type(container) is dict and "parity" not in container and all(type(key) is str for key in container):
            yield Toggle(f"{path}['parity'] = 1", partial(_added, container), id(container))


def _appended(held: list[Any]) -> Undo:
    held.append(held[-1])
    return lambda: held.__delitem__(-1)


def _added(held: dict[str, Any]) -> Undo:
    held["parity"] = 1
    return lambda: held.__delitem__("parity")


def _scaled(value: Any) -> Any:
    """``value`` with its floating-point tensors half as large again."""
    return _pytree.tree_map(lambda leaf: leaf * 1.5 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, value)


def _hooks(found: Reached) -> Iterator[Toggle]:
    for path, module in found.modules:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        yield Toggle(
            f"{path}.register_forward_hook(...)",
            partial(_hooked, module),
            id(module),
        )
        yield Toggle(
            f"{path}.register_forward_pre_hook(...)",
            partial(_hooked_before, module),
            id(module),
        )


def _hooked(module: nn.Module) -> Undo:
    return module.register_forward_hook(lambda _, inputs, output: _scaled(output)).remove


def _hooked_before(module: nn.Module) -> Undo:
    return module.register_forward_pre_hook(lambda _, inputs: _scaled(inputs)).remove


def _methods(found: Reached) -> Iterator[Toggle]:
    kinds: dict[type, None] = {}
    for path, module in found.modules:
        if "forward" not in vars(module) and isinstance(type(module).forward, types.FunctionType):
            yield Toggle(f"{path}.forward = another", partial(_on_object, module), id(module))
            kinds.setdefault(type(module))
    for kind in kinds:
        if "forward" in vars(kind):
            yield Toggle(f"{kind.__name__}.forward = another", partial(_on_class, kind), id(kind))


def _on_object(module: nn.Module) -> Undo:
    forward = type(module).forward
    vars(module)["forward"] = lambda *args, **kwargs: _scaled(forward(module, *args, **kwargs))
    return lambda: vars(module).pop("forward", None)


def _on_class(kind: type[nn.Module]) -> Undo:
    forward = vars(kind)["forward"]

    def another(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _scaled(forward(self, *args, **kwargs))

    type.__setattr__(kind, "forward", another)
    return lambda: type.__setattr__(kind, "forward", forward)


def _tensors(found: Reached) -> Iterator[Toggle]:
    for cell in found.cells:
        value = cell.value
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            continue
        yield Toggle(f"{cell.path}.data = ...", partial(_data, value), id(value))
        yield Toggle(f"{cell.path}.mul_(1.5).add_(0.25)", partial(_in_place, value), id(value))
        if cell.kind != "global":
            yield Toggle(f"{cell.path} = a new tensor", partial(_assigned, cell), id(value))


def _data(tensor: Tensor) -> Undo:
    before = tensor.data
    tensor.data = before * 1.5 + 0.25

    def undo() -> None:
        tensor.data = before

    return undo


def _in_place(tensor: Tensor) -> Undo:
    with torch.no_grad():
        before = tensor.detach().clone()
        tensor.detach().mul_(1.5).add_(0.25)

    def undo() -> None:
        with torch.no_grad():
            tensor.detach().copy_(before)

    return undo


def _assigned(cell: Cell) -> Undo:
    before = cell.value
    after = before.detach() * 1.5 + 0.25
    cell.set(nn.Parameter(after, before.requires_grad) if isinstance(before, nn.Parameter) else after)
    return lambda: cell.set(before)


def _training(found: Reached) -> Iterator[Toggle]:
    for path, module in found.modules:
        cell = Cell(f"{path}.training", "attribute", vars(module), "training")
        yield _replacement(cell, module.training, not module.training)


def _defaults(found: Reached) -> Iterator[Toggle]:
    for path, function in found.functions:
        for index, value in enumerate(function.__defaults__ or ()):
            if _changeable(value) and is_users(function):
                name = f"default {index} of {function.__name__} = {other_value(value)!r}"
                yield Toggle(name, partial(_default, function, index), hash((id(function), index)))
        named = function.__kwdefaults__ or {}
        for key in named:
            if _changeable(named[key]):
                yield _replacement(Cell(f"{path}'s default {key}", "global", named, key), named[key], other_value(named[key]))


def _default(function: types.FunctionType, index: int) -> Undo:
    before = function.__defaults__ or ()
    function.__defaults__ = (*before[:index], other_value(before[index]), *before[index + 1 :])

    def undo() -> None:
        function.__defaults__ = before

    return undo
