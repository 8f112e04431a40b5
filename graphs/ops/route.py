"""`route`: the grouped projections of a model, whatever they are spelled as, on the ``wo_a`` operators."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import passes
from graphs.errors import ConfigError
from graphs.ops.wo_a.routes import WoARoutes, wo_a_routes

if TYPE_CHECKING:
    from graphs.environment import WoAPath


@dataclass(frozen=True)
class RoutedModule:
    """A module whose forward pass was rewritten.

    Attributes:
        name: in the model; empty for the model itself.
        changes: each projection before and after, as printed nodes.
        bytes_before, bytes_after: of the parameters and buffers that the module holds.
    """

    name: str
    changes: tuple[tuple[str, str], ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Routed:
    """What `route` returns.

    Attributes:
        model: the model to use from now on: the one given, or its routed form if the model itself was the module.
        modules: what was rewritten.
        skipped: modules with weights that could not be looked into, and why.
    """

    model: nn.Module
    modules: tuple[RoutedModule, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = []
        for one in self.modules:
            held = f"{one.bytes_before} -> {one.bytes_after} bytes"
            lines.append(f"{one.name or 'the model itself'}: {len(one.changes)} projection(s) routed, {held}")
        lines += [f"{name or 'the model itself'}: not looked into: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines or ["no grouped projection was found"])


def route(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: WoAPath | None = None,
    only: str | Iterable[str] = "*",
) -> Routed:
    """Send the grouped projections of ``model`` to ``torch.ops.graphs.wo_a_*``, with weights prepared once.

    Modules that hold weights and call no module but those of `torch.nn` are traced; one that computes
    ``y[m, g, n] = sum_k o[m, g, k] * w[g, n, k]``, as the ``o_a_proj`` of transformers' DeepSeek-V4 does, is replaced by the
    rewritten graph, and the original weight is freed unless something else holds it. So names in the state dict change: load
    the checkpoint first. For inference only: the operators have no backward pass.

    Args:
        model: is changed in place.
        args, kwargs: one example call, from which the shapes inside the model are learned: it runs once, without gradients,
            and leaves what it leaves (pass a fresh cache). Default: ``model.dummy_inputs``, which models of transformers have.
        path: ``einsum``, ``bmm``, ``gloop``, ``fused`` or ``auto``; None takes ``GRAPHS_WO_A``. ``auto`` quantises nothing.
        only: patterns of weight names, as ``"*.o_a_proj.weight"``; other projections are left alone.

    Raises:
        ConfigError: no such path, or there is no example to learn shapes from.
        WeightError: a weight cannot take ``path`` (its dtype, or N or K is no multiple of 128).
    """
    table = wo_a_routes(path, only=only)
    example = _example(model, args, kwargs)
    candidates = dict(_candidates(model))
    routed, skipped = [], dict[str, str]()
    for name, call in _example_calls(model, candidates, example).items():
        module = candidates.pop(name)
        before = _bytes(module)
        graph = _traced(module, call)
        if isinstance(graph, str):
            skipped[name] = graph
        elif changes := passes.routing(graph, _qualified(table, name), inputs=_inputs(graph, module, call)):
            model = _replaced(model, module, graph)
            routed.append(RoutedModule(name, tuple(changes), before, _bytes(graph)))
    return Routed(model, tuple(routed), skipped)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model's own kind that hold a weight and whose parts, if any, are those of `torch.nn`."""
    for name, module in model.named_modules():
        parts = [_is_plain(part) for part in module.modules()]
        weights = any(parameter.dim() >= 2 for parameter in module.parameters())
        hooked = module._forward_hooks or module._forward_pre_hooks
        if weights and not parts[0] and all(parts[1:]) and not hooked:
            yield name, module


def _is_plain(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _example(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Arguments:
    """The arguments given, else those that the model has for the purpose."""
    if not args and not kwargs:
        kwargs = getattr(model, "dummy_inputs", None)
        if not isinstance(kwargs, Mapping):
            raise ConfigError("args", args, "the arguments of one call: this model has no dummy_inputs to learn shapes from")
    return tuple(args), dict(kwargs or {})


def _traced(module: nn.Module, call: Arguments) -> torch.fx.GraphModule | str:
    """The graph of a call; what was raised, where there is none."""
    try:
        return passes.trace_with_inputs(module, *call)
    except Exception as error:  # whatever the module's own code raises when it meets no real tensors
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _example_calls(model: nn.Module, candidates: Mapping[str, nn.Module], example: Arguments) -> dict[str, Arguments]:
    """What each candidate is called with in one call of the model."""
    if set(candidates) <= {""}:
        return dict.fromkeys(candidates, example)
    calls = dict[str, Arguments]()

    def keep(name: str) -> Any:
        return lambda _, given, named: calls.setdefault(name, (given, named)) and None

    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in candidates.items()]
    try:
        with torch.no_grad():
            model(*example[0], **example[1])
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _inputs(graph: torch.fx.GraphModule, module: nn.Module, call: Arguments) -> list[Any]:
    """The arguments of a call of ``module``, by the placeholders of its graph."""
    bound = inspect.signature(module.forward).bind(*call[0], **call[1]).arguments
    return [bound.get(str(node.target)) for node in graph.graph.find_nodes(op="placeholder")]


def _qualified(table: WoARoutes, module: str) -> passes.Routes:
    """``table`` with names as the model's, not the module's."""
    return lambda weight, name, tokens: table(weight, f"{module}.{name}" if module else name, tokens)


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """``model`` with ``new`` wherever ``old`` was, in the same mode of training."""
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
    return new if model is old else model


def _bytes(module: nn.Module) -> int:
    """Of distinct parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
