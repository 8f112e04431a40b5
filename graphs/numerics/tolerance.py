"""Comparing a replay with eager, and proving that padding does not reach the real rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from graphs.contract.slots import Contract
from graphs.state.regions import Region
from graphs.state.tensor_state import Left

Tensor = torch.Tensor
_RELATIVE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_FP8 = 0.13  # one step of a format with three mantissa bits
OTHER_KERNELS = 8.0
"""Factor on the tolerance where kernels of a compiler stand against eager ones: they round in other places, and the
deviations of many layers add up. Measured against the values, that is 0.16 in bfloat16; a wrong row is at 1."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest accepted relative deviation for ``dtype``.

    Wide enough for another summation order (a compiled kernel, a GEMM at a padded size), far below the effect of a
    frozen value or a wrong row. Integers and booleans must agree exactly.
    """
    if not dtype.is_floating_point and not dtype.is_complex:
        return 0.0
    return _RELATIVE.get(dtype, 1e-4 if dtype.is_complex else _FP8)


def _deviation(expected: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute deviation per element, infinite between different kinds of non-finite values, and what is accepted.

    Accepted is the tolerance relative to the element, or to the typical magnitude where that is larger: an element near
    zero carries the rounding of its neighbours. Typical is the mean of the non-zero magnitudes, of which none counts for
    more than ten medians, so that the fill value of a mask does not widen it.
    """
    limit = tolerance(expected.dtype)
    if limit == 0.0:
        wrong = (expected != actual).double()
        return wrong, torch.zeros_like(wrong)
    a = torch.view_as_real(expected).double() if expected.dtype.is_complex else expected.double()
    b = torch.view_as_real(actual).double() if expected.dtype.is_complex else actual.double()
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    finite = torch.isfinite(a) & torch.isfinite(b)
    error = torch.where(same, 0.0, torch.where(finite, (a - b).abs(), float("inf")))
    magnitude = torch.where(torch.isfinite(a), a.abs(), 0.0)
    sizes = magnitude[magnitude > 0]
    typical = torch.minimum(sizes, 10 * sizes.median()).mean() if sizes.numel() else torch.zeros((), device=a.device)
    return error, limit * torch.maximum(magnitude, typical.double())


def difference(expected: Tensor, actual: Tensor, tolerance_factor: float = 1.0) -> str:
    """How ``actual`` deviates from ``expected`` beyond ``tolerance_factor`` times the tolerance, or an empty string.

    Non-finite values must stand in the same places.
    """
    if expected.shape != actual.shape:
        return f"has shape {tuple(actual.shape)}, eager gave {tuple(expected.shape)}"
    if expected.device != actual.device:
        return f"is on {actual.device}, eager gave {expected.device}"
    if expected.dtype != actual.dtype:
        return f"has dtype {actual.dtype}, eager gave {expected.dtype}"
    error, limit = _deviation(expected, actual)
    wrong = error > limit * tolerance_factor
    count = int(wrong.sum())
    if not count:
        return ""
    return f"differs from eager in {count} of {error.numel()} elements, by up to {float(error[wrong].max()):.3g}"


def first_difference(
    expected: Sequence[Tensor], actual: Sequence[Tensor], tolerance_factor: float = 1.0
) -> tuple[int, str] | None:
    """Position and description of the first tensor that deviates."""
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        text = difference(a, b, tolerance_factor)
        if text:
            return index, text
    return None


