"""`legal_operands`: a graph that runs on a way which the step does not take raises nowhere, and its flag says what was wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphs
import passes
from tests.passes.steps import Step, check, rewritten

SQUARE = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 4.0]])
SCORES = torch.tensor([[0.1, 0.5, 0.4, 0.2], [0.3, 0.2, 0.2, 0.9]])
CLASSES = torch.tensor([1, 3])


def sides(first: Callable[..., Tensor], second: Callable[..., Tensor]) -> Step:
    def step(x: Tensor, index: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            return first(x, index, t)
        return second(x, index, t)

    return step


def scaled(x: Tensor, index: Tensor, t: Tensor) -> Tensor:
    return x * 2


def whole(t: Tensor) -> Tensor:
    return t.long() * 100 - 99  # 1 for 1, far outside for anything else


FIRST: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "multinomial": (lambda x, i, t: torch.multinomial((x / t).softmax(-1), 1).float(), SCORES),
    "multinomial of zeros": (lambda x, i, t: torch.multinomial(x * t.clamp(min=0), 2).float(), SCORES),
    "bernoulli": (lambda x, i, t: torch.bernoulli(x / t), SCORES),
    "bernoulli_": (lambda x, i, t: torch.empty(2, 4).bernoulli_(x / t), SCORES),
    "poisson": (lambda x, i, t: torch.poisson(x * t), SCORES),
    "normal": (lambda x, i, t: torch.normal(0.0, x * t), SCORES),
    "cholesky": (lambda x, i, t: torch.linalg.cholesky(x * t), SQUARE),
    "inv": (lambda x, i, t: torch.linalg.inv(x * t), SQUARE),
    "solve": (lambda x, i, t: torch.linalg.solve(x * t, x), SQUARE),
    "eigh": (lambda x, i, t: torch.linalg.eigvalsh(x / t), SQUARE),
    "svd": (lambda x, i, t: torch.linalg.svd(x / t)[1], SQUARE),
    "nll_loss": (lambda x, i, t: F.nll_loss(x.log_softmax(-1), i * whole(t)), SCORES),
    "one_hot": (lambda x, i, t: F.one_hot(i * whole(t), 4).float(), SCORES),
    "embedding": (lambda x, i, t: F.embedding(i * whole(t), x.t()), SCORES),
    "gather": (lambda x, i, t: x.gather(1, i[:, None] * whole(t)), SCORES),
    "index_select": (lambda x, i, t: x.index_select(1, i * whole(t)), SCORES),
    "take": (lambda x, i, t: x.take(i * whole(t)), SCORES),
    "put_": (lambda x, i, t: x.clone().put_(i * whole(t), x[0, :2]), SCORES),
    "repeat_interleave": (lambda x, i, t: x.repeat_interleave(i * whole(t), 0, output_size=4), SCORES),
    "histc": (lambda x, i, t: torch.histc(x / t, 4) + torch.rand(4) * 0, SCORES),
    "histc between limits": (lambda x, i, t: torch.histc(x / t, 4, min=0, max=3) + torch.rand(4) * 0, SCORES),
    "masked_scatter": (lambda x, i, t: x.masked_scatter(x > t * 0.3, x[0, :3]), SCORES),
}
TAKEN = [torch.tensor(value) for value in (1.0, 0.0, 1.0, -1.0, 0.0)]


@pytest.mark.parametrize("name", FIRST)
def test_an_operator_that_refuses_values_does_not_on_a_way_not_taken(name: str) -> None:
    first, x = FIRST[name]
    step = sides(first, scaled)
    captured = graphs.capture(step)
    for t in TAKEN * 2:
        generator = torch.get_rng_state()
        expected = step(x, CLASSES, t)
        torch.set_rng_state(generator)
        torch.testing.assert_close(captured(x.clone(), CLASSES.clone(), t.clone()), expected)
    assert captured.report().replays >= 6


@pytest.mark.parametrize("name", ["bernoulli", "nll_loss", "gather", "cholesky", "one_hot", "multinomial", "masked_scatter"])
def test_what_eager_refuses_on_the_way_taken_is_refused(name: str) -> None:
    first, x = FIRST[name]
    captured = graphs.capture(sides(first, scaled))
    for _ in range(3):
        captured(x.clone(), CLASSES.clone(), torch.tensor(1.0))
    bad = {"cholesky": -x, "masked_scatter": torch.full_like(x, 5.0)}.get(name, x * torch.nan)
    index = CLASSES if name not in ("nll_loss", "gather", "one_hot") else CLASSES + 40
    kind: Any = (RuntimeError, IndexError)
    with pytest.raises(kind):
        captured(bad.clone() if index is CLASSES else x.clone(), index.clone(), torch.tensor(1.0))
    assert torch.equal(captured(x.clone(), CLASSES.clone(), torch.tensor(0.0)), x * 2)


def test_a_distribution_on_a_way_not_taken_draws_nothing() -> None:
    step = sides(FIRST["multinomial"][0], scaled)
    captured = graphs.capture(step)
    for t in TAKEN:
        captured(SCORES.clone(), CLASSES.clone(), t.clone())
    before = torch.get_rng_state()
    captured(SCORES.clone(), CLASSES.clone(), torch.tensor(0.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_operator_of_which_no_legal_value_is_known_is_not_recorded_under_an_assumption() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            return torch.cholesky_inverse(x.view(2, 4)[:, :2] / t) + torch.rand(2, 2) * 0
        return x.view(2, 4)[:, :2] * 2

    with pytest.raises(passes.Unremovable, match="may refuse what it is given"):
        rewritten(step, torch.rand(8), torch.tensor(1.0), merge=True)


def largest(make: Callable[[int, Tensor, Tensor], Tensor]) -> Step:
    def step(index: Tensor, source: Tensor) -> Tensor:
        n = int(index.max()) + 1
        return make(n, index, source)

    return step


INTO: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
    "scatter_reduce_": lambda n, i, s: torch.full((n,), -torch.inf).scatter_reduce_(0, i, s, "amax").clamp(min=-3).amax(),
    "index_add_": lambda n, i, s: torch.zeros(n).index_add_(0, i, s).amax(),
    "index_copy_": lambda n, i, s: torch.zeros(n).index_copy_(0, i, s).amax(),
    "index_fill_": lambda n, i, s: torch.zeros(n).index_fill_(0, i, 1.5).amax(),
    "index_put_": lambda n, i, s: torch.zeros(n).index_put_((i,), s).amax(),
    "put_": lambda n, i, s: torch.zeros(n).put_(i, s).amax(),
    "scatter_add": lambda n, i, s: torch.zeros(n).scatter_add(0, i, s).amax(),
    "one_hot": lambda n, i, s: F.one_hot(i, n).sum(0).amax(),
    "gather": lambda n, i, s: torch.arange(20.0)[:n].gather(0, i).amax(),
    "nll_loss": lambda n, i, s: F.nll_loss(torch.eye(20)[: len(i), :n], i),
    "appended columns": lambda n, i, s: torch.cat([s, s.new_zeros(max(n - 4, 0))]).scatter_add(0, i, s).amax(),
}


def growing(seed: int) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(min(4 + seed, 16), generator=generator)[:4], torch.rand(4, generator=generator)


@pytest.mark.parametrize("name", INTO)
def test_a_larger_index_than_any_before_stays_inside(name: str) -> None:
    step = largest(INTO[name])
    captured = graphs.capture(step, bounds={"n": 16})
    for seed in (*range(8), 11, 3, 14):
        expected = step(*growing(seed))
        torch.testing.assert_close(captured(*growing(seed)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["scatter_reduce_", "index_add_", "index_fill_", "scatter_add"])
def test_one_recording_serves_every_size_below_its_bound(name: str) -> None:
    step = largest(INTO[name])
    graph = rewritten(step, *growing(1), bounds={"n": 16})
    assert all(check(graph, step, *growing(seed)) for seed in range(10))


def test_an_index_behind_the_true_length_is_noticed_though_the_bound_has_room() -> None:
    def step(index: Tensor, source: Tensor, size: Tensor) -> Tensor:
        n = int(size)
        return torch.zeros(n).index_add_(0, index, source).amax()

    graph = rewritten(step, torch.tensor([1, 2]), torch.rand(2), torch.tensor(4), bounds={"n": 16})
    assert check(graph, step, torch.tensor([6, 2]), torch.rand(2), torch.tensor(7))
    assert not check(graph, step, torch.tensor([6, 2]), torch.rand(2), torch.tensor(5))  # which eager refuses
