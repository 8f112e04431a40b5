"""The catalogue of refusals: each is named with operator, line and remedy, counted, warned about once; strict raises it."""

from __future__ import annotations

import ctypes
import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs import errors
from graphs.dispatch.call_log import NotReplayed
from tests.parity import parity

Tensor = torch.Tensor
Body = Callable[[Tensor], Any]


@torch.library.custom_op("refusal_tests::scribble", mutates_args=())
def scribble(x: Tensor, board: Tensor) -> Tensor:
    """Writes ``board`` and does not say so."""
    board.add_(1)
    return x + 1


MEMORY = ctypes.c_int(0)
ADDRESS = ctypes.addressof(MEMORY)


def hidden() -> ctypes.c_int:
    """A number in memory that no walk over Python objects sees: at an address that only this function knows."""
    return ctypes.c_int.from_address(ADDRESS)


@torch.library.custom_op("refusal_tests::count", mutates_args=())
def count(x: Tensor) -> Tensor:
    """Depends on a number that nobody can see."""
    hidden().value += 1
    return x + hidden().value


board = torch.zeros(3)
cuts = torch.tensor([1, 2])


def item(x: Tensor) -> Tensor:
    return x * x.sum().item()  # here


def whole_number(x: Tensor) -> Tensor:
    return x * int(x.sum())  # here


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:  # here
        return x * 2
    return x * 3


def to_list(x: Tensor) -> Tensor:
    return x * sum(x.tolist())  # here


def to_numpy(x: Tensor) -> Tensor:
    return x * float(x.numpy().sum())  # here


def compare(x: Tensor) -> Tensor:
    return x * 2 if torch.equal(x, x + 1) else x * 3  # here


def nonzero(x: Tensor) -> Tensor:
    return x.nonzero()  # here


def masked(x: Tensor) -> Tensor:
    return x[x > 0]  # here


def masked_write(x: Tensor) -> Tensor:
    y = x.clone()
    y[y > 0] = torch.zeros(())  # here
    return y


def selected(x: Tensor) -> Tensor:
    return torch.masked_select(x, x > 0)  # here


def unique(x: Tensor) -> Tensor:
    return torch.unique(x)  # here


def uploaded(x: Tensor) -> Tensor:
    return x + torch.tensor([1.0, 2.0, 3.0])  # here


def indexed_by_a_list(x: Tensor) -> Tensor:
    return x[[2, 0, 1]]  # here


def resized(x: Tensor) -> Tensor:
    y = x * 2
    y.resize_(2)  # here
    return y


def undeclared(x: Tensor) -> Tensor:
    return scribble(x, board)  # here


def made_anew(x: Tensor) -> Any:
    return x * 2, object()


def unrepeatable(x: Tensor) -> Tensor:
    return count(x)  # here


def failing_when_repeated(x: Tensor) -> Tensor:
    hidden().value += 1
    if hidden().value == 2:
        raise ValueError("not again")  # here
    return x * 2


class Launch:
    """What triton hands to its launch hooks."""

    def get(self) -> dict[str, str]:
        return {"name": "my_kernel"}


def launched(x: Tensor) -> Tensor:
    """Stands in for a launch, which needs a device: calls what triton calls then."""
    triton = pytest.importorskip("triton", reason="triton is not installed, so nothing can be launched")
    triton.knobs.runtime.launch_enter_hook(Launch())  # here
    return x * 2


def timed(x: Tensor) -> Tensor:
    return x * (2 if time.monotonic() > 0 else 3)  # here


def printed(x: Tensor) -> Tensor:
    print("a step")  # here
    return x * 2


def split_by_a_tensor(x: Tensor) -> Tensor:
    return torch.tensor_split(x, cuts)[0]  # here


def differently_called(x: Tensor) -> Tensor:
    hidden().value += 1
    return x * 2 if hidden().value % 2 else x + x  # here


@dataclass
class Case:
    """A body, what its refusal is called, and whether a line of this file is at fault."""

    body: Body
    reason: str
    operator: str
    placed: bool = True

    @property
    def line(self) -> int:
        source, start = inspect.getsourcelines(self.body)
        return start + next(index for index, text in enumerate(source) if "# here" in text)


