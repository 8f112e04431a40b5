"""Recognising a call that is like the one before, which in a decode loop is almost every call.

Flattening a call and hashing its signature takes about 2.8 us for four tensors on the host of an H200; asking torch's own
tensor guards (one C++ call for all tensors) whether this call has the shapes, strides, dtypes, devices and dispatch keys
(which conjugation, negation and autograd are) of the last takes about 0.6. What they do not see is asked beside them: that
no tensor is given twice, and that nothing hangs on one. What is not recognised goes the long way, so all this decides nothing
but speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from graphs.contract.arguments import Call, is_constant, is_leaf, repeats
from graphs.objects.keys import PLAIN
from graphs.objects.raw_access import of_type
from graphs.objects.torch_fast_paths import tensor_guards

Tensor = torch.Tensor
_BY_EQUALITY = (bool, int, str)  # others may be equal and not the same: 0.0 and -0.0
_call = partial(tuple.__new__, Call)  # a third of the time of Call(...)
_attributes_of: Callable[[Tensor], dict[str, Any]] = attrgetter("__dict__")


class FastPath:
    """The last call: its tensor guards, and its other arguments by value or identity."""

    def __init__(
        self, guards: Any, names: tuple[str, ...], leaves: tuple[Any, ...], ambient: tuple[Any, ...], call: Call
    ) -> None:
        self._check = guards.check
        self._guards = guards
        self._names = list(names)
        self._ambient = ambient
        self._count = len(leaves)
        self._signature = call.signature
        tensors = [index for index, leaf in enumerate(leaves) if of_type(leaf, Tensor)]
        self._tensors = None if len(tensors) == len(leaves) else tensors
        self._constants = [(i, type(leaf), leaf) for i, leaf in enumerate(leaves) if is_constant(leaf)]
        self._opaques = [(i, id(leaf)) for i, leaf in enumerate(leaves) if not is_constant(leaf) and not of_type(leaf, Tensor)]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], ambient: tuple[Any, ...], call: Call) -> FastPath | None:
        """The guard of a call, or None for calls that only the long way understands.

        Those are calls with containers, floats, values that something hangs on, or one tensor given twice.
        """
        leaves = (*args, *kwargs.values())
        simple = all(map(is_leaf, leaves)) and repeats(call.tensors) is None
        plain = all(type(tensor) is Tensor and not tensor.requires_grad and not tensor.__dict__ for tensor in call.tensors)
        if tensor_guards is None or not simple or not plain or any(map(_is_mutable_number, leaves)):
            return None
        guards = tensor_guards(*call.tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return cls(guards, tuple(kwargs), leaves, ambient, call)

    def _plain(self, tensors: list[Tensor]) -> bool:
        return len({*map(id, tensors)}) == len(tensors) and not any(map(_attributes_of, tensors))

    def match(self, args: tuple[Any, ...], kwargs: dict[str, Any], ambient: tuple[Any, ...]) -> Call | None:
        """The call, flattened, if it is like the last one."""
        leaves = [*args, *kwargs.values()] if kwargs else [*args]
        if len(leaves) != self._count or ambient != self._ambient or ((kwargs or self._names) and [*kwargs] != self._names):
            return None
        if self._tensors is None:
            return _call((leaves, [], self._signature, args, kwargs)) if self._check(*leaves) and self._plain(leaves) else None
        for index, kind, value in self._constants:
            leaf = leaves[index]
            if leaf is not value and (kind not in _BY_EQUALITY or type(leaf) is not kind or leaf != value):
                return None
        opaques = []
        for index, identity in self._opaques:
            opaque = leaves[index]
            if id(opaque) != identity:
                return None
            opaques.append(opaque)
        tensors = [leaves[index] for index in self._tensors]
        return (
            _call((tensors, opaques, self._signature, args, kwargs)) if self._check(*tensors) and self._plain(tensors) else None
        )


def _is_mutable_number(leaf: Any) -> bool:
    """Whether a constant is compared by more than its identity: a float, or a subclass of a number or text."""
    kind = type(leaf)
    return kind is float or (kind not in PLAIN and issubclass(kind, (int, float, complex, str, bytes)))
