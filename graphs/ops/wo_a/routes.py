"""The routing table of the grouped output projection: which ``wo_a`` operator computes a projection, and with what weight."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

from graphs.errors import ConfigError, WeightError
from graphs.ops.wo_a.module import BUFFERS, LEGAL_PATHS, GroupedProjection

if TYPE_CHECKING:
    from graphs.environment import WoAPath


class WoATarget(NamedTuple):
    """``operator(o, *tensors, *constants)``."""

    operator: OpOverload
    tensors: tuple[Tensor, ...]
    constants: tuple[Any, ...] = ()


class WoARoutes:
    """Made by :func:`wo_a_routes`; a ``passes.Routes``."""

    def __init__(self, path: WoAPath, only: tuple[str, ...]) -> None:
        self.path, self.only = path, only
        self._prepared: dict[Any, tuple[str, tuple[weakref.ref[Tensor], ...]]] = {}

    def __call__(self, weight: Tensor, name: str, tokens: int | None) -> WoATarget | None:
        """The operator for ``weight [G, N, K]``, with its prepared tensors.

        The same memory is prepared once, as long as somebody holds the result and nobody has written to the weight.

        Raises:
            WeightError: the weight cannot take the path that was asked for by name.
        """
        if not any(fnmatchcase(name, pattern) for pattern in self.only):
            return None
        key = _memory(weight)
        path, references = self._prepared.get(key, ("", ()))
        tensors = [tensor for tensor in (reference() for reference in references) if tensor is not None]
        if not path or len(tensors) < len(references):
            path, tensors = self._prepare(weight, name, tokens)
            self._prepared[key] = path, tuple(weakref.ref(tensor) for tensor in tensors)
        operator = getattr(torch.ops.graphs, "wo_a_" + path).default
        return WoATarget(operator, tuple(tensors), (True,) if path == "fused" else ())  # overlap: the weight is constant

    def _prepare(self, weight: Tensor, name: str, tokens: int | None) -> tuple[str, list[Tensor]]:
        if weight.dtype != torch.bfloat16:
            if self.path not in ("auto", "einsum"):
                raise WeightError(
                    f"{name} is {weight.dtype}; path {self.path!r} takes bfloat16 weights and activations: convert the model "
                    "with model.bfloat16(), or use path 'einsum'"
                )
            return "einsum", [weight.contiguous()]
        projection = GroupedProjection(weight, path=self.path)
        path = projection.paths[-1] if tokens is None else projection.choice(tokens)
        return path, [getattr(projection, buffer) for buffer in BUFFERS[path] if buffer]


def wo_a_routes(path: WoAPath | None = None, *, only: str | Iterable[str] = "*") -> WoARoutes:
    """A routing table for ``passes.routing`` that sends grouped projections to ``torch.ops.graphs.wo_a_*``.

    Args:
        path: as for :class:`GroupedProjection`. ``auto`` quantises nothing, so a bfloat16 weight goes to ``einsum``; any other
            path quantises every weight that is routed.
        only: patterns of parameter names (``"*.o_a_proj.weight"``); other projections are left alone. An attention that keeps
            keys and values compressed, or a dense mixture of experts, holds grouped projections too.

    Raises:
        ConfigError: no such path.
    """
    if path is None:
        from graphs.environment import wo_a_path

        path = wo_a_path()
    if path not in LEGAL_PATHS:
        raise ConfigError("path", path, LEGAL_PATHS)
    return WoARoutes(path, (only,) if isinstance(only, str) else tuple(only))


def _memory(weight: Tensor) -> tuple[Any, ...]:
    """What two views of the same memory with the same contents have in common, without keeping the memory alive."""
    version = 0 if weight.is_inference() else weight._version
    return (
        StorageWeakRef(weight.untyped_storage()),
        weight.storage_offset(),
        weight.shape,
        weight.stride(),
        weight.dtype,
        version,
    )