CASES = [
    Case(item, "host-sync", "aten._local_scalar_dense.default"),
    Case(whole_number, "host-sync", "aten._local_scalar_dense.default"),
    Case(branch, "host-sync", "aten._local_scalar_dense.default"),
    Case(to_list, "host-sync", "Tensor.tolist"),
    Case(to_numpy, "host-sync", "Tensor.numpy"),
    Case(compare, "host-sync", "aten.equal.default"),
    Case(nonzero, "data-dependent-shape", "aten.nonzero.default"),
    Case(masked, "data-dependent-shape", "aten.index.Tensor"),
    Case(masked_write, "data-dependent-shape", "aten.index_put_.default"),
    Case(selected, "data-dependent-shape", "aten.masked_select.default"),
    Case(unique, "data-dependent-shape", "aten._unique2.default"),
    Case(uploaded, "host-constant", "aten.lift_fresh.default"),
    Case(indexed_by_a_list, "host-constant", "aten.lift_fresh.default"),
    Case(differently_called, "changing-value", "aten.add.Tensor"),
    Case(resized, "unsupported-operator", "aten.resize_.default"),
    Case(undeclared, "undeclared-write", "refusal_tests.scribble.default"),
    Case(made_anew, "unsupported-output", "output", placed=False),
    Case(unrepeatable, "verify-mismatch", "output 0"),
    Case(failing_when_repeated, "capture-failed", "ValueError"),
    Case(launched, "opaque-kernel", "my_kernel"),
    Case(timed, "unguarded-read", "time.monotonic"),
    Case(printed, "side-effect", "print"),
    Case(split_by_a_tensor, "hidden-read", "torch.tensor_split"),
]
REMOVED = [case.body for case in CASES if case.reason in ("host-sync", "data-dependent-shape", "host-constant")]
REMOVED.remove(to_numpy)  # NumPy needs the numbers themselves
EITHER_WAY = [(case, "off") for case in CASES] + [(case, "auto") for case in CASES if case.body not in REMOVED]
"""Every case without the passes, and those that the passes do not remove with them."""


def over(cases: list[tuple[Case, str]]) -> Any:
    """A test of each case, with and without passes."""
    named = [pytest.param(case, passes, id=f"{case.body.__name__}-{passes}") for case, passes in cases]
    return pytest.mark.parametrize(("case", "passes"), named)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    hidden().value = 0
    board.zero_()


