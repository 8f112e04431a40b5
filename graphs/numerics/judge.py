"""Whether a run that may round in other places than eager is right: by its error beside eager's own.

Both errors are taken against a run of the step in float64 (`high_precision`). With ``e``, ``c`` and ``r`` the results of
eager, of the candidate and of float64, the expected square of an element's error is ``v``: the mean of ``(e - r)**2`` over its
row, or as much relative to ``r`` as in the whole tensor, whichever is more. In a row where eager is exact (a row of a cache
that the step does not write) it is zero. A group of ``n`` elements is accepted if

    sum((c - r)**2) <= F**2 * sum(v) + sum((ULPS * eps * r)**2),        F = WHOLE + SPREAD * sqrt(2 * log(m + 50) / n)

where ``m`` is the number of groups of that kind, the largest of which is met: of ``m`` normal numbers it is near
``sqrt(2 * log(m))``. The groups are the whole tensor, every slice along every dimension, every row, every element, so that one
wrong row, column or element of a large tensor is not diluted by the rest.

`WHOLE` and `SPREAD` are measured: over decoders of 4 and 12 layers, dense and with experts, in three dtypes, with products
summed in other orders, split with and without rounding between, attention unfused, or nothing rounded before the end, right
candidates reach 1.2 in groups of 200 elements and more, 2.6 in rows of 16 and 7.7 in single elements, which is up to five
sixths of what is accepted. Of wrong ones, the closest (a mask that hides one key, in bfloat16) is 1.7 times what is accepted;
wrong positions, rows of keys, values and of the last matrix, stale inputs and missed writes 4 to 130 times. A row of a query or
feed-forward matrix moves the results of a step in bfloat16 by less than rounding does: of those, about a third are refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from graphs.numerics import tolerance
from graphs.numerics.high_precision import HighPrecision, raised
from graphs.numerics.ties import Tie
from graphs.state.regions import Region
from graphs.state.tensor_state import Left, TensorState
from passes.core.composites import as_written

Tensor = torch.Tensor
WHOLE, SPREAD = 2.0, 2.0
"""Accepted error of large groups in units of eager's, and how much more it may be in the worst of many small ones."""
ULPS = 1.0
"""Accepted in any case, in steps of the dtype: eager may be exact where another order of operations rounds."""
MEANINGLESS = 0.25
"""Eager's own error, relative to a result, from which on it says nothing: a step that amplifies rounding without end."""
_ROW = 16  # elements that tell the size of errors; shorter rows take in the dimension before
_SAMPLES = 8  # runs with random rounding, where a tensor is smaller than that
_LEVEL = 1e-3  # of squares of relative errors: numbers that are nearly equal may stand for each other
_RUNS = 24  # in float64, at most, to find out which of nearly equal numbers a choice took


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
class Rerun:
    """How the step runs once more in eager: put its state back, then run it; outputs in the order they are compared in."""

    reset: Callable[[], object]
    run: Callable[[], Sequence[Tensor]]
    written: TensorState


@dataclass(frozen=True)
class _Precise:
    """One run of eager with float64 beside it: ``(eager, float64)`` of each output, then of ``regions``, the written.

    ``spread`` holds, for tensors too small to tell the size of errors, the mean square of errors in `_SAMPLES` runs.
    """

    results: list[tuple[Tensor, Tensor]]
    gaps: dict[str, str]
    ties: list[Tie]
    spread: list[Tensor | None]
    regions: Sequence[Region]


