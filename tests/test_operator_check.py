"""`graphs.capture_check`: operators that are broken in each way are caught and named; healthy ones pass."""

from __future__ import annotations

import ctypes
import inspect
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import graphs
from graphs import errors
from graphs.errors import ConfigError, UndeclaredWrite
from graphs.recording.cpu_tape import TapeRecorder
from graphs.state.op_registry import overload_of, registered

MEMORY = ctypes.c_int(0)
ADDRESS = ctypes.addressof(MEMORY)


def hidden() -> ctypes.c_int:
    """A number in memory that no walk over Python objects sees: at an address that only this function knows."""
    return ctypes.c_int.from_address(ADDRESS)


hits = [0]
calls_so_far = torch.zeros(())
kept: list[Tensor] = []
addresses: list[int] = []


def operator(fn: Callable[..., Any], **settings: Any) -> Any:
    return torch.library.custom_op(
        f"operator_check::{fn.__name__}", fn, mutates_args=settings.pop("mutates_args", ()), **settings
    )


def syncing(x: Tensor) -> Tensor:
    return x * x.sum().item()  # here


def listing(x: Tensor) -> Tensor:
    return x * len(x.tolist())  # here


def branching(x: Tensor) -> Tensor:
    if x[0] > 0:  # here
        return x * 2
    return x.clone()


def sized_by_data(x: Tensor) -> Tensor:
    return x[x > 0].sum() + x  # here


def sized_by_data_unseen(x: Tensor) -> Tensor:
    count = sum((ctypes.c_float * x.numel()).from_address(x.data_ptr()))
    return torch.empty(1 + int(abs(count) * 100)).zero_().sum() + x  # here


def resulting_in_a_size(x: Tensor) -> Tensor:
    count = sum((ctypes.c_float * x.numel()).from_address(x.data_ptr()))
    return torch.zeros(1 + int(abs(count) * 100))  # here


def choosing_unseen(x: Tensor) -> Tensor:
    value = ctypes.c_float.from_address(x.data_ptr()).value
    return x.sin() if value == 1.0 else x.cos()  # here


def uploading(x: Tensor) -> Tensor:
    return x + torch.tensor([1.0, 2.0, 3.0])  # here


def counting(x: Tensor) -> Tensor:
    hits[0] += 1
    return x + hits[0]


def counting_in_silence(x: Tensor) -> Tensor:
    hits[0] += 1
    return x + 1


def counting_out_of_sight(x: Tensor) -> Tensor:
    hidden().value += 1
    return x + hidden().value


def counting_on_the_device(x: Tensor) -> Tensor:
    calls_so_far.add_(1)  # here
    return x + 1


def drawing(x: Tensor) -> Tensor:
    return x + torch.rand(3)


def drawing_from_python(x: Tensor) -> Tensor:
    return x + random.random()


def drawing_from_numpy(x: Tensor) -> Tensor:
    return x + float(np.random.rand())


def scribbling(x: Tensor, board: Tensor) -> Tensor:
    board.add_(1)
    return x + 1


def scribbling_unseen(x: Tensor, board: Tensor) -> Tensor:
    ctypes.c_float.from_address(board.data_ptr()).value += 1
    return x + 1


def keeping_the_tensor(x: Tensor) -> Tensor:
    if not kept:
        kept.append(x)
    return kept[0] * 2


def keeping_the_address(x: Tensor) -> Tensor:
    if not addresses:
        addresses.append(x.data_ptr())
    return x + ctypes.c_float.from_address(addresses[0]).value


class Case(NamedTuple):
    fn: Callable[..., Any]
    kind: type[graphs.Refusal]
    says: str
    arguments: int = 1


BROKEN = [
    Case(syncing, errors.HostSync, "_local_scalar_dense"),
    Case(listing, errors.HostSync, "Tensor.tolist"),
    Case(branching, errors.HostSync, "_local_scalar_dense"),
    Case(sized_by_data, errors.DataDependentShape, "boolean mask"),
    Case(sized_by_data_unseen, errors.DataDependentShape, "with other data, aten.empty"),
    Case(resulting_in_a_size, errors.DataDependentShape, "with other data"),
    Case(choosing_unseen, errors.ChangingValue, "with other data"),
    Case(uploading, errors.HostConstant, "host data"),
    Case(counting, errors.HiddenState, "hits"),
    Case(counting_in_silence, errors.HiddenState, "hits"),
    Case(counting_out_of_sight, errors.HiddenState, "called twice with the same arguments, output 0 differs"),
    Case(counting_on_the_device, errors.HiddenState, "aten.add_.Tensor writes a tensor that is not an argument"),
    Case(drawing, errors.HiddenState, "draws random numbers"),
    Case(drawing_from_python, errors.HiddenState, "random"),
    Case(drawing_from_numpy, errors.HiddenState, "numpy.random"),
    Case(scribbling, errors.UndeclaredWrite, "'board', which mutates_args does not name", 2),
    Case(scribbling_unseen, errors.UndeclaredWrite, "'board', which mutates_args does not name", 2),
    Case(keeping_the_tensor, errors.HiddenState, "elsewhere, output 0 .* keeps an address or a tensor"),
    Case(keeping_the_address, errors.HiddenState, "elsewhere, output 0 .* keeps an address or a tensor"),
]