class Stateful(nn.Module):
    """A body behind state that advances: a buffer and the random generator."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.steps.add_(1)
        return self.body(x), torch.rand(2)


def calls(number: int) -> list[tuple[Tensor]]:
    return [(torch.randn(3, generator=torch.Generator().manual_seed(i)).abs(),) for i in range(number)]


def test_every_reason_is_met_by_some_test_or_needs_a_device() -> None:
    catalogue = {kind.reason for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Refusal)}
    elsewhere = {"refused", "compile-failed", "moved-static-tensor", "above-largest-bucket", "too-many-keys", "rows-interact"}
    elsewhere |= {"many-ways", "memory-budget"}
    arguments = {"autograd", "mixed-devices", "unsupported-argument"}
    on_a_device = {"nested-capture"}
    of_operators = {"hidden-state", "unsafe-operator", "higher-order-operator"}
    around = {"active-mode", "internal-error", "unsupported-tensor", "torchscript", "collective", "unwatchable"} | {"step-raises"}
    assert {case.reason for case in CASES} | elsewhere | arguments | on_a_device | of_operators | around == catalogue


def test_every_reason_has_a_remedy_of_its_own() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Refusal)]
    remedies = [kind.remedy for kind in kinds if kind is not errors.Refusal]
    assert all(remedies) and len(set(remedies)) == len(remedies)


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@over(EITHER_WAY)
def test_a_refusal_is_named_with_operator_line_and_remedy(case: Case, passes: str) -> None:
    step = graphs.capture(case.body, passes=passes)
    step(*calls(1)[0])
    (refusal,) = step.report().refusals
    assert (refusal.reason, refusal.operator) == (case.reason, case.operator)
    assert (refusal.file, refusal.line) == ((__file__, case.line) if case.placed else ("", 0))
    assert refusal.remedy and refusal.detail


IMPURE = ("verify-mismatch", "undeclared-write", "changing-value", "capture-failed", "unsupported-output")


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@over([(case, passes) for case, passes in EITHER_WAY if case.reason not in IMPURE])
def test_a_refused_step_is_the_eager_step(case: Case, passes: str) -> None:
    report = parity(lambda: Stateful(case.body), calls(3), passes=passes).report()
    assert (report.recordings, report.replays, report.eager_calls) == (0, 0, 3)
    assert [(refusal.reason, refusal.count) for refusal in report.refusals] == [(case.reason, 3)]


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@pytest.mark.parametrize("body", REMOVED, ids=lambda body: body.__name__)
def test_what_passes_remove_is_recorded(body: Body) -> None:
    report = parity(lambda: Stateful(body), calls(3)).report()
    assert report.replays == 3 and report.eager_calls == 0 and report.refusals == ()


@over(EITHER_WAY)
def test_a_reason_is_warned_about_once_and_counted_each_time(case: Case, passes: str) -> None:
    step = graphs.capture(case.body, passes=passes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls(4):
            step(*call)
    texts = [str(warning.message) for warning in caught if warning.category is NotReplayed]
    (refusal,) = step.report().refusals
    assert len(texts) == 1 and refusal.count == 4
    assert texts[0].startswith(f"graphs: this call runs eagerly: {case.reason}")
    assert texts[0].endswith(f"Remedy: {refusal.remedy}") and (not refusal.file or f"{refusal.file}:{refusal.line}" in texts[0])


@over(EITHER_WAY)
def test_strict_raises_and_leaves_the_state_as_it_was(case: Case, passes: str) -> None:
    model = Stateful(case.body)
    step = graphs.capture(model, strict=True, passes=passes)
    random = torch.get_rng_state()
    for _ in range(2):  # the first call finds the reason, the second remembers it
        with pytest.raises(graphs.Refusal) as raised:
            step(*calls(1)[0])
        assert raised.value.reason == case.reason
        assert model.steps.item() == 0 and torch.equal(torch.get_rng_state(), random)
    assert step.report().eager_calls == 0 and step.report().replays == 0


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = 0

    def forward(self, x: Tensor) -> Tensor:
        self.k += 1
        return x * self.k  # here


class Doubling(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.k = self.k * 2 + 1.0
        return x * self.k  # here


@pytest.mark.parametrize(("make", "passes"), [(Counting, "off"), (Doubling, "off"), (Doubling, "auto")])
def test_a_changing_attribute_is_named_with_the_line_that_uses_it(make: type[Counting], passes: str) -> None:
    step = graphs.capture(make(), passes=passes)
    with pytest.warns(NotReplayed, match=r"self.k was 1(\.0)?, then [23]"):
        step(torch.ones(3))
    (refusal,) = step.report().refusals
    assert (refusal.reason, refusal.operator) == ("changing-value", "self.k")
    assert (refusal.file, refusal.line) == (__file__, Case(make.forward, "", "").line)
    assert step.k == 1


@pytest.mark.parametrize(("make", "passes"), [(Counting, "off"), (Doubling, "auto")])
def test_strict_leaves_a_changing_attribute_as_it_was(make: type[Counting], passes: str) -> None:
    step = graphs.capture(make(), strict=True, passes=passes)
    for _ in range(2):
        with pytest.raises(errors.ChangingValue, match=r"self\.k"):
            step(torch.ones(3))
        assert step.k == 0


def two_faults(x: Tensor) -> Tensor:
    first = x.sum().item()
    second = x.max().item()
    return x * first * second


def test_every_faulty_line_of_a_step_is_reported() -> None:
    start = inspect.getsourcelines(two_faults)[1]
    step = graphs.capture(two_faults, passes="off")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls(3):
            step(*call)
    refusals = step.report().refusals
    assert [(refusal.line, refusal.count) for refusal in refusals] == [(start + 1, 3), (start + 2, 0)], "a call has one reason"
    assert len([warning for warning in caught if warning.category is NotReplayed]) == 2
    assert step.report().eager_calls == 3


def fault_in_a_library(x: Tensor) -> Tensor:
    return x * torch.functional.norm(x).item() if hidden().value else nn.functional.dropout(x, float(x.sum() > 9))  # here


def test_a_fault_is_placed_at_the_users_line_above_a_library() -> None:
    step = graphs.capture(fault_in_a_library)
    with pytest.warns(NotReplayed, match=r"test_errors\.py"):
        step(torch.ones(3))
    assert step.report().refusals[0].line == Case(fault_in_a_library, "", "").line


def first_of_two(x: Tensor, y: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda: (torch.ones(2), torch.ones(2, device="meta")), "mixed-devices"),
        (lambda: (torch.ones(2, device="meta"), torch.ones(2, device="meta")), "unsupported-argument"),
        (lambda: (torch.ones(2), torch.ones(2, requires_grad=True)), "autograd"),
    ],
)
def test_arguments_that_cannot_be_recorded(arguments: Callable[[], Any], reason: str) -> None:
    step = graphs.capture(first_of_two)
    with pytest.warns(NotReplayed) as caught:
        for _ in range(3):
            step(*arguments())
    (refusal,) = step.report().refusals
    assert len(caught) == 1
    assert (refusal.reason, refusal.operator, refusal.count) == (reason, "arguments", 3) and refusal.remedy
    strict = graphs.capture(first_of_two, strict=True)
    with pytest.raises(graphs.Refusal, match=reason):
        strict(*arguments())


def test_a_recorded_step_refuses_gradients_when_they_are_asked_for_later() -> None:
    x = torch.ones(2, requires_grad=True)
    step = graphs.capture(lambda x: x * 2)
    with torch.no_grad():
        for _ in range(3):
            step(x)
    with pytest.warns(NotReplayed, match="autograd"):
        step(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2]
    with torch.no_grad():
        step(x)
    assert step.report().replays == 4


def test_the_users_own_error_is_the_users() -> None:
    def wrong(x: Tensor) -> Tensor:
        raise LookupError("no such row")

    step = graphs.capture(wrong)
    with pytest.raises(LookupError, match="no such row"):
        step(torch.ones(2))
    report = step.report()
    assert [(refusal.reason, refusal.count) for refusal in report.refusals] == [("step-raises", 1)] and report.eager_calls == 1


def test_a_step_works_on_after_its_model_raised() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 2:
                raise ValueError("too long")
            self.steps.add_(1)
            return x * self.steps

    step = graphs.capture(Picky())
    for _ in range(2):
        with pytest.raises(ValueError, match="too long"):
            step(torch.ones(3))
    assert [step(torch.ones(1)).item() for _ in range(3)] == [1, 2, 3]
    assert step.report().replays == 3


def test_a_moved_weight_is_read_where_it_is_until_it_moves_all_the_time() -> None:
    model, kept = nn.Linear(3, 3, bias=False), []
    with torch.no_grad():
        step = graphs.capture(model, strict=True)
        step(torch.ones(3))
        for moved in (1, 2):
            kept.append(model.weight.data)
            model.weight.data = torch.full((3, 3), float(moved))
            assert step(torch.ones(3)).tolist() == [3 * moved] * 3
            assert step.report().refusals == () and step.report().moved == moved
        kept.append(model.weight.data)
        model.weight.data = torch.ones(3, 3)
        with pytest.raises(errors.MovedStaticTensor, match=r"self\.weight"):
            step(torch.ones(3))
        step.invalidate()
        assert step(torch.ones(3)).tolist() == [3, 3, 3]


@pytest.mark.parametrize("kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.Refusal)])
def test_the_message_of_a_refusal_ends_in_the_remedy(kind: type[errors.Refusal]) -> None:
    if kind is errors.RowsInteract:
        assert str(kind("seen")).endswith(f"Remedy: {kind.remedy}")
        return
    refusal = kind("seen", operator="aten.add", site=errors.Site("model.py", 7, "x = y"), remedy="do this")
    assert str(refusal) == f"{kind.reason} at model.py:7 [aten.add]: seen\n    x = y\n  Remedy: do this"
    assert refusal.signature == (kind.reason, "aten.add", "model.py", 7)
    assert str(kind("seen")).endswith(f"Remedy: {kind.remedy}")


def line_of(function: Any, text: str) -> int:
    lines, start = inspect.getsourcelines(function)
    return start + next(index for index, line in enumerate(lines) if text in line)


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_the_remedy_for_a_step_that_raises_when_it_runs_again_is_about_that() -> None:
    hidden.value = 0
    step = graphs.capture(failing_when_repeated)
    with torch.no_grad():
        assert torch.equal(step(torch.ones(2)), torch.full((2,), 2.0))
    (refusal,) = step.report().refusals
    assert "second run" in refusal.detail and "a later run" in refusal.remedy and "driver" not in refusal.remedy


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@pytest.mark.parametrize("result", ["output", "state"])
def test_a_mismatch_names_the_line_that_made_what_differs(monkeypatch: pytest.MonkeyPatch, result: str) -> None:
    from graphs.recording.cpu_tape import TapeRecording

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sums", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.sums.add_(x)
            y = x * 2
            return y.relu() + 1

    model = Model()
    replay = TapeRecording.replay

    def wrong(recording: Any, tensors: Any, rows: int) -> Any:
        produced = replay(recording, tensors, rows)
        (produced[0] if result == "output" else model.sums).add_(100)
        return produced

    monkeypatch.setattr(TapeRecording, "replay", wrong)
    step, x = graphs.capture(model), torch.randn(3)
    with torch.no_grad():
        assert torch.equal(step(x), (x * 2).relu() + 1)
    (refusal,) = step.report().refusals
    assert (refusal.reason, refusal.count) == ("verify-mismatch", 1) and "first replay" in refusal.detail
    assert refusal.line == line_of(Model, "relu() + 1" if result == "output" else "add_(x)")
    assert torch.equal(model.sums, x)


def test_the_report_tells_what_was_found_beside_the_reason_of_a_call() -> None:
    step = graphs.capture(two_faults, passes="off")
    with pytest.warns(NotReplayed):
        step(torch.ones(3))
    first, second = (line for line in str(step.report()).splitlines() if "host-sync" in line)
    assert "not replayed 1x" in first and "found as well" in second
    assert sum(refusal.count for refusal in step.report().refusals) == step.report().eager_calls == 1