def candidate_difference(
    expected: Sequence[Tensor],
    produced: Sequence[Tensor],
    state: Sequence[Tensor],
    rerun: Rerun,
    *,
    sentinels: Sequence[int] = (),
    tolerance_factor: float = tolerance.OTHER_KERNELS,
) -> tuple[str, str] | None:
    """What a candidate's run gets wrong, and how; None where its error is of the size of eager's.

    A run in float64 is only made where the elementwise tolerance is exceeded. It leaves state as an eager run would.

    Args:
        expected, state: outputs and written tensors of eager; produced: outputs of the candidate, just run.
        rerun: the step from the same state, and the tensors it writes, as the candidate left them.
        sentinels: rows of written tensors in which anything may stand.
        tolerance_factor: factor on the tolerance where no run in float64 is possible.
    """
    found = tolerance.run_difference(expected, produced, state, rerun.written.left(), sentinels)
    if found is None:
        return None
    produced = [out.clone() for out in produced]
    regions = rerun.written.regions[: len(state)]
    left = [region.live.to(like.device, copy=True) for region, like in zip(regions, state, strict=True)]
    candidate, names = [*produced, *left], _names(len(produced), len(left))
    pairs = list(zip([*expected, *state], candidate, strict=True))
    if any((a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) for a, b in pairs):
        return found
    precise, why = _judging_run(rerun, regions, [*expected, *state], names)
    if precise is None or why:
        found = tolerance.run_difference(expected, produced, state, Left(left, regions), sentinels, tolerance_factor)
        return (found[0], f"{found[1]}; by tolerance, since {why}") if found is not None else None
    refused = _with_ties(precise, candidate, names, sentinels, rerun, regions)
    if refused is None:
        return None
    return refused[0], f"{found[1] if found[0] == refused[0] else 'differs from eager'}; {refused[1]}"


def _judging_run(
    rerun: Rerun, regions: Sequence[Region], eager: Sequence[Tensor], names: Sequence[str]
) -> tuple[_Precise | None, str]:
    """A run with float64 beside it, and why it says nothing of a candidate; an empty text where it does."""
    precise, why = _in_float64(rerun, regions, ())
    if precise is None or why:
        return precise, why
    if _refused(precise, eager, names, ()) is not None:
        return precise, "eager does not repeat itself"
    share = max(map(_share, precise.results), default=0.0)
    return precise, f"rounding makes up {share:.0%} of what it computes" if share > MEANINGLESS else ""


def _names(outputs: int, state: int) -> list[str]:
    return [f"output {i}" for i in range(outputs)] + [f"state written by the step, tensor {i}" for i in range(state)]


def _refused(
    precise: _Precise, candidate: Sequence[Tensor], names: Sequence[str], sentinels: Sequence[int]
) -> tuple[str, str] | None:
    """The first of these results that is off by more than is accepted, and how."""
    regions = [*[None] * (len(names) - len(precise.regions)), *precise.regions]
    rows = zip(precise.results, precise.spread, candidate, names, regions, strict=True)
    for (eager, exact), spread, tensor, name, region in rows:
        text = difference(eager, tensor, exact, spread)
        spared = _without(sentinels, eager, tensor, region) if text and region is not None else iter(())
        if text and all(difference(eager, kept, exact, spread) for kept in spared):
            return name, text
    return None


def _without(sentinels: Sequence[int], eager: Tensor, tensor: Tensor, region: Region) -> Iterator[Tensor]:
    """``tensor`` with one row of one dimension as eager has it."""
    for row in sentinels:
        for mask in region.in_row(row):
            yield torch.where(mask.to(eager.device), eager, tensor.to(eager.device))


def _with_ties(
    precise: _Precise,
    candidate: Sequence[Tensor],
    names: Sequence[str],
    sentinels: Sequence[int],
    rerun: Rerun,
    regions: Sequence[Region],
) -> tuple[str, str] | None:
    """Like `_refused`, where choices between what rounding cannot tell apart may have gone either way.

    A choice of eager's is turned, and the step run with it, as long as that brings the candidate nearer. Where no tie does, one
    is turned that leaves it as near: a number that comes in between others is first seen at the end.
    """
    first = refused = _refused(precise, candidate, names, sentinels)
    nearest, turned, waiting, aside = _distance(precise, candidate), list[Tie](), list(precise.ties), list[Tie]()
    for _ in range(_RUNS):
        if refused is None or not (waiting or aside):
            break
        sideways = not waiting
        tie = aside.pop(0) if sideways else waiting.pop(0)
        other, why = _in_float64(rerun, regions, [*turned, tie], precise.spread)
        distance = _distance(other, candidate) if other is not None and not why else math.inf
        if other is not None and (distance < nearest or sideways):
            nearest, turned, aside = min(distance, nearest), [*turned, tie], []
            refused = _refused(other, candidate, names, sentinels)
            known = {(one.choice, one.row, frozenset((one.taken, one.left))) for one in turned}
            waiting = [one for one in other.ties if (one.choice, one.row, frozenset((one.taken, one.left))) not in known]
        elif distance <= nearest + _LEVEL:
            aside.append(tie)
    return first if refused is not None else None


