"""Whether a run that may round in other places than eager is right: by its error beside eager's own.

Both errors are taken against a run of the step in float64 (`graphs.high_precision`). With ``e``, ``c`` and ``r`` the results of
eager, of the candidate and of float64, the expected square of an element's error is ``v``: the mean of ``(e - r)**2`` over its
row, or as much relative to ``r`` as in the whole tensor, whichever is more. In a row where eager is exact (a row of a cache
that the step does not write) it is zero. A group of ``n`` elements is accepted if

    sum((c - r)**2) <= F(n)**2 * sum(v) + sum((ULPS * eps * r)**2),        F(n) = WHOLE + SINGLE / sqrt(n)

and the groups are: the whole tensor, every slice along every dimension, every row, every element. So one wrong row, column or
element of a large tensor is not diluted by the rest.

`WHOLE` and `SINGLE` are measured (``benchmarks/verify_faults.py --calibrate``): over decoders of 4 and 12 layers, dense and
with experts, in three dtypes, with products summed in other orders, split with and without rounding between, attention
unfused, or nothing rounded before the end, right candidates reach at most 2.4 in groups of 16 elements and more, and 5.3 in
single elements. Wrong positions, masks, rows of keys, values and of the last matrix, stale inputs and missed writes reach 18 and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from graphs import verify
from graphs.contract.tensor_state import TensorState
from graphs.high_precision import HighPrecision, Tie, raised

Tensor = torch.Tensor
WHOLE, SINGLE = 2.5, 6.0
"""Accepted error of large groups in units of eager's, and what is added for a single element."""
ULPS = 1.0
"""Accepted in any case, in steps of the dtype: eager may be exact where another order of operations rounds."""
_ROW = 16  # elements that tell the size of errors; shorter rows take in the dimension before
_RUNS = 12  # in float64, at most, to find out which of two nearly equal candidates a choice took


@dataclass(frozen=True)
class Excess:
    """Where a candidate's error is largest in units of what is accepted.

    Attributes:
        ratio: error over the limit: above 1 is refused.
        group: the kind of elements taken together.
        candidate, eager, limit: root mean squares over the group.
        index: the element of the group that deviates most.
    """

    ratio: float
    group: str
    candidate: float
    eager: float
    limit: float
    index: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"against a run in float64, {self.group} is off by {self.candidate:.3g}, eager by {self.eager:.3g}, accepted is "
            f"{self.limit:.3g}; worst at {list(self.index)}"
        )


@dataclass(frozen=True)
class _Precise:
    """One run of eager with float64 beside it: ``(eager, float64)`` of each output and of each tensor written."""

    outputs: list[tuple[Tensor, Tensor]]
    state: list[tuple[Tensor, Tensor]]
    gaps: dict[str, str]
    ties: list[Tie]


def candidate_difference(
    expected: Sequence[Tensor],
    produced: Sequence[Tensor],
    state: Sequence[Tensor],
    written: TensorState,
    again: Callable[[], Sequence[Tensor]],
    *,
    sentinels: Sequence[int] = (),
    slack: float = verify.OTHER_KERNELS,
) -> tuple[str, str] | None:
    """What a candidate's run gets wrong, and how; None where its error is of the size of eager's.

    A run in float64 is only made where the elementwise tolerance is exceeded. It leaves state as an eager run would.

    Args:
        expected, state: outputs and written tensors of eager; produced: outputs of the candidate.
        written: the tensors the step writes, as the candidate left them.
        again: restores the state before the step, runs it eagerly and returns its outputs, all of them.
        sentinels: rows of written tensors in which anything may stand.
        slack: factor on the tolerance where no run in float64 is possible.
    """
    found = verify.run_difference(expected, produced, state, written.tensors, sentinels)
    if found is None:
        return None
    left, produced = written.copies(), [out.clone() for out in produced]
    judge = _Judge(expected, produced, state, left, sentinels)
    precise, why = _precise(again, written, frozenset())
    if precise is not None and precise.gaps:
        operator, reason = next(iter(precise.gaps.items()))
        why = f"{operator} does not run in float64: {reason}"
    elif precise is not None and judge.worst(precise, expected, state) is not None:
        why = "eager does not repeat itself"
    if why or precise is None:
        found = verify.run_difference(expected, produced, state, left, sentinels, slack)
        return (found[0], f"{found[1]}; by tolerance, since {why}") if found is not None else None
    refused = judge.with_ties(precise, again, written)
    return (refused[0], f"{found[1] if found[0] == refused[0] else 'differs from eager'}; {refused[1]}") if refused else None


