"""Steps that random programs showed to be served wrongly, each reduced to what it was about."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphs

pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def noise(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def called(step: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The output, or the kind of exception that was raised."""
    try:
        return step(*args)
    except Exception as error:
        return type(error)


def assert_like_eager(
    make: Callable[[], nn.Module],
    calls: list[tuple[Any, ...]],
    state: Callable[[Any], Any] = lambda model: None,
    mode: Callable[[], Any] = torch.no_grad,
    replays: int = 0,
) -> None:
    """Twins of one model give the same outputs, exceptions and state at each call; at least so many calls are replays."""
    torch.manual_seed(0)
    eager = make()
    model = copy.deepcopy(eager)
    step = graphs.capture(model)
    for index, args in enumerate(calls):
        torch.manual_seed(index)
        with mode():
            expected = called(eager, copy.deepcopy(args))
        after = torch.get_rng_state()
        torch.manual_seed(index)
        with mode():
            produced = called(step, copy.deepcopy(args))
        assert torch.equal(torch.get_rng_state(), after), f"default generator after call {index}"
        torch.testing.assert_close(produced, expected, equal_nan=True) if not isinstance(expected, type) else None
        assert isinstance(expected, Tensor) or produced == expected, f"call {index}"
        assert repr(state(model)) == repr(state(eager)), f"state after call {index}"
    assert step.report().replays >= replays