def _distance(precise: _Precise, candidate: Sequence[Tensor]) -> float:
    """Squared error relative to each tensor's size, over all tensors."""
    return sum(_relative_square(exact, tensor) for (_, exact), tensor in zip(precise.results, candidate, strict=True))


def _in_float64(
    rerun: Rerun, regions: Sequence[Region], turned: Sequence[Tie], spread: list[Tensor | None] | None = None
) -> tuple[_Precise | None, str]:
    """Eager once more, with float64 beside it; and why that is not possible, or not enough.

    ``spread`` is that of another run, if there is one: a turned choice changes numbers, not the size of errors.
    """
    try:
        mode, results = _run(rerun, regions, HighPrecision(turned))
        spread = _spread(rerun, regions, results) if spread is None else spread
    except Exception as error:  # an operator that no dispatch mode can see, no room, or one that is not eager's own
        return None, f"the step cannot be run in float64: {type(error).__name__}: {error}"
    operator, reason = next(iter(mode.gaps.items()), ("", ""))
    why = f"{operator} does not run in float64: {reason}" if operator else ""
    return _Precise(results, mode.gaps, mode.ties, spread, regions), why


def _spread(rerun: Rerun, regions: Sequence[Region], results: list[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """The mean square of errors in `_SAMPLES` runs with random rounding, of tensors too small to tell it themselves."""
    small = [i for i, (eager, _) in enumerate(results) if eager.is_floating_point() and 0 < eager.numel() < _ROW]
    squares = {index: torch.zeros_like(results[index][1]) for index in small}
    for seed in range(_SAMPLES if small else 0):
        _, noisy = _run(rerun, regions, HighPrecision(seed=seed))
        for index, square in squares.items():
            square += (noisy[index][1] - results[index][1]).square() / _SAMPLES
    return [squares.get(index) for index in range(len(results))]


def _run(rerun: Rerun, regions: Sequence[Region], mode: HighPrecision) -> tuple[HighPrecision, list[tuple[Tensor, Tensor]]]:
    rerun.reset()
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # weights that autocast rounded before would pass for exact
    try:
        with as_written(), mode:
            outputs = list(rerun.run())
    finally:
        torch.set_autocast_cache_enabled(cached)
    made = [(tensor.clone(), mode.of(tensor)) for tensor in outputs]
    return mode, made + [(region.live.clone(), mode.of_region(region)) for region in regions]


@torch.no_grad()
def difference(eager: Tensor, candidate: Tensor, precise: Tensor, spread: Tensor | None = None) -> str:
    """How ``candidate`` deviates from ``precise`` beyond what ``eager`` suggests, or an empty string.

    Args:
        spread: squared error to be expected of each element at least.

    Whole numbers and booleans, dtypes that nothing is more precise than, and what is not finite are compared with eager.
    """
    candidate = candidate.to(eager.device) if candidate.device.type == "cpu" else candidate
    if eager.shape != candidate.shape or eager.dtype != candidate.dtype or not eager.numel():
        return tolerance.difference(eager, candidate)
    if eager.dtype == raised(eager.dtype) or eager.element_size() == 1:
        return tolerance.difference(eager, candidate, tolerance.OTHER_KERNELS if eager.dtype.is_floating_point else 1.0)
    excess = measure(eager, candidate, precise, spread)
    return str(excess) if not excess.ratio <= 1 else ""


@torch.no_grad()
def measure(eager: Tensor, candidate: Tensor, precise: Tensor, spread: Tensor | None = None) -> Excess:
    """The group of elements whose error is largest beside what is accepted."""
    smallest = torch.finfo(eager.dtype).smallest_normal * torch.finfo(eager.dtype).eps
    places = _affected(eager, candidate, precise)
    e, c, r = (_real(_part(tensor, places)) for tensor in (eager, candidate, precise))
    if not r.numel():
        return Excess(0.0, "the whole", 0.0, 0.0, 0.0, ())
    kind = _kinds(e) != _kinds(c)
    if bool(kind.any()):
        return Excess(math.inf, "a number that is not finite", math.inf, 0.0, 0.0, _there(places, _position(kind.double())))
    finite = torch.isfinite(e) & torch.isfinite(r)
    r = torch.where(finite, r, 0.0)
    mine, theirs = (torch.where(finite, x - r, 0.0).square() for x in (e, c))
    usual = _usual(mine, r)
    usual = torch.maximum(usual, _part(spread, places)) if spread is not None else usual
    floor = (ULPS * torch.finfo(eager.dtype).eps * r.abs() + smallest).square()
    excess = max((_excess(*group, mine, theirs, usual, floor) for group in _groups(r.shape)), key=lambda found: found.ratio)
    return dataclasses.replace(excess, index=_there(places, excess.index))


def _excess(name: str, dims: tuple[int, ...], count: int, mine: Tensor, theirs: Tensor, usual: Tensor, floor: Tensor) -> Excess:
    """The worst of the groups that are what remains when ``dims`` are summed over."""
    factor = WHOLE + SPREAD * math.sqrt(2 * math.log(mine.numel() // count + 50) / count)
    limit, error = factor**2 * _sums(usual, dims) + _sums(floor, dims), _sums(theirs, dims)
    ratio = (error / limit).nan_to_num(0.0, math.inf)
    where = _position(ratio)
    candidate, eager, accepted = (math.sqrt(float(x[where]) / count) for x in (error, _sums(mine, dims), limit))
    inside = iter(_position(theirs[tuple(slice(None) if dim in dims else where[dim] for dim in range(mine.dim()))]))
    index = tuple(next(inside) if dim in dims else where[dim] for dim in range(mine.dim()))
    return Excess(math.sqrt(float(ratio[where])), name, candidate, eager, accepted, index)


def _affected(eager: Tensor, candidate: Tensor, precise: Tensor) -> list[Tensor]:
    """Along each dimension, the places where anything was computed: of a cache, mostly the one token that was written."""
    same = (eager == candidate) & (eager == precise)
    changed = ~same
    places = []
    for dim in range(changed.dim()):
        others = [d for d in range(changed.dim()) if d != dim]
        places.append((changed.any(others) if others else changed).nonzero().flatten())
    return places


def _part(tensor: Tensor, places: Sequence[Tensor]) -> Tensor:
    for dim, index in enumerate(places):
        tensor = tensor if len(index) == tensor.shape[dim] else tensor.index_select(dim, index)
    return tensor


def _there(places: Sequence[Tensor], index: Sequence[int]) -> tuple[int, ...]:
    """The place in the whole tensor of one in its affected part; of a complex number, without which of its two parts."""
    return tuple(int(there[i]) for there, i in zip(places, index, strict=False))


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


@torch.no_grad()
def _share(result: tuple[Tensor, Tensor]) -> float:
    """Eager's error relative to what it computed of a tensor, of which the rest is as it was."""
    eager, precise = result
    if not (eager.is_floating_point() or eager.is_complex()) or eager.numel() < _ROW:
        return 0.0
    e, r = _real(eager), _real(precise)
    told = torch.isfinite(e) & torch.isfinite(r) & (e != r)
    size = float(torch.where(told, r, 0.0).square().sum())
    return math.sqrt(float(torch.where(told, e - r, 0.0).square().sum()) / size) if size else 0.0


@torch.no_grad()
def _relative_square(precise: Tensor, tensor: Tensor) -> float:
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return float((precise != tensor.to(precise.device)).sum())
    r, c = _real(precise), _real(tensor.to(precise.device))
    finite = torch.isfinite(r) & torch.isfinite(c)
    return float(torch.where(finite, r - c, 0.0).square().sum() / (torch.where(finite, r, 0.0).square().sum() + 1e-300))