class _Judge:
    """A candidate's results, to be compared with several runs in float64."""

    def __init__(
        self,
        expected: Sequence[Tensor],
        produced: Sequence[Tensor],
        state: Sequence[Tensor],
        left: Sequence[Tensor],
        sentinels: Sequence[int],
    ) -> None:
        self.expected, self.produced, self.state, self.left, self.sentinels = expected, produced, state, left, sentinels

    def worst(self, precise: _Precise, outputs: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[str, str] | None:
        """The first of these results that is off by more than is accepted, and how."""
        for index, ((eager, exact), out) in enumerate(zip(precise.outputs, outputs, strict=True)):
            text = difference(eager, out, exact)
            if text:
                return f"output {index}", text
        for index, ((eager, exact), tensor) in enumerate(zip(precise.state, state, strict=True)):
            text = difference(eager, tensor, exact)
            if text and not any(not difference(eager, kept, exact) for kept in self._without_sentinels(eager, tensor)):
                return f"state written by the step, tensor {index}", text
        return None

    def _without_sentinels(self, eager: Tensor, tensor: Tensor) -> Iterator[Tensor]:
        """``tensor`` with one row of one dimension as eager has it."""
        for row in self.sentinels:
            for dim, size in enumerate(tensor.shape):
                if -size <= row < size:
                    kept = tensor.to(eager.device, copy=True)
                    kept.select(dim, row).copy_(eager.select(dim, row))
                    yield kept

    def with_ties(
        self, precise: _Precise, again: Callable[[], Sequence[Tensor]], written: TensorState
    ) -> tuple[str, str] | None:
        """Like `worst` for the candidate, where choices between what rounding cannot tell apart may have gone either way.

        A choice of eager's is turned, and the step run with it, as long as that brings the candidate nearer.
        """
        first = refused = self.worst(precise, self.produced, self.left)
        distance, turned, runs = self._distance(precise), frozenset[Tie](), 0
        waiting = list(precise.ties)
        while refused is not None and waiting and runs < _RUNS:
            tie = waiting.pop(0)
            runs += 1
            other, why = _precise(again, written, turned | {tie})
            if other is None or why or other.gaps:
                continue
            nearer = self._distance(other)
            if nearer < distance:
                distance, turned, refused = nearer, turned | {tie}, self.worst(other, self.produced, self.left)
                known = {(tie.choice, tie.row) for tie in turned}
                waiting = [tie for tie in other.ties if (tie.choice, tie.row) not in known]
        return first if refused is not None else None

    def _distance(self, precise: _Precise) -> float:
        """Squared error of the candidate relative to each tensor's size, over all tensors."""
        pairs = zip([*precise.outputs, *precise.state], [*self.produced, *self.left], strict=True)
        return sum(_relative_square(exact, tensor) for (_, exact), tensor in pairs)


def _precise(
    again: Callable[[], Sequence[Tensor]], written: TensorState, turned: frozenset[Tie]
) -> tuple[_Precise | None, str]:
    """Eager once more, with float64 beside it; or why that is not possible."""
    mode = HighPrecision(turned)
    try:
        with torch.compiler.set_stance("force_eager"), mode:
            outputs = list(again())
    except Exception as error:  # an operator that no dispatch mode can see, or one that is not eager's own
        return None, f"the step cannot be run in float64: {type(error).__name__}: {error}"
    made = [(out.clone(), mode.of(out)) for out in outputs]
    state = [(tensor.clone(), mode.of(tensor)) for tensor in written.tensors]
    return _Precise(made, state, mode.gaps, mode.ties), ""


def difference(eager: Tensor, candidate: Tensor, precise: Tensor) -> str:
    """How ``candidate`` deviates from ``precise`` beyond what ``eager`` suggests, or an empty string.

    Whole numbers and booleans, dtypes that nothing is more precise than, and what is not finite are compared with eager.
    """
    candidate = candidate.to(eager.device) if candidate.device.type == "cpu" else candidate
    if eager.shape != candidate.shape or eager.dtype != candidate.dtype or not eager.numel():
        return verify.difference(eager, candidate)
    if eager.dtype == raised(eager.dtype) or eager.element_size() == 1:
        return verify.difference(eager, candidate, verify.OTHER_KERNELS if eager.dtype.is_floating_point else 1.0)
    excess = measure(eager, candidate, precise)
    return str(excess) if not excess.ratio <= 1 else ""


def measure(eager: Tensor, candidate: Tensor, precise: Tensor) -> Excess:
    """The group of elements whose error is largest beside what is accepted."""
    eps = torch.finfo(eager.dtype).eps
    smallest = torch.finfo(eager.dtype).smallest_normal * eps
    e, c, r = _real(eager), _real(candidate), _real(precise)
    kind = _kinds(e) != _kinds(c)
    if bool(kind.any()):
        return Excess(math.inf, "an element that is not finite", math.inf, 0.0, 0.0, _position(kind.double()))
    finite = torch.isfinite(e) & torch.isfinite(r)
    r = torch.where(finite, r, 0.0)
    mine = torch.where(finite, e - r, 0.0).square()
    theirs = torch.where(finite, c - r, 0.0).square()
    usual = _usual(mine, r)
    floor = (ULPS * eps * r.abs() + smallest).square()
    excesses = []
    for name, dims, count in _groups(r.shape):
        factor = (WHOLE + SINGLE / math.sqrt(count)) ** 2
        limit = factor * _sums(usual, dims) + _sums(floor, dims)
        error = _sums(theirs, dims)
        ratio = (error / limit).nan_to_num(0.0)
        where = _position(ratio)
        values = [math.sqrt(float(x[where]) / count) for x in (error, _sums(mine, dims), limit)]
        inside = tuple(slice(None) if dim in dims else where[dim] for dim in range(r.dim()))
        offset = iter(_position(theirs[inside]))
        index = tuple(next(offset) if dim in dims else where[dim] for dim in range(r.dim()))
        excesses.append(Excess(math.sqrt(float(ratio[where])), name, *values, index))
    return max(excesses, key=lambda excess: excess.ratio)


def _usual(mine: Tensor, r: Tensor) -> Tensor:
    """The squared error to be expected of each element, from eager's: see the module."""
    dims, count = list[int](), 1
    for dim in reversed(range(r.dim())):
        if count >= _ROW:
            break
        dims.append(dim)
        count *= r.shape[dim]
    row = mine.mean(dims, keepdim=True) if dims else mine
    live = (row > 0).expand_as(r)
    relative = mine.sum() / torch.where(live, r.square(), 0.0).sum()
    return torch.where(live, torch.maximum(row.expand_as(r), relative.nan_to_num(0.0, 0.0, 0.0) * r.square()), 0.0)


def _groups(shape: torch.Size) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, dimensions summed over and size of the groups that errors are compared in."""
    dims = tuple(range(len(shape)))
    large = [dim for dim in dims if shape[dim] > 1]
    yield "the whole", dims, math.prod(shape)
    if len(large) > 1:
        for dim in large:
            yield f"a slice of dimension {dim}", tuple(d for d in dims if d != dim), math.prod(shape) // shape[dim]
        yield f"a row along dimension {large[-1]}", (large[-1],), shape[large[-1]]
    yield "an element", (), 1


def _sums(squares: Tensor, dims: tuple[int, ...]) -> Tensor:
    return squares.sum(dims, keepdim=True) if dims else squares


def _position(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape)) if values.dim() else ()


def _kinds(values: Tensor) -> Tensor:
    """0 for a finite number, and another number for each kind of what is not."""
    return torch.isnan(values) * 1 + torch.isposinf(values) * 2 + torch.isneginf(values) * 3


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()).double() if tensor.is_complex() else tensor.double()


def _relative_square(precise: Tensor, tensor: Tensor) -> float:
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return float((precise != tensor.to(precise.device)).sum())
    r, c = _real(precise), _real(tensor.to(precise.device))
    finite = torch.isfinite(r) & torch.isfinite(c)
    return float(torch.where(finite, r - c, 0.0).square().sum() / (torch.where(finite, r, 0.0).square().sum() + 1e-300))