class Drawing(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.count = 0

    def __deepcopy__(self, memo: Any) -> Drawing:
        return type(self)()


def position(model: Drawing) -> list[int]:
    return model.generator.get_state().tolist()


class DrawsOnOneSide(Drawing):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + torch.randn(3, generator=self.generator)
        return x * 2


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("first", [-1.0, 1.0])
def test_a_side_that_is_not_taken_draws_nothing_from_a_generator_of_the_step(mode: Callable[[], Any], first: float) -> None:
    calls = [(torch.full((3,), first * sign),) for sign in (1, 1, -1, -1, 1, -1, 1, 1)]
    assert_like_eager(DrawsOnOneSide, calls, position, mode, replays=6)


class DrawsAndAssumes(Drawing):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        rows = torch.stack([x for _ in range(max(int(n), 1))])
        return rows.sum(0) + torch.randn(3, generator=self.generator)


def test_a_replay_that_is_undone_has_drawn_nothing_from_a_generator_of_the_step() -> None:
    calls = [(noise(i, 3), torch.tensor(n)) for i, n in enumerate((1, 2, 1, 3, 2, 0, 1, 3))]
    assert_like_eager(DrawsAndAssumes, calls, position, replays=4)


class DrawsEverySecondTime(Drawing):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.count % 2 == 0:
            x = x + torch.randn(3, generator=self.generator)
        return x


def test_a_trial_of_the_next_step_draws_nothing_from_a_generator_of_the_step() -> None:
    assert_like_eager(DrawsEverySecondTime, [(noise(i, 3),) for i in range(6)], position)


class Kept(nn.Module):
    """Leaves a number of the device in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0
        self.seen: list[int] = [0]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.position = int(t) % 3
        self.seen[0] = self.position
        return x * 2


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_host_value_that_is_left_in_python_is_there_after_each_call(mode: Callable[[], Any]) -> None:
    calls = [(noise(i, 3), torch.tensor(n)) for i, n in enumerate((2, 0, 0, 0, 1, 1, 0, 2))]
    assert_like_eager(Kept, calls, lambda model: (model.position, model.seen), mode)


class KeptOfAnArgument(nn.Module):
    def forward(self, x: Tensor, t: Tensor, told: dict[str, int]) -> Tensor:
        told["n"] = t.item()
        return x * 2


def test_a_host_value_that_is_left_in_an_argument_is_there_after_each_call() -> None:
    told = {"n": 2}
    step, model = graphs.capture(KeptOfAnArgument()), KeptOfAnArgument()
    with torch.no_grad():
        for n in (2, 2, 2, 3, 1):
            x, expected = torch.ones(3), {"n": 0}
            assert torch.equal(step(x, torch.tensor(n), told), model(x, torch.tensor(n), expected)) and told == expected


class Assigns(nn.Module):
    """Writes rows under one mask that another mask picked, or as many as there are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("kept", torch.zeros(4, 2))

    def forward(self, x: Tensor, m: Tensor, k: Tensor) -> Tensor:
        if self.how == "masks":
            self.kept[m] = x[k]
        elif self.how == "rows":
            self.kept[m] = x[:2]
        elif self.how == "lists":
            self.kept[m.nonzero()[:, 0]] = x[k.nonzero()[:, 0]]
        elif self.how == "two":
            self.kept[m, k.nonzero()[:, 0] % 2] = 1.0
        elif self.how == "added":
            self.kept.index_put_((m,), x[k], accumulate=True)
        else:
            x = x.masked_fill(k[:, None], 0.0)
            x[m] = x[m] * 2
        return self.kept + x


PAIRS = (((1, 1, 0, 0), (0, 1, 1, 0)), ((0, 1, 0, 1), (1, 0, 1, 0)), ((1, 1, 1, 0), (0, 1, 1, 0)), ((1, 0, 0, 0), (0, 1, 1, 1)))
PAIRS += (((0, 1, 1, 0), (0, 1, 0, 0)), ((0, 0, 0, 0), (0, 1, 0, 0)), ((1, 1, 0, 0), (0, 0, 0, 0)), ((1, 1, 1, 1), (1, 1, 1, 1)))


@pytest.mark.parametrize("how", ["masks", "rows", "lists", "two", "added", "same"])
def test_rows_that_do_not_fit_are_refused_as_in_eager(how: str) -> None:
    calls = [(noise(i, 4, 2), flags(*m), flags(*k)) for i, (m, k) in enumerate((*PAIRS, *PAIRS))]
    assert_like_eager(lambda: Assigns(how), calls, lambda model: model.kept, replays=2)


class Exchanges(nn.Module):
    """Gives a parameter other memory in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.kept.add_(x)
        self.weight.data = self.kept.flip(0)
        return x * 2


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_parameter_that_gets_other_memory_in_each_step_has_it(mode: Callable[[], Any]) -> None:
    assert_like_eager(Exchanges, [(noise(i, 3),) for i in range(6)], lambda model: model.weight.tolist(), mode)


class WritesInGradMode(nn.Module):
    """Writes what autograd refuses to have written, or what it allows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "out":
            torch.add(x, self.weight * 2, out=self.kept)
        elif self.how == "leaf":
            self.weight.mul_(2)
        elif self.how == "view":
            self.weight[:2].mul_(2)
        elif self.how == "behind":
            with torch.no_grad():
                self.kept.add_(1)
            with torch.set_grad_enabled(False):
                self.kept.add_(1)
            self.weight.mul_(2)
        else:
            with torch.no_grad():
                self.weight.mul_(0.5)
                torch.add(x, self.weight, out=self.kept)
        return x * 2


@pytest.mark.parametrize("how", ["out", "leaf", "view", "behind", "inside"])
def test_a_write_that_autograd_refuses_is_refused_in_grad_mode(how: str) -> None:
    calls = [(noise(i, 3),) for i in range(5)]
    state = lambda model: (model.weight.tolist(), model.kept.tolist())  # noqa: E731
    for mode in (torch.enable_grad, torch.no_grad):
        replays = 4 if how == "inside" or mode is torch.no_grad else 0
        assert_like_eager(lambda: WritesInGradMode(how), calls, state, mode, replays)


@torch.library.custom_op("fuzz_findings::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    return x * 3


class Catches(nn.Module):
    """Catches what its operators raise: this one has no fake kernel, so that tracing it does."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        try:
            x = tripled(x)
            if x.sum() > t:
                raise ValueError("too large")
        except (RuntimeError, ValueError):
            x = x * 0
        return x


def test_a_step_that_catches_what_tracing_raises_goes_the_way_of_eager() -> None:
    calls = [(torch.full((3,), 1.0), torch.tensor(t)) for t in (0.0, 0.0, 20.0, 0.0, 20.0)]
    assert_like_eager(Catches, calls)