def bitwise_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors hold the same bits, NaN payloads included."""
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True))


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)


def poisons(contract: Contract, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensor leaves at the recorded size with rows beyond the real ones poisoned, once with each poison.

    Floating-point rows become NaN (which no sum hides), then large and negative (which comparisons see); with each,
    booleans are flipped, and positive integers lowered by one: an index out of range would kill the context, so they
    cannot take any value. Last, the padding is real rows again, the first ones first, in every slot alike. A slot with
    a sentinel or a kept pad is left as it will be in production. Poisons that change nothing are left out.
    """
    plain = padded(contract, tensors)
    fills: list[Callable[[Tensor], object]] = [
        lambda rest: _fill(rest, float("nan")),
        lambda rest: _fill(rest, 1e3),
        lambda rest: _fill(rest, -1e3),
    ]
    made = [_poisoned(contract, tensors, fill) for fill in fills] + [_rolled(contract, tensors)]
    return [leaves for leaves in made if not bitwise_equal(plain, leaves)]


def padded(contract: Contract, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensor leaves at the recorded size, with the padding that a replay gives them."""
    return contract.arrange(contract.filled(tensors), tensors)


def _poisonable(contract: Contract) -> list[tuple[int, int]]:
    """Position and batch dimension of the slots whose padding may be anything."""
    return [(s.index, s.batch_dim) for s in contract.slots if s.batch_dim is not None and s.padding.kind in ("repeat", "zero")]


def _poisoned(contract: Contract, tensors: Sequence[Tensor], fill: Callable[[Tensor], object]) -> list[Tensor]:
    leaves = padded(contract, tensors)
    for index, dim in _poisonable(contract):
        real = tensors[index].shape[dim]
        fill(leaves[index].narrow(dim, real, leaves[index].shape[dim] - real))
    return leaves


def _fill(rest: Tensor, value: float) -> None:
    if rest.dtype.is_floating_point or rest.dtype.is_complex:
        rest.fill_(value)
    elif rest.dtype is torch.bool:
        rest.logical_not_()
    else:
        rest.sub_((rest > 0).to(rest.dtype))


def _rolled(contract: Contract, tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = padded(contract, tensors)
    for index, dim in _poisonable(contract):
        real, rows = tensors[index].shape[dim], leaves[index].shape[dim]
        order = torch.arange(rows - real, device=leaves[index].device) % real
        leaves[index].narrow(dim, real, rows - real).copy_(tensors[index].index_select(dim, order))
    return leaves


def state_difference(
    expected: Sequence[Tensor], left: Left, sentinels: Sequence[int], tolerance_factor: float = 1.0
) -> tuple[int, str] | None:
    """Like `first_difference` for what a step writes, where padded rows may write to the rows ``sentinels``.

    A declared sentinel is a row that no sequence owns, so what differs may lie in that row of one dimension. ``left`` may hold
    more than is expected: regions that were found later.
    """
    for index, (a, b, region) in enumerate(zip(expected, left.values, left.regions, strict=False)):
        b = b.to(a.device)  # copies go to host memory where the device has no room
        text = difference(a, b, tolerance_factor)
        if text and not any(_only_in_row(a, b, region, row, tolerance_factor) for row in sentinels):
            return index, text
    return None


def run_difference(
    outputs: Sequence[Tensor],
    produced: Sequence[Tensor],
    state: Sequence[Tensor],
    left: Left,
    sentinels: Sequence[int] = (),
    tolerance_factor: float = 1.0,
) -> tuple[str, str] | None:
    """What deviates first in a run, and how: an output, else a tensor that the step writes.

    Args:
        outputs, state: what they have to be; produced, left: what the run gave and left.
        sentinels: see `state_difference`.
        tolerance_factor: factor on the tolerance; see `OTHER_KERNELS`.
    """
    found = first_difference(outputs, produced, tolerance_factor)
    if found is not None:
        return f"output {found[0]}", found[1]
    found = state_difference(state, left, sentinels, tolerance_factor)
    return (f"state written by the step, tensor {found[0]}", found[1]) if found is not None else None


def _only_in_row(expected: Tensor, actual: Tensor, region: Region, row: int, tolerance_factor: float) -> bool:
    error, limit = _deviation(expected, actual)
    wrong = error > limit * tolerance_factor
    return any(not bool((wrong & ~mask.to(wrong.device)).any()) for mask in region.in_row(row))
