"""Host tensors among device arguments. Here the device is the CPU, so a device copy is a copy: all but devices can be tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs
from graphs.config import CaptureConfig
from graphs.contract import eligibility
from graphs.contract.arguments import flatten_call
from graphs.contract.slots import make_contract
from graphs.dispatch.dispatcher import Dispatcher
from graphs.errors import MixedDevices
from graphs.first_call import host_arguments
from graphs.observation.operations import EagerTrace, Operation, TensorUse
from graphs.rehearsal.compare_stand_ins import compare_with_stand_ins

Tensor = torch.Tensor
aten = torch.ops.aten
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")


@pytest.fixture(autouse=True)
def small_arguments_are_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def positions(call: Any) -> tuple[int, ...]:
        return tuple(index for index, tensor in enumerate(call.tensors) if tensor.numel() < 4)

    monkeypatch.setattr("graphs.dispatch.key_recorder.host_arguments", positions)


def branch(x: Tensor, t: Tensor) -> Tensor:
    return x * t if t > 0 else x - 1


class Cache:
    def __init__(self) -> None:
        self.rows = torch.zeros(6, 4)

    def __call__(self, x: Tensor, n: Tensor) -> Tensor:
        self.rows[n] = x[0]
        return self.rows.sum(0) + x


STEPS: dict[str, tuple[Callable[[], Any], Callable[[int], tuple[Any, ...]]]] = {
    "temperature": (lambda: lambda x, t: (x / t).softmax(-1), lambda i: (torch.randn(4, 8), torch.tensor(0.5 + i))),
    "lengths": (lambda: lambda x, n: x * (torch.arange(8) < n[:, None]), lambda i: (torch.randn(3, 8), torch.tensor([i, 1, 7]))),
    "promotion": (lambda: lambda x, t: x * t, lambda i: (torch.randn(8).bfloat16(), torch.tensor(i + 0.5))),
    "branch": (lambda: branch, lambda i: (torch.randn(8), torch.tensor(float(i % 3 - 1)))),
    "item": (lambda: lambda x, t: x * t.item(), lambda i: (torch.randn(8), torch.tensor(i + 0.5))),
    "handed through": (lambda: lambda x, t: (x + t, t), lambda i: (torch.randn(8), torch.tensor(float(i)))),
    "a view": (lambda: lambda x, t: (x + t[0], t[1:]), lambda i: (torch.randn(8), torch.tensor([float(i), 2.0]))),
    "state": (Cache, lambda i: (torch.randn(5, 4), torch.tensor(i % 6))),
    "in a container": (lambda: lambda x, d: x * d["t"][0], lambda i: (torch.randn(8), {"t": [torch.tensor(float(i))]})),
    "first": (lambda: lambda t, x: x * t, lambda i: (torch.tensor(float(i)), torch.randn(8))),
    "twice": (lambda: lambda x, t, u: x * t if t is u else x, lambda i: (torch.randn(8), *[torch.tensor(float(i))] * 2)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_gives_what_eager_does(name: str, mode: str) -> None:
    make, arguments = STEPS[name]
    model, step = make(), graphs.capture(make())
    with MODES[mode]():
        for call in range(8):
            given = arguments(call)
            got, expected = step(*given), model(*given)
            torch.testing.assert_close(got, expected)
    assert step.report().replays >= 6, str(step.report())


@pytest.mark.parametrize("mode", MODES)
def test_what_is_handed_through_is_the_argument_itself(mode: str) -> None:
    step = graphs.capture(lambda x, t: (x + t, t))
    with MODES[mode]():
        for call in range(4):
            t = torch.tensor(float(call))
            assert step(torch.randn(8), t)[1] is t
    assert step.report().replays == 4


def test_a_written_host_argument_is_refused_by_name_and_written_once() -> None:
    step, total = graphs.capture(lambda x, t: x * t.add_(1)), torch.tensor(0.0)
    with torch.no_grad():
        for call in range(3):
            assert torch.equal(step(torch.ones(8), total), torch.full((8,), call + 1.0))
    (refusal,) = step.report().refusals
    assert (refusal.reason, refusal.operator, refusal.count) == ("mixed-devices", "t", 3) and total == 3


def test_a_refused_step_runs_once_per_call_on_the_arguments_as_they_are() -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls = torch.zeros(())

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return x * float(t.numpy())

    model = Counting()
    step = graphs.capture(model)
    with torch.no_grad():
        for call in range(3):
            assert torch.equal(step(torch.ones(8), torch.tensor(call + 1.0)), torch.full((8,), call + 1.0))
            assert model.calls == call + 1
    assert {refusal.reason for refusal in step.report().refusals} == {"host-sync"}


def test_a_step_that_looks_at_the_tensor_itself_is_refused() -> None:
    t = torch.tensor(2.0)
    known = [t]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * t if t is known[0] else x - t

    step = graphs.capture(model)
    with torch.no_grad():
        assert torch.equal(step(torch.ones(8), t), torch.full((8,), 2.0))
    (refusal,) = step.report().refusals
    assert refusal.reason == "mixed-devices" and "device copy" in refusal.detail and refusal.line > 0


def test_buckets_and_host_arguments_do_not_go_together() -> None:
    call = flatten_call((torch.ones(3, 2), torch.tensor(1.0)), {})
    padded, exact = (Dispatcher(abs, CaptureConfig(buckets=buckets)) for buckets in ((4, 8), None))
    assert (padded.keys._host(call), exact.keys._host(call)) == ((), (1,))


def test_a_replay_that_differs_from_eager_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_arguments, "_copied", lambda tensor, device: tensor + 1)
    step = graphs.capture(lambda x, t: x * t)
    with torch.no_grad():
        assert torch.equal(step(torch.ones(8), torch.tensor(3.0)), torch.full((8,), 3.0))
        assert torch.equal(step(torch.ones(8), torch.tensor(4.0)), torch.full((8,), 4.0))


def test_positions_are_those_of_small_dense_host_tensors() -> None:
    class OnGpu:  # all that is asked of it
        device, is_cuda = torch.device("cuda"), True

    def positions(*tensors: Any) -> tuple[int, ...]:
        from graphs.contract.arguments import Call

        return eligibility.host_arguments(Call(list(tensors), [], ()))

    gpu, value = OnGpu(), torch.tensor(1.0)
    assert positions(value, value) == (), "a step on the CPU has no other arguments"
    assert positions(gpu, value, torch.zeros(1024), gpu) == (1, 2)
    assert positions(gpu, torch.zeros(1025)) == positions(gpu, torch.zeros(8)[::2]) == ()
    assert positions(gpu, torch.zeros(3, device="meta"), torch.eye(2).to_sparse()) == ()


def test_slots_know_where_their_arguments_come_from() -> None:
    tensors = [torch.ones(4), torch.tensor(1.0)]
    contract = make_contract(["x", "t"], tensors, (), {}, (), None, host=(1,))
    assert [slot.from_host for slot in contract.slots] == [False, True]


def use(device: str, kind: str, which: int, dtype: torch.dtype = torch.float32) -> TensorUse:
    return TensorUse((2,), (1,), dtype, device, (kind, which))


def trace(*operations: tuple[Any, tuple[Any, ...]]) -> EagerTrace:
    return EagerTrace(operations=[Operation(func, arguments, ("model.py", 1)) for func, arguments in operations])


def test_runs_are_compared_but_for_devices_and_moves() -> None:
    tensors = [torch.ones(2), torch.ones(2)]
    moved = (aten._to_copy.default, (use("cpu", "argument", 1), ("device", torch.device("cuda"))))
    first = trace(moved, (aten.mul.Tensor, (use("cuda", "argument", 0), use("cuda", "operation", 0))))
    second = trace((aten.mul.Tensor, (use("cuda", "argument", 0), use("cuda", "argument", 1))))
    other = trace((aten.mul.Tensor, (use("cuda", "argument", 0), use("cuda", "argument", 0))))
    plain = host_arguments._without_devices
    assert compare_with_stand_ins(plain(first), plain(second), tensors, strides=True) is None
    assert compare_with_stand_ins(plain(first), plain(other), tensors, strides=True) is not None
    cast = trace(
        (aten._to_copy.default, (use("cpu", "argument", 1), ("dtype", torch.float64), ("device", torch.device("cuda")))),
        (aten.mul.Tensor, (use("cuda", "argument", 0), use("cuda", "operation", 0, torch.float64))),
    )
    assert compare_with_stand_ins(plain(cast), plain(second), tensors, strides=True) is not None, "a cast is no mere move"


def test_outputs_have_to_be_where_eager_leaves_them() -> None:
    cpu, elsewhere = torch.ones(2), torch.ones(2, device="meta")
    assert host_arguments._on_other_devices([cpu], [cpu]) is None
    refusal = host_arguments._on_other_devices([cpu, cpu], [cpu, elsewhere])
    assert refusal is not None and (refusal.reason, refusal.operator) == ("unsupported-output", "output 1")


def test_strict_mode_raises_the_refusal() -> None:
    with pytest.raises(MixedDevices, match="host tensor that it is given"), torch.no_grad():
        graphs.capture(lambda x, t: x * t.add_(1), strict=True)(torch.ones(8), torch.tensor(0.0))
