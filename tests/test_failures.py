"""No exception of this project reaches a caller; the step's own does, once, with the state that eager leaves."""

from __future__ import annotations

import collections.abc
import ctypes
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.contract.outputs import template
from graphs.dispatch import key_recorder
from graphs.dispatch.call_log import NotReplayed
from graphs.dispatch.dispatcher import Dispatcher
from graphs.errors import InternalError
from graphs.first_call import record_key
from graphs.recording import cpu_tape
from graphs.state.tensor_state import TensorState

Tensor = torch.Tensor
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


@pytest.fixture
def _survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run it: what goes wrong inside is survived."""
    monkeypatch.delenv("GRAPHS_RAISE_INTERNAL")


class Stateful(nn.Module):
    """Every kind of state there is."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.calls, self.held, self.seen = 0, held, list[int]()

    def forward(self, x: Tensor, given: Any = None) -> Any:
        self.total.add_(x.sum())
        return x * 2 + self.total + torch.rand(())


MEMORY = ctypes.c_int(0)
ADDRESS = ctypes.addressof(MEMORY)


def runs_left() -> ctypes.c_int:
    """A number in memory that no walk over Python objects sees: at an address that only this function knows."""
    return ctypes.c_int.from_address(ADDRESS)


class Interrupted(Stateful):
    """Advances a number of Python and a tensor, draws, and then may stop: in the run that ``runs_left`` counts down to."""

    def __init__(self, stop: BaseException) -> None:
        super().__init__()
        self.stop = (stop,)

    def forward(self, x: Tensor, given: Any = None) -> Any:
        self.calls += 1
        self.total.add_(x.sum())
        noise = torch.rand(())
        if runs_left().value:
            runs_left().value -= 1
            if not runs_left().value:
                raise self.stop[0]
        return x * 2 + self.total + noise


class Refusing(Stateful):
    """Raises on some data."""

    def forward(self, x: Tensor, given: Any = None) -> Any:
        self.calls += 1
        self.total.add_(x.sum())
        if x.shape[0] == 3:
            raise ValueError("not three")
        return x * 2 + self.total


def state(model: Any) -> tuple[Any, ...]:
    return float(model.total), model.calls, [*model.seen], torch.get_rng_state().tolist()


def same(model: Any, reference: Any, step: Any, calls: int = 4, given: Callable[[], tuple[Any, ...]] = tuple) -> None:
    """Call a step and its reference alike."""
    for index in range(calls):
        x = torch.full((2,), float(index))
        torch.manual_seed(index)
        wanted = reference(x, *given())
        after = state(reference)
        torch.manual_seed(index)
        assert torch.equal(step(x, *given()), wanted), f"call {index}"
        assert state(model) == after, f"state after call {index}"


class Attributes:
    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)


class Equality:
    def __eq__(self, other: object) -> bool:
        raise LookupError

    __hash__ = None  # type: ignore[assignment]


class Text:
    def __repr__(self) -> str:
        raise LookupError

    def __len__(self) -> int:
        raise LookupError

    def __hash__(self) -> int:
        raise LookupError