def arguments(number: int) -> list[Tensor]:
    return [torch.tensor([1.0, -2.0, 3.0]) + i for i in range(number)]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.fn.__name__)
def test_a_broken_operator_is_caught_and_named(case: Case) -> None:
    kept.clear(), addresses.clear()
    given = arguments(case.arguments)
    before = [tensor.clone() for tensor in given]
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    with pytest.raises(case.kind, match=case.says) as raised:
        graphs.capture_check(operator(case.fn), given)
    refusal = raised.value
    assert type(refusal) is case.kind and refusal.operator == f"operator_check.{case.fn.__name__}.default"
    assert refusal.remedy and str(refusal).endswith(refusal.remedy)
    source, start = inspect.getsourcelines(case.fn)
    line = next((start + index for index, text in enumerate(source) if "# here" in text), None)
    placed = line is not None and case.fn is not resulting_in_a_size  # seen from outside
    assert (refusal.site.file, refusal.site.line) == ((__file__, line) if placed else ("", 0))
    assert all(map(torch.equal, given, before))
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert np.random.get_state()[2] == numpy_state


def test_python_state_is_as_it_was() -> None:
    hits[0] = 5
    with pytest.raises(errors.HiddenState):
        graphs.capture_check(operator(counting), arguments(1))
    assert hits == [5]


def scaled(x: Tensor, factor: float = 2.0) -> Tensor:
    return torch.softmax(x * factor, -1)


def accumulated(total: Tensor, x: Tensor) -> None:
    total.add_(x)


def several(x: Tensor, index: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    cache.index_add_(0, index, x)
    return x.sum(0), cache[index] * 2


def warmed_up(x: Tensor) -> Tensor:
    """Fills a table at its first call, as a JIT does."""
    if not kept:
        kept.append(torch.arange(3.0))
    return x + kept[0]


def announced_draw(x: Tensor) -> Tensor:
    return x + torch.rand(3)


HEALTHY: list[tuple[Any, dict[str, Any], tuple[Any, ...]]] = [
    (scaled, {}, (torch.randn(4, 5), 3.0)),
    (accumulated, {"mutates_args": ("total",)}, (torch.zeros(3), torch.ones(3))),
    (several, {"mutates_args": ("cache",)}, (torch.randn(2, 3), torch.tensor([4, 1]), torch.randn(6, 3))),
    (warmed_up, {}, (torch.randn(3),)),
    (announced_draw, {"tags": (torch.Tag.nondeterministic_seeded,)}, (torch.randn(3),)),
]


@pytest.mark.parametrize(("fn", "settings", "given"), HEALTHY, ids=lambda value: getattr(value, "__name__", ""))
def test_a_healthy_operator_passes(fn: Any, settings: dict[str, Any], given: tuple[Any, ...]) -> None:
    kept.clear()
    before = [value.clone() if isinstance(value, Tensor) else value for value in given]
    checked = operator(fn, **settings)
    graphs.capture_check(checked, given)
    graphs.capture_check(checked._opoverload, given)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(given, before, strict=True))


def test_operators_of_torch_and_of_this_package_pass() -> None:
    graphs.capture_check(torch.ops.aten.addmm.default, (torch.randn(3), torch.randn(2, 4), torch.randn(4, 3)), {"beta": 0.5})
    graphs.capture_check(torch.ops.graphs.wo_a_einsum, (torch.randn(3, 2, 8), torch.randn(2, 4, 8)))
    with pytest.raises(errors.DataDependentShape):
        graphs.capture_check(torch.ops.aten.nonzero.default, (torch.randn(3),))


