"""A call of a model traced by ``torch.export``: tensors in, tensors out, nothing that it writes is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from passes.core.schema import written_values
from passes.errors import LoweringError, OptionError
from passes.mlir.sites import SourceLines, blame

EXPORT = "torch.export.export(model, args, kwargs, strict=False).run_decompositions()"
Made = TypeVar("Made")


@dataclass(frozen=True)
class Call:
    """The arguments a step was lowered for.

    Attributes:
        structure: of ``(args, kwargs)``.
        leaves: with ``None`` in place of tensors. What is no tensor is part of the program.
        names: of the leaves.
    """

    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Call, list[Any]]:
        """The description of a call, and its leaves."""
        paths, structure = pytree.tree_flatten_with_path((args, dict(sorted(kwargs.items()))))
        names = tuple(_name(path) for path, _ in paths)
        leaves = [leaf for _, leaf in paths]
        return cls(structure, tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves), names), leaves

    def match(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of another call.

        Raises:
            OptionError: it has another structure, or other values where those of this one are no tensors.
        """
        other, leaves = Call.of(args, kwargs)
        if other.structure != self.structure:
            raise OptionError("structure of the arguments", other.structure, f"the one that was lowered, {self.structure}")
        for name, mine, theirs, leaf in zip(self.names, self.leaves, other.leaves, leaves, strict=True):
            if mine is not theirs and (type(mine) is not type(theirs) or mine != theirs):
                raise OptionError(name, leaf, f"{mine!r}, for which the step was lowered")
        return leaves


def _name(path: pytree.KeyPath) -> str:
    return ("args" if path[0] == pytree.SequenceKey(0) else "kwargs") + pytree.keystr(path[1:])


@dataclass
class _Result:
    """What the model returned while it was traced: the structure, and the leaves with ``None`` in place of tensors."""

    structure: pytree.TreeSpec | None = None
    leaves: tuple[Any, ...] = ()
    tensors: tuple[bool, ...] = ()


class Step(nn.Module):
    """A model that takes tensors and returns tensors, which is all that the lowered function can do."""

    def __init__(self, model: Callable[..., Any], call: Call, tensors: list[int]) -> None:
        super().__init__()
        self.model, self.call, self.tensors, self.result = model, call, tensors, _Result()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors among the leaves of the model's result."""
        given = list(self.call.leaves)
        for position, tensor in zip(self.tensors, tensors, strict=True):
            given[position] = tensor
        args, kwargs = pytree.tree_unflatten(given, self.call.structure)
        leaves, self.result.structure = pytree.tree_flatten(self.model(*args, **kwargs))
        self.result.tensors = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        self.result.leaves = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


class UndoWrites(TorchDispatchMode):
    """While entered, remembers what operators on real tensors write; afterwards `undo` writes it back.

    Export runs operators whose tensors are all closed over, such as ``counter.add_(1)``, for real.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                self._before += [(tensor, tensor.clone()) for tensor in _written(func, args, kwargs)]
        return func(*args, **kwargs)

    def undo(self) -> None:
        """Restore what was written, the last write first."""
        while self._before:
            tensor, value = self._before.pop()
            tensor.copy_(value)


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call of ``func`` writes."""
    return [leaf for leaf in pytree.tree_leaves(written_values(func, args, kwargs)) if isinstance(leaf, Tensor)]


def trace(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[ExportedProgram, Step]:
    """Export ``model(*args, **kwargs)`` as a step of tensors.

    Raises:
        OptionError: ``model`` is nothing that can be traced.
        LoweringError: it cannot be traced.
    """
    call, leaves = Call.of(args, kwargs)
    tensors = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    step = Step(_callable(model), call, tensors)
    inputs = tuple(leaves[position] for position in tensors)
    writes = UndoWrites()
    with torch.no_grad():
        try:
            with writes, preserve_node_meta(), SourceLines():
                exported = staged("export", lambda: torch.export.export(step, inputs, strict=False))
        finally:
            writes.undo()
    _allow_writes(exported)
    return exported, step


def _callable(model: Any) -> Callable[..., Any]:
    if isinstance(model, ExportedProgram):
        return model.module()
    if not callable(model):
        raise OptionError("model", model, "an nn.Module, a function, a torch.fx.GraphModule or a torch.export.ExportedProgram")
    stands_for = getattr(type(model), "__graphs_walk__", None)  # a captured step says which model it records
    return stands_for(model) if stands_for else model


def _allow_writes(exported: ExportedProgram) -> None:
    """Declare tensors that the model has elsewhere than in its buffers (a cache object, a closure) as buffers."""
    specs = exported.graph_signature.input_specs
    for position, spec in enumerate(specs):
        if spec.kind is InputKind.CONSTANT_TENSOR:
            specs[position] = InputSpec(InputKind.BUFFER, spec.arg, spec.target, persistent=False)


def staged(stage: str, work: Callable[[], Made]) -> Made:
    """What ``work`` makes. What it raises is raised as a LoweringError, with the operator and the line it was at."""
    try:
        return work()
    except LoweringError:
        raise
    except Exception as error:
        operator, site = blame(error)
        detail = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LoweringError(
            stage,
            f"{type(error).__name__}: {detail}",
            operator=operator,
            site=site,
            reproduce=EXPORT,
            remedy="see that the call runs eagerly; keep values that depend on data in tensors (torch.where, indexing with "
            "tensors) and state that is written in buffers or arguments, so that torch.export can trace the step",
        ) from error
