"""Run the copying kernel in Triton's interpreter against the reference for padding; print one JSON line of results.

A script, not a test module: the interpreter is chosen by an environment variable before triton is imported, so this runs
in a process of its own (see test_copies.py).
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime.interpreter import InterpreterBuilder

from graphs.contract.padding import Padding, pad_rows
from graphs.recording import copy_kernels
from graphs.recording.copy_kernels import RING, Copier, Move, load_kernels
from graphs.recording.run_word import count_run

Tensor = torch.Tensor
POLICIES = (Padding("repeat"), Padding("zero"), Padding("keep"), Padding("sentinel", 3))
DTYPES = (
    *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.complex128),
)
SHAPES = ("r", "r,3", "r,7,1", "2,r,3", "3,5,r", "r,129", "2,r,4,8")  # r stands for the rows
BATCHES = ((1, 4), (3, 4), (4, 4), (5, 8))  # real rows, recorded rows
MANY = 1000  # more programs than any of these copies takes
MARGIN = 16  # elements on either side of a tensor that nobody may write
copy_kernels._BLOCK = 64  # so that toy tensors take several blocks, the last of them ragged


def _splat_keeping_flags(builder: InterpreterBuilder, ret_ty: Any, arg: Any) -> Any:
    """A scalar flag made a vector: the interpreter gives it the type of an integer, and then takes it for no mask."""
    handle = _splat(builder, ret_ty, arg)
    if arg.data.dtype == bool:
        handle.data = handle.data.astype(bool)
    return handle


def _aligned_load(builder: InterpreterBuilder, ptrs: Any, mask: Any, *rest: Any) -> Any:
    _require_alignment(ptrs, mask)
    return _load(builder, ptrs, mask, *rest)


def _aligned_store(builder: InterpreterBuilder, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _require_alignment(ptrs, mask)
    return _store(builder, ptrs, value, mask, *rest)


def _require_alignment(ptrs: Any, mask: Any) -> None:
    """What a processor forgives, a GPU does not."""
    size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
    assert not (ptrs.data[mask.data] % size).any(), f"units of {size} bytes at an address that is no multiple of it"


_splat, _load, _store = (getattr(InterpreterBuilder, f"create_{name}") for name in ("splat", "masked_load", "masked_store"))
InterpreterBuilder.create_splat = _splat_keeping_flags
InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = _aligned_load, _aligned_store


@dataclass(frozen=True)
class Case:
    """One tensor that is copied: its shape with ``r`` for the rows (none: no batch dimension), and how."""

    dtype: torch.dtype
    shape: str
    policy: Padding
    displaced: int

    @property
    def batch_dim(self) -> int | None:
        """Where the rows are."""
        sizes = self.shape.split(",")
        return sizes.index("r") if "r" in sizes else None

    def sized(self, rows: int) -> tuple[int, ...]:
        """The shape at ``rows`` rows."""
        return tuple(rows if size == "r" else int(size) for size in self.shape.split(","))

    def values(self, rows: int, seed: int, guard: int = 1) -> Placed:
        """Values that no dtype rounds, ``displaced`` elements after an aligned address."""
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randint(0, 2 if self.dtype is torch.bool else 100, self.sized(rows), generator=generator)
        return Placed(tensor.to(self.dtype), self.displaced, guard)


class Placed:
    """A tensor inside a larger one, whose other elements, all ``guard``, must not change."""

    def __init__(self, tensor: Tensor, displaced: int, guard: int) -> None:
        self._start, self._end, self._guard = MARGIN + displaced, MARGIN + displaced + tensor.numel(), guard
        self._whole = torch.full((self._end + MARGIN,), guard, dtype=tensor.dtype)
        self.tensor = self._whole[self._start : self._end].view(tensor.shape).copy_(tensor)

    def guards_hold(self) -> bool:
        """Whether everything around the tensor is as it was made."""
        return bool((self._whole[: self._start] == self._guard).all() and (self._whole[self._end :] == self._guard).all())


def make_table(columns: int, turn: int) -> SimpleNamespace:
    """What `AddressTable` is, in ordinary memory."""
    width = max(32, 1 << columns.bit_length())
    pinned, cursor = torch.zeros(RING * (1 + columns), dtype=torch.int64), torch.tensor([turn])
    current = torch.zeros(width, dtype=torch.int64)
    return SimpleNamespace(width=1 + columns, padded_width=width, pinned=pinned, cursor=cursor, current=current)


def run(cases: list[Case], real: int, rows: int, turn: int, few: int) -> dict[str, list[str]]:
    """Copy every case in and, in the other direction, out; returns what came out wrong.

    ``few``: programs up to which each reads the row itself.
    """
    copy_kernels.FEW = few
    wrong: dict[str, list[str]] = {"inbound": [], "outbound": [], "guards": [], "turn": []}
    sources = [case.values(real, 2 * i, guard=0) for i, case in enumerate(cases)]
    slots = [replace(case, displaced=case.displaced // 2).values(rows, 2 * i + 1) for i, case in enumerate(cases)]
    results = [case.values(real, 2 * i + 1) for i, case in enumerate(cases)]
    expected = []
    for case, source, slot in zip(cases, sources, slots, strict=True):
        out, dim = slot.tensor.clone(), case.batch_dim
        expected.append(out.copy_(source.tensor) if dim is None else pad_rows(source.tensor, dim, rows, case.policy, out))
    table = make_table(2 * len(cases), turn)
    start = turn % RING * table.width
    row = [real, *(s.tensor.data_ptr() for s in sources), *(r.tensor.data_ptr() for r in results)]
    table.pinned[start : start + table.width] = torch.tensor(row)
    moves = [Move(slot.tensor, case.batch_dim, case.policy) for case, slot in zip(cases, slots, strict=True)]
    for inbound, first in ((True, 1), (False, 1 + len(cases))):
        copier = Copier(len(cases), table, first, inbound=inbound, host=inbound and turn % 2 == 0)  # type: ignore[arg-type]
        copier.bind(moves)
        copier._grid = (copier._grid[0], min(copier._grid[1], 2))  # fewer programs than blocks: each takes several
        copier.upload()
        copier.launch()
        if table.cursor.item() != turn + (not inbound) or table.current[: table.width].tolist() != row:
            wrong["turn"].append(f"inbound={inbound}: {table.cursor.item()}")
    for case, slot, result, filled in zip(cases, slots, results, expected, strict=True):
        cut = filled if case.batch_dim is None else filled.narrow(case.batch_dim, 0, real)
        if not torch.equal(slot.tensor, filled):
            wrong["inbound"].append(f"{case} {real} of {rows}")
        if not torch.equal(result.tensor, cut):
            wrong["outbound"].append(f"{case} {real} of {rows}")
    placed = zip(cases, slots, results, sources, strict=True)
    wrong["guards"] += [str(case) for case, *tensors in placed if not all(tensor.guards_hold() for tensor in tensors)]
    return wrong


def launched(table: Any) -> list[str]:
    """The kernels that are launched for inputs of few and of many programs, with the warps and whether each reads the table."""
    found = []

    class Spy:
        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*_: Any, num_warps: int, **constants: Any) -> None:
                found.append(f"{self._kernel.__name__}{list(grid)} {num_warps} {constants.get('FETCH')}")

            return launch

    kernels = copy_kernels.fetch_row, copy_kernels.move_rows
    copy_kernels.fetch_row, copy_kernels.move_rows = map(Spy, kernels)
    for programs in (1, 3):
        copier = Copier(1, table, 1, inbound=True)
        copier.bind([Move(torch.zeros(programs * copy_kernels._BLOCK, dtype=torch.int64), None, POLICIES[0])])
        copier.launch()
    copy_kernels.fetch_row, copy_kernels.move_rows = kernels
    return found


def main() -> None:
    out: dict[str, dict[str, list[str]]] = {}
    for dtype in DTYPES:
        shapes, displaced = itertools.cycle((*SHAPES, "5,3", "1")), itertools.cycle(range(5))
        found: dict[str, list[str]] = {"inbound": [], "outbound": [], "guards": [], "turn": []}
        for index, (real, rows) in enumerate(BATCHES):
            policies = POLICIES if dtype.itemsize <= 8 else POLICIES[:-1]  # a wider element takes no sentinel
            cases = [Case(dtype, next(shapes), policy, next(displaced)) for policy in policies for _ in range(2)]
            for few in (0, MANY):
                for part, wrong in run(cases, real, rows, RING - 2 + index, few).items():
                    found[part] += [f"few={few}: {text}" for text in wrong]
        out[str(dtype).removeprefix("torch.")] = found
    copy_kernels.FEW = 2
    none = make_table(0, 7)
    for inbound in (True, False):  # nothing to copy: the kernels carry the turn all the same
        copier = Copier(0, none, 1, inbound=inbound)  # type: ignore[arg-type]
        copier.bind(())
        copier.upload()
        copier.launch()
    load_kernels(none)  # type: ignore[arg-type]
    out["nothing"] = {"turn": [str(none.cursor.item())]}
    out["kernels"] = {"launched": launched(none)}
    runs, word, left = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64), []
    for broken in (False, True, False):
        count_run(runs, torch.tensor(broken), word)
        left.append(f"{runs} {word}")
    out["run word"] = {"left": left}
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
