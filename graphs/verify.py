"""Comparing a replay with eager, and proving that padding does not reach the real rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphs.contract.padding import Padding
from graphs.contract.slots import Contract

Tensor = torch.Tensor
_RELATIVE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_FP8 = 0.13  # one step of a format with three mantissa bits


def tolerance(dtype: torch.dtype) -> float:
    """Largest accepted deviation for ``dtype``, relative to the largest magnitude of the expected tensor.

    Wide enough for another summation order (a compiled kernel, a GEMM at a padded size), far below the effect of a
    frozen value or a wrong row. Integers and booleans must agree exactly.
    """
    if not dtype.is_floating_point and not dtype.is_complex:
        return 0.0
    return _RELATIVE.get(dtype, 1e-4 if dtype.is_complex else _FP8)


def _deviation(expected: Tensor, actual: Tensor) -> tuple[Tensor, float]:
    """Absolute deviation per element (infinite where only one side is finite) and the largest one accepted."""
    limit = tolerance(expected.dtype)
    if limit == 0.0:
        return (expected != actual).double(), 0.0
    a = expected.to(torch.complex128) if expected.dtype.is_complex else expected.double()
    b = actual.to(a.dtype)
    finite_a, finite_b = torch.isfinite(a), torch.isfinite(b)
    both = finite_a & finite_b
    error = torch.where(both, (a - b).abs(), torch.where(finite_a == finite_b, 0.0, float("inf")))
    scale = float(torch.where(finite_a, a.abs(), 0.0).max()) if a.numel() else 0.0
    return error, limit * scale


def difference(expected: Tensor, actual: Tensor) -> str:
    """How ``actual`` deviates from ``expected`` beyond tolerance, or an empty string.

    Non-finite values must stand in the same places.
    """
    if expected.shape != actual.shape:
        return f"has shape {tuple(actual.shape)}, eager gave {tuple(expected.shape)}"
    if expected.dtype != actual.dtype:
        return f"has dtype {actual.dtype}, eager gave {expected.dtype}"
    error, limit = _deviation(expected, actual)
    wrong = int((error > limit).sum())
    if not wrong:
        return ""
    return f"differs from eager in {wrong} of {error.numel()} elements, by up to {float(error.max()):.3g} (limit {limit:.3g})"


def first_difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[int, str] | None:
    """Position and description of the first tensor that deviates."""
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        text = difference(a.to(b.device), b)
        if text:
            return index, text
    return None


def bitwise_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors hold the same bits, NaN payloads included."""
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)


def poisoned(contract: Contract, tensors: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """The tensor leaves at the recorded size with rows beyond the real ones poisoned, and whether anything was.

    Floating-point rows become NaN. Integer rows cannot take any value (an index out of range kills the context), so
    every positive element is lowered by one, which is legal wherever the element was. A slot with a sentinel or a kept
    pad is left as it will be in production.
    """
    result = list(tensors)
    changed = False
    for slot in contract.slots:
        tensor = tensors[slot.index]
        if slot.batch_dim is None:
            continue
        filled = slot.fill(slot.allocate(), tensor)
        real = tensor.shape[slot.batch_dim]
        rest = filled.narrow(slot.batch_dim, real, slot.rows - real)
        if rest.numel() and slot.padding.kind in ("repeat", "zero"):
            before = rest.clone()
            _poison(rest, slot.padding)
            changed = changed or not bitwise_equal([before], [rest])
        result[slot.index] = filled
    return result, changed


def _poison(rest: Tensor, policy: Padding) -> None:
    if rest.dtype.is_floating_point or rest.dtype.is_complex:
        rest.fill_(float("nan"))
    elif rest.dtype is not torch.bool and policy.kind == "repeat":
        rest.sub_((rest > 0).to(rest.dtype))


def state_difference(expected: Sequence[Tensor], actual: Sequence[Tensor], sentinels: Sequence[int]) -> tuple[int, str] | None:
    """Like `first_difference` for the tensors a step writes, where padded rows may write to the rows ``sentinels``.

    A declared sentinel is a row that no sequence owns, so what differs may lie in that row of one dimension.
    """
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        text = difference(a.to(b.device), b)
        if text and not any(_only_in_row(a.to(b.device), b, row) for row in sentinels):
            return index, text
    return None


def _only_in_row(expected: Tensor, actual: Tensor, row: int) -> bool:
    error, limit = _deviation(expected, actual)
    for dim, size in enumerate(error.shape):
        if -size <= row < size:
            rest = error.clone()
            rest.select(dim, row).zero_()
            if not bool((rest > limit).any()):
                return True
    return False