class Items(collections.abc.MutableMapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise LookupError

    def __setitem__(self, key: str, value: int) -> None:
        raise LookupError

    def __delitem__(self, key: str) -> None:
        raise LookupError

    def __iter__(self) -> Iterator[str]:
        return iter(["key"])

    def __len__(self) -> int:
        return 1


@pytest.mark.usefixtures("_survived")
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@contexts
@pytest.mark.parametrize("kind", [Attributes, Equality, Text, Items])
@pytest.mark.parametrize("where", ["model", "argument", "in a list", "in a dict"])
def test_objects_that_raise_when_they_are_looked_at_do_no_harm(kind: type, where: str, context: Any) -> None:
    held = kind() if where == "model" else None
    model, reference = Stateful(held), Stateful(held)
    given = {"argument": lambda: (kind(),), "in a list": lambda: ([kind()],), "in a dict": lambda: ({"it": kind()},)}
    step = graphs.capture(model)
    with context():
        same(model, reference, step, given=given.get(where, tuple))
    assert {refusal.reason for refusal in step.report().refusals} <= {"internal-error"}


def _raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises, as if it were one of the project's."""

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return types.FunctionType(fails.__code__, {"__name__": "graphs.fault"}, "fails", None, fails.__closure__)


_fails = _raising(ZeroDivisionError("a fault"))


PLACES = [
    ("graphs.dispatch.eager_calls.flatten_call", Dispatcher),
    ("graphs.dispatch.key_recorder.device_of", key_recorder),
    ("graphs.dispatch.dispatcher.named_leaves", key_recorder),
    ("graphs.first_call.record_key.Checkpoint", record_key),
    ("graphs.first_call.consecutive.compare_traces", record_key),
    ("graphs.first_call.record_key.make_contract", record_key),
    ("graphs.first_call.record_key.StaticTensors", record_key),
    ("graphs.first_call.record_key.guards_of", record_key),
    ("graphs.first_call.record_key.time_call", record_key),
    ("graphs.rehearsal.step.output_template", template),
    ("graphs.first_call.verify_replay.tolerance.run_difference", record_key),
    ("graphs.observation.watching.finding", record_key),
    ("graphs.observation.watching.may_read", record_key),
    ("graphs.state.checksums.checksum", record_key),
    ("graphs.recording.cpu_tape._functional_call", cpu_tape),
    ("graphs.recording.cpu_tape.TapeRecording.poison", cpu_tape),
    ("graphs.dispatch.dispatcher.FastPath.of", Dispatcher),
]


@pytest.mark.usefixtures("_survived")
@contexts
@pytest.mark.parametrize("place", [name for name, _ in PLACES])
def test_a_fault_anywhere_is_a_counted_eager_call(place: str, context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = Stateful(), Stateful()
    step = graphs.capture(model)
    with monkeypatch.context() as patch, context(), pytest.warns(NotReplayed) as warned:
        patch.setattr(place, _fails)
        same(model, reference, step)
    report = step.report()
    assert len(warned) == 1
    (refusal,) = report.refusals
    assert (refusal.reason, report.replays) == ("internal-error", 0) or place.endswith("FastPath.of")
    assert "ZeroDivisionError: a fault" in refusal.traceback and refusal.traceback.splitlines()[-1] in refusal.detail
    assert "a fault" in str(report)
    step.invalidate()
    with context():
        same(model, reference, step)  # another module, or this one afterwards, records
    assert step.report().replays >= 4


@pytest.mark.usefixtures("_survived")
def test_strict_raises_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stateful()
    step = graphs.capture(model, strict=True)
    monkeypatch.setattr("graphs.first_call.record_key.make_contract", _fails)
    with pytest.raises(InternalError, match="a fault"), torch.no_grad():
        step(torch.ones(2))
    assert float(model.total) == 0


def test_in_tests_a_fault_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("graphs.first_call.record_key.make_contract", "graphs.dispatch.eager_calls.flatten_call"):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError, match="a fault"), torch.no_grad():
            patch.setattr(place, _fails)
            graphs.capture(Stateful())(torch.ones(2))


@contexts
def test_what_the_step_raises_is_raised_once_with_the_state_of_eager(context: Any) -> None:
    model, reference = Refusing(), Refusing()
    step = graphs.capture(model)
    with context():
        for size in (3, 2, 3, 2, 2):
            for called in (reference, step):
                if size != 3:
                    called(torch.ones(2))
                    continue
                with pytest.raises(ValueError, match="not three") as raised:
                    called(torch.ones(3))
                assert raised.value.__context__ is None and raised.value.__cause__ is None
            assert state(model) == state(reference)
    assert {refusal.reason for refusal in step.report().refusals} == {"step-raises"} and step.report().replays == 3


class Stop(BaseException):
    """No `Exception`, and no interrupt."""


def _send_signal() -> None:
    signal.raise_signal(signal.SIGTERM)


def _stop(number: int, frame: Any) -> None:
    raise Stop


@contexts
@pytest.mark.parametrize("run", range(1, 10))
def test_an_interrupt_in_the_first_call_leaves_what_was_before(run: int, context: Any) -> None:
    model, reference = Interrupted(KeyboardInterrupt()), Interrupted(KeyboardInterrupt())
    step, runs_left().value = graphs.capture(model), run
    before = state(model)
    with context():
        with pytest.raises(KeyboardInterrupt):
            step(torch.ones(2))
        assert state(model) == before
        runs_left().value = 0
        same(model, reference, step)
    assert step.report().replays >= 3, str(step.report())


class Signalled(Interrupted):
    """Gets a signal in one of its runs."""

    def forward(self, x: Tensor, given: Any = None) -> Any:
        try:
            return super().forward(x, given)
        except LookupError:
            _send_signal()


@pytest.mark.parametrize("run", [1, 2, 3, 4])
def test_what_a_signal_raises_in_the_first_call_leaves_what_was_before(run: int) -> None:
    model, before = Signalled(LookupError()), signal.signal(signal.SIGTERM, _stop)
    step, runs_left().value = graphs.capture(model), run
    found = state(model)
    try:
        with torch.no_grad(), pytest.raises(Stop):
            step(torch.ones(2))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert state(model) == found


class Exiting(Stateful):
    """Ends the program, after it has written."""

    def forward(self, x: Tensor, given: Any = None) -> Any:
        self.calls += 1
        self.total.add_(x.sum())
        self.seen.append(self.calls)
        if self.calls in self.held:
            raise Stop if self.calls % 2 else SystemExit(3)
        return x * 2 + self.total


@contexts
@pytest.mark.parametrize("at", [(1,), (2,), (3,), (4, 5), (1, 2, 3)], ids=str)
def test_what_is_no_exception_leaves_what_eager_leaves(at: tuple[int, ...], context: Any) -> None:
    model, reference = Exiting(at), Exiting(at)
    step = graphs.capture(model)
    with context():
        for _ in range(7):
            ends = [_end(called) for called in (reference, step)]
            assert ends[0] == ends[1]
            assert state(model) == state(reference)


def _end(called: Callable[[Tensor], Any]) -> str:
    try:
        return str(called(torch.ones(2)).tolist())
    except BaseException as error:
        assert error.__context__ is None and error.__cause__ is None
        return type(error).__name__


@contexts
@pytest.mark.parametrize("run", range(2, 8))
@pytest.mark.usefixtures("_survived")
def test_what_only_a_later_run_of_the_first_call_raises_does_not_reach_the_caller(run: int, context: Any) -> None:
    model, reference = Interrupted(Stop()), Interrupted(Stop())
    step = graphs.capture(model)
    with context():
        torch.manual_seed(0)
        wanted = reference(torch.ones(2))
        torch.manual_seed(0)
        runs_left().value = run
        assert torch.equal(step(torch.ones(2)), wanted)
        runs_left().value = 0
        assert state(model) == state(reference)


@pytest.mark.parametrize(
    "place",
    [
        "graphs.first_call.record_key.make_contract",
        "graphs.first_call.consecutive.compare_traces",
        "graphs.first_call.verify_replay.tolerance.run_difference",
    ],
)
def test_an_interrupt_between_the_runs_leaves_what_was_before(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = Stateful(), Stateful()
    step, before = graphs.capture(model), state(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), torch.no_grad():
        patch.setattr(place, _raising(KeyboardInterrupt()))
        step(torch.ones(2))
    assert state(model) == before
    with torch.no_grad():
        same(model, reference, step)


def test_an_operator_that_raises_in_a_replay_raises_what_eager_raises() -> None:
    table = torch.randn(4, 2)
    step = graphs.capture(lambda index: table[index] * 2)
    with torch.no_grad():
        for _ in range(2):
            step(torch.tensor([1, 2]))
        with pytest.raises(IndexError, match="out of bounds"):
            step(torch.tensor([1, 9]))
        assert torch.equal(step(torch.tensor([1, 2])), table[[1, 2]] * 2)
    assert step.report().replays == 3


def test_the_state_of_a_sparse_tensor_is_put_back() -> None:
    matrix = torch.eye(3).to_sparse().coalesce()
    saved = TensorState()
    saved.save(matrix)
    matrix.mul_(3)
    saved.restore()
    assert torch.equal(matrix.to_dense(), torch.eye(3))


def test_an_interrupt_right_after_the_first_run_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run itself is over, and what it did is being looked at."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            return x + self.steps

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model = Counting()
    step = graphs.capture(model)
    with monkeypatch.context() as patched:
        patched.setattr("graphs.first_call.observe.adopt_returned", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(torch.ones(1))
    assert model.steps.item() == 0
    assert [step(torch.ones(1)).item() for _ in range(3)] == [2, 3, 4]
