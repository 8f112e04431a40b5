"""What is saved of a step's state is what it writes: the same elements, however an operator names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
from graphs.state import tensor_state
from graphs.state.regions import written_region
from graphs.state.storage import written_tensors
from graphs.state.tensor_state import TensorState

Tensor = torch.Tensor
ROWS, WIDTH = 512, 64

WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "entries": lambda cache, rows: cache.index_put_((rows,), cache.new_ones(len(rows), WIDTH)),
    "entries of two dimensions": lambda cache, rows: cache.view(ROWS // 8, 8, WIDTH).index_put_(
        (rows // 8, rows % 8), cache.new_ones(len(rows), WIDTH)
    ),
    "entries along a later dimension": lambda cache, rows: torch.ops.aten.index_put_(
        cache.t(),
        [None, rows],
        cache.new_ones(WIDTH, len(rows)),
    ),
    "added": lambda cache, rows: cache.index_add_(0, rows, cache.new_ones(len(rows), WIDTH)),
    "copied": lambda cache, rows: cache.index_copy_(0, rows.unique(), cache.new_ones(len(rows.unique()), WIDTH)),
    "filled": lambda cache, rows: cache.t().index_fill_(1, rows, 5.0),
    "scattered": lambda cache, rows: cache.scatter_(0, rows[:, None].expand(-1, 7), cache.new_ones(len(rows), 7)),
    "scattered along the last": lambda cache, rows: cache.t().scatter_add_(1, rows.expand(3, -1), cache.new_ones(3, len(rows))),
    "a mask": lambda cache, rows: cache.__setitem__(torch.zeros(ROWS, dtype=torch.bool).index_fill_(0, rows, True), 2.0),
    "a slice": lambda cache, rows: cache[int(rows[0]) : int(rows[0]) + 3].add_(1),
    "a column": lambda cache, rows: cache[:, int(rows[0]) % WIDTH].mul_(2),
    "negative rows": lambda cache, rows: cache.index_put_((rows - ROWS,), cache.new_ones(len(rows), WIDTH)),
    "twice": lambda cache, rows: (cache.index_put_((rows,), cache.new_ones(len(rows), WIDTH)), cache[: int(rows[0]) + 1].add_(1)),
    "everything": lambda cache, rows: cache.add_(1),
}


class Saving(TorchDispatchMode):
    """Saves in ``state`` what each operator is about to write."""

    def __init__(self, state: TensorState) -> None:
        super().__init__()
        self.state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in written_tensors(func, args, kwargs):
            self.state.save_region(written_region(func, args, kwargs, tensor))
        return func(*args, **kwargs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_undone_to_the_bit(
    write: Callable[[Tensor, Tensor], object], dtype: torch.dtype, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_state, "SMALL", 0)
    size = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(0, 2 if dtype is torch.bool else 127, (ROWS, WIDTH * size), dtype=torch.uint8)
    with mode():
        cache = bits.clone().view(dtype)
        state = TensorState()
        try:
            with Saving(state):
                write(cache, torch.tensor([3, 7, 7, 200]))
        except (RuntimeError, NotImplementedError, IndexError):
            pytest.skip("eager does not write this dtype so")
        state.restore()
        assert torch.equal(cache.view(torch.uint8), bits)


@pytest.mark.parametrize("write", [name for name in WRITES if name not in ("everything", "a column")])
def test_what_is_saved_is_little(write: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_state, "SMALL", 0)
    cache, state = torch.randn(ROWS, WIDTH), TensorState()
    with torch.no_grad(), Saving(state):
        WRITES[write](cache, torch.tensor([3, 7, 7, 200]))
    saved = [copy for _, copy in state._saved if copy is not None]
    assert sum(copy.nbytes for copy in saved) <= cache.nbytes // 16


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([*WRITES]), st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6)), max_size=6))
def test_any_order_of_writes_is_undone_and_compared(steps: list[tuple[str, list[int]]]) -> None:
    cache, state = torch.randn(ROWS, WIDTH), TensorState()
    start = cache.clone()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(tensor_state, "SMALL", 0)
        with Saving(state):
            for name, rows in steps:
                WRITES[name](cache, torch.tensor(rows))
        end, copies = cache.clone(), state.copies()
        state.restore()
        assert torch.equal(cache, start)
        state.restore(copies)
        assert torch.equal(cache, end)


class Paged(torch.nn.Module):
    """A step that writes one row per call into a cache of many."""

    def __init__(self, rows: int = 8192) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(rows, 64))

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        self.cache[slot] = x
        return self.cache[slot] + self.cache[slot - 1] + x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("verify", ["capture", "always"])
def test_a_large_cache_is_as_eager_leaves_it(mode: Any, verify: Any) -> None:
    with mode():
        model, twin = Paged(), Paged()
        step = graphs.capture(model, verify=verify)
        for _ in range(5):
            x, slot = torch.randn(3, 64), torch.randperm(8192)[:3]
            assert torch.equal(step(x, slot), twin(x, slot))
            assert torch.equal(model.cache, twin.cache)
    assert step.report().replays == 5


def test_a_padded_row_that_writes_into_a_large_cache_is_found() -> None:
    """The last row is repeated where a bucket is not full, so a poisoned one writes to a row that no eager run writes."""
    with torch.no_grad():
        model, twin = Paged(), Paged()
        step = graphs.capture(model, buckets=(4,))
        for _ in range(3):
            x, slot = torch.randn(3, 64), torch.randperm(8192)[:3]
            assert torch.equal(step(x, slot), twin(x, slot))
            assert torch.equal(model.cache, twin.cache)
    assert "exact sizes" in str(step.report())


class Wrong(torch.nn.Module):
    """Writes to a row that is chosen by how often the step ran in this process: a recording keeps the row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(8192, 64))
        self.table = torch.randperm(8192)
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        self.cache[int(self.table[self.turn])] = x
        return x * 2


def test_rows_picked_by_a_number_of_pythons_are_found() -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        model = Wrong()
        torch.manual_seed(0)
        twin, step = Wrong(), graphs.capture(model)
        for _ in range(6):
            x = torch.randn(64)
            assert torch.equal(step(x), twin(x))
            assert torch.equal(model.cache, twin.cache)