def test_data_given_by_the_user_is_used() -> None:
    def by_index(x: Tensor, index: Tensor) -> Tensor:
        value = ctypes.c_longlong.from_address(index.data_ptr()).value
        return x.sin() if value else x.cos()

    checked, x = operator(by_index), torch.randn(3)
    graphs.capture_check(checked, (x, torch.tensor([0])))  # indices are not invented
    with pytest.raises(errors.ChangingValue, match=r"aten\.cos\.default, then aten\.sin\.default"):
        graphs.capture_check(checked, (x, torch.tensor([0])), others=[(x, torch.tensor([1]))])
    with pytest.raises(errors.ConfigError, match="others"):
        graphs.capture_check(checked, (x, torch.tensor([0])), others=[(x, torch.tensor([1, 2]))])


def test_a_replay_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    record = TapeRecorder.record

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        recording = record(self, *args, **kwargs)
        replay = recording.replay
        monkeypatch.setattr(recording, "replay", lambda tensors, rows: [out + 1 for out in replay(tensors, rows)], raising=False)
        return recording

    monkeypatch.setattr(TapeRecorder, "record", wrong)
    with pytest.raises(errors.VerifyMismatch, match="replay 1, with the same data at new addresses: output 0 differs"):
        graphs.capture_check(operator(scaled), (torch.randn(3),))


def test_what_is_no_operator_is_named() -> None:
    with pytest.raises(errors.ConfigError, match=r"register_op or torch\.library\.custom_op"):
        graphs.capture_check(lambda x: x, (torch.ones(2),))
    with pytest.raises(errors.ConfigError, match=r"one overload: .*aten\.add\.Tensor"):
        graphs.capture_check(torch.ops.aten.add, (torch.ones(2), torch.ones(2)))


def _one_row(cache: Tensor, x: Tensor, slot: Tensor) -> Tensor:
    cache[slot] = x
    return x * 2


def _row_and_first(cache: Tensor, x: Tensor, slot: Tensor) -> Tensor:
    cache[slot] = x
    cache[0] += 1
    return x * 2


def _slots(cache: Tensor, x: Tensor, slot: Tensor) -> Tensor:
    return slot


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_of_a_cache_the_rows_are_saved_that_its_operator_names(mode: Any) -> None:
    op = graphs.register_op(_one_row, name=f"rows::one_{mode.__name__}", mutates_args=("cache",), writes={"cache": _slots})
    asked: list[int] = []
    registered(overload_of(op)).writes["cache"] = lambda *given: (asked.append(1), _slots(*given))[1]  # type: ignore[index, union-attr]
    with mode():
        cache, twin = torch.zeros(4096, 64), torch.zeros(4096, 64)
        step = graphs.capture(lambda x, slot: op(cache, x, slot) + cache[slot - 1])
        for turn in range(4):
            x, slot = torch.randn(2, 64), torch.tensor([turn, 100 + turn])
            expected = op(twin, x, slot) + twin[slot - 1]
            assert torch.equal(step(x, slot), expected)
            assert torch.equal(cache, twin)
    assert asked and step.report().replays == 4


def test_a_write_beside_the_named_rows_is_caught() -> None:
    op = graphs.register_op(_row_and_first, name="rows::two", mutates_args=("cache",), writes={"cache": _slots})
    with pytest.raises(UndeclaredWrite, match="beyond the rows"):
        graphs.capture_check(op, (torch.zeros(4096, 64), torch.randn(2, 64), torch.tensor([3, 100])))


def test_rows_of_what_is_not_written_are_an_error() -> None:
    with pytest.raises(ConfigError, match="writes"):
        graphs.register_op(_one_row, name="rows::three", mutates_args=("cache",), writes={"x": _slots})


def _clamped(x: Tensor, y: Tensor) -> Tensor:
    x.copy_(y.clamp(min=0))
    return y * 2


def test_a_write_that_changes_nothing_at_first_is_caught() -> None:
    op = graphs.register_op(_clamped, name="rows::clamped")
    with pytest.raises(UndeclaredWrite, match="'x'"):
        graphs.capture_check(op, (torch.ones(3), torch.ones(3)))


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(3, 4).t(),
    "channels last": lambda: torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last),
    "cut out": lambda: torch.randn(4, 6)[:, 1:4],
    "every second": lambda: torch.randn(8, 4)[::2],
    "expanded": lambda: torch.randn(1, 4).expand(3, 4),
    "conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "8 bits": lambda: torch.randn(4, 4).to(torch.float8_e4m3fn).t(),
}


def in_its_layout(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_operator_passes_with_a_tensor_of_any_layout(layout: str) -> None:
    name = f"layout_{layout.replace(' ', '_')}"

    def fn(x: Tensor) -> Tensor:
        return in_its_layout(x)

    fn.__name__ = name
    checked = graphs.register_op(fn, name=f"operator_check::{name}", fake=torch.empty_like)
    graphs.capture_check(checked, (LAYOUTS[layout](),))
