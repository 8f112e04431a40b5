"""Batch buckets: pure functions of sizes and shapes."""

from __future__ import annotations

from collections.abc import Sequence

Shape = tuple[int, ...]


def bucket_for(batch: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds ``batch`` rows, or None when every bucket is smaller. ``buckets`` ascend."""
    return next((size for size in buckets if size >= batch), None)


def inferred_batch_dims(first: Sequence[Shape], second: Sequence[Shape]) -> tuple[int | None, ...] | None:
    """The batch dimension of each tensor, proved by two calls, or None when they prove nothing.

    Two calls prove it when every dimension that differs goes from one and the same size to one and the same other
    size, and no tensor has two such dimensions. A tensor that did not change has no batch dimension.
    """
    if len(first) != len(second) or any(len(a) != len(b) for a, b in zip(first, second, strict=True)):
        return None
    dims: list[int | None] = []
    sizes: set[tuple[int, int]] = set()
    for a, b in zip(first, second, strict=True):
        changed = [d for d, (m, n) in enumerate(zip(a, b, strict=True)) if m != n]
        if len(changed) > 1:
            return None
        dims.append(changed[0] if changed else None)
        sizes.update((a[d], b[d]) for d in changed)
    return tuple(dims) if len(sizes) == 1 else None


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of this layout lies in memory row after row, as `torch.Tensor.is_contiguous` says."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def batch_size(shapes: Sequence[Shape], dims: Sequence[int | None]) -> int | None:
    """The common size of the batch dimensions, or None when the tensors disagree or have none."""
    sizes = {shape[dim] for shape, dim in zip(shapes, dims, strict=True) if dim is not None and dim < len(shape)}
    return sizes.pop() if len(sizes) == 1 else None


def resized(shape: Shape, dim: int | None, rows: int) -> Shape:
    """``shape`` with ``rows`` rows along ``dim``."""
    return shape if dim is None else (*shape[:dim], rows, *shape[dim + 1 :])
