"""Which dimension is the batch, and which bucket a call goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphs.contract.arguments import Call
from graphs.contract.buckets import Shape, batch_size, bucket_for, inferred_batch_dims, is_contiguous, resized
from graphs.errors import AboveLargestBucket, ConfigError

Tensor = torch.Tensor
Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Plan:
    """Where one call goes.

    Attributes:
        key: what its recording is stored under.
        rows: bucket, or None for exact sizes.
        real: rows of the call (1 at exact sizes, where nothing is cut).
        dims: batch dimension of each tensor leaf.
    """

    key: tuple[Any, ...]
    rows: int | None
    real: int
    dims: Dims


def grown(tensors: Sequence[Tensor], dims: Dims, rows: int) -> list[Tensor]:
    """The tensors with ``rows`` rows: cut, or with the last row repeated. What was one object still is."""
    resized: dict[int, Tensor] = {}
    for tensor, dim in zip(tensors, dims, strict=True):
        if id(tensor) in resized:
            continue
        sized = tensor
        if dim is not None and tensor.shape[dim] >= rows:
            cut = tensor.narrow(dim, 0, rows)
            sized = cut.contiguous() if tensor.is_contiguous() else cut
        elif dim is not None:
            last = tensor.narrow(dim, tensor.shape[dim] - 1, 1)
            sized = torch.cat([tensor, *[last] * (rows - tensor.shape[dim])], dim)
        resized[id(tensor)] = sized
    return [resized[id(tensor)] for tensor in tensors]


def structure_of(call: Call) -> tuple[Any, ...]:
    """The signature of a call without the sizes of its tensors; of their layout, whether it is contiguous."""
    return split_sizes(call.signature)[0]


def split_sizes(signature: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Shape]]:
    """A signature without the sizes of its tensors, and their shapes."""
    structure: list[Any] = []
    shapes: list[Shape] = []
    position = 0
    while position < len(signature):
        item = signature[position]
        structure.append(item)
        position += 1
        if isinstance(item, type) and issubclass(item, Tensor):
            shape, strides, dtype, device, traits = signature[position : position + 5]
            structure += [len(shape), is_contiguous(shape, strides), dtype, device, traits]
            shapes.append(tuple(shape))
            position += 5
    return tuple(structure), shapes


class BatchRule:
    """Batch dimensions per structure: declared, or inferred once two calls prove them, and withdrawn if padding fails."""

    def __init__(self) -> None:
        self._first: dict[tuple[Any, ...], list[Shape]] = {}
        self._inferred: dict[tuple[Any, ...], Dims] = {}
        self._rejected: set[tuple[tuple[Any, ...], Dims]] = set()

    def plan(
        self,
        call: Call,
        names: Sequence[str],
        buckets: Sequence[int] | None,
        declared: Mapping[str, int] | None,
        *,
        clamp: bool = False,
    ) -> Plan:
        """Where ``call`` goes. With ``clamp``, a batch above the largest bucket goes to the largest.

        Raises:
            AboveLargestBucket: the batch fits no bucket.
            ConfigError: declared batch dimensions do not exist or differ in size.
        """
        if buckets is None:
            return self._exact(call)
        structure, shapes = structure_of(call), [tuple(tensor.shape) for tensor in call.tensors]
        dims = _declared(names, shapes, declared) if declared is not None else self._infer(structure, shapes)
        real = batch_size(shapes, dims) if dims is not None else None
        if dims is None or not real or (structure, dims) in self._rejected:
            return self._exact(call)
        rows = bucket_for(real, buckets)
        if rows is None:
            if not clamp:
                detail = f"the batch has {real} rows, the largest bucket {max(buckets)}"
                raise AboveLargestBucket(detail, operator="batch")
            rows = max(buckets)
        key = (structure, dims, rows, *(resized(shape, dim, rows) for shape, dim in zip(shapes, dims, strict=True)))
        return Plan(key, rows, real, dims)

    def reject(self, plan: Plan, call: Call, *, for_good: bool) -> Plan:
        """The plan at exact sizes, after padding failed; ``for_good`` remembers it for every size."""
        if for_good:
            structure = structure_of(call)
            self._rejected.add((structure, plan.dims))
            self._inferred.pop(structure, None)
        return self._exact(call)

    def _exact(self, call: Call) -> Plan:
        return Plan(call.signature, None, 1, (None,) * len(call.tensors))

    def _infer(self, structure: tuple[Any, ...], shapes: list[Shape]) -> Dims | None:
        if structure not in self._inferred:
            first = self._first.setdefault(structure, shapes)
            dims = inferred_batch_dims(first, shapes)
            if dims is not None:
                self._inferred[structure] = dims
        return self._inferred.get(structure)


def declared_dims(call: Call, names: Sequence[str], declared: Mapping[str, int]) -> Dims:
    """The batch dimension of each tensor leaf as declared.

    Raises:
        ConfigError: one does not exist, or they differ in size.
    """
    return _declared(names, [tuple(tensor.shape) for tensor in call.tensors], declared)


def _declared(names: Sequence[str], shapes: Sequence[Shape], declared: Mapping[str, int]) -> Dims:
    dims = tuple(declared.get(name) for name in names)
    sizes = {}
    for name, shape, dim in zip(names, shapes, dims, strict=True):
        if dim is None:
            continue
        if not 0 <= dim < len(shape):
            raise ConfigError(f"batch_dims[{name!r}]", dim, f"a dimension of the argument, 0 to {len(shape) - 1}")
        sizes[name] = shape[dim]
    if len(set(sizes.values())) > 1:
        raise ConfigError("batch_dims", dict(declared), f"dimensions of one size, but this call has {sizes}")
    return dims
