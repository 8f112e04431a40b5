"""Candidates that round elsewhere are accepted, faults are refused, and a refusal shows both errors."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.first_call import candidates
from graphs.numerics import tolerance
from graphs.numerics.judge import Rerun, candidate_difference, difference, measure
from graphs.state.regions import whole_region
from graphs.state.tensor_state import Left, TensorState
from tests.models.rounding import CACHE, FAULTS, VOCABULARY, Decoder, Reordered, unrounded

Tensor = torch.Tensor
BF16 = torch.bfloat16
SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([BF16, torch.float16, torch.float32])


class Case:
    """A step of a random decoder, what eager makes of it, and the verdict on others."""

    def __init__(self, seed: int, **sizes: Any) -> None:
        torch.manual_seed(seed)
        self.model = Decoder(**sizes)
        self.arguments = (torch.randint(VOCABULARY, (3,)), torch.tensor([CACHE, CACHE, CACHE + 1]))
        self._start = self.model.cache.clone()
        self._written = TensorState()
        self._written.save(self.model.cache)
        self.expected, self.state = [self._run()], self._written.copies()

    def _run(self) -> Tensor:
        with torch.no_grad():
            return self.model(*self.arguments)

    def verdict(self, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[str, str] | None:
        """On the logits and the cache that ``run`` gives, starting from the state before the step."""
        self._restore()
        with torch.no_grad():
            logits, cache = run()
            self.model.cache.copy_(cache)
        return candidate_difference(self.expected, [logits.to(self.model.cache.dtype)], self.state, self.rerun)

    @property
    def rerun(self) -> Rerun:
        return Rerun(self._restore, lambda: [self._run()], self._written)

    def _restore(self) -> None:
        with torch.no_grad():
            self.model.cache.copy_(self._start)

    def of(self, model: Decoder, *arguments: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (model(*(arguments or self.arguments)), model.cache)

    def reordered(self, kind: str) -> tuple[Tensor, Tensor]:
        with Reordered(kind):
            return self.model(*self.arguments), self.model.cache


@settings(max_examples=25, deadline=None)
@given(SEEDS, DTYPES, st.booleans(), st.sampled_from(["permuted", "split", "unfused", "unrounded"]))
def test_what_rounds_elsewhere_is_accepted(seed: int, dtype: torch.dtype, experts: bool, kind: str) -> None:
    case = Case(seed, dtype=dtype, experts=experts)
    run = (lambda: case.reordered(kind)) if kind != "unrounded" else lambda: case.of(unrounded(case.model))()
    assert case.verdict(run) is None


@settings(max_examples=30, deadline=None)
@given(SEEDS, DTYPES, st.sampled_from([*FAULTS, "stale ids", "stale position"]))
def test_faults_are_refused(seed: int, dtype: torch.dtype, fault: str) -> None:
    case = Case(seed, dtype=dtype, experts=fault == "expert")
    ids, position = case.arguments
    wrong = copy.deepcopy(case.model)
    wrong.cache.copy_(case._start)
    if fault.startswith("stale"):
        arguments = ((ids + 1) % VOCABULARY, position) if fault == "stale ids" else (ids, position - 1)
    else:
        arguments = (ids, position)
        with torch.no_grad():
            FAULTS[fault](wrong)
    refused = case.verdict(case.of(wrong, *arguments))
    assert refused is not None


def test_a_fault_that_the_tolerance_lets_pass_is_refused() -> None:
    case = Case(5, width=128)
    wrong = copy.deepcopy(case.model)
    wrong.cache.copy_(case._start)
    FAULTS["mask"](wrong)
    with torch.no_grad():
        logits = wrong(*case.arguments)
    tolerance_factor, left = tolerance.OTHER_KERNELS, Left([wrong.cache], [whole_region(wrong.cache)])
    assert tolerance.run_difference(case.expected, [logits], case.state, left, tolerance_factor=tolerance_factor) is None
    refused = case.verdict(lambda: (logits, wrong.cache))
    assert refused is not None and "against a run in float64" in refused[1]


NOISE = torch.Generator().manual_seed(0)


def rounded(shape: tuple[int, ...], error: float = 0.02) -> tuple[Tensor, Tensor, Tensor]:
    """Eager, a right candidate and float64."""
    precise = torch.randn(shape, generator=NOISE, dtype=torch.float64)
    eager, candidate = ((precise + error * torch.randn(shape, generator=NOISE)).to(BF16) for _ in range(2))
    return eager, candidate, precise


@pytest.mark.parametrize("shape", [(4, 32000), (2, 4, 256, 64), (128000,), (50000, 2), (17,), (40, 1)])
def test_a_wrong_row_column_or_element_of_a_large_output_is_not_diluted(shape: tuple[int, ...]) -> None:
    eager, candidate, precise = rounded(shape)
    assert not difference(eager, candidate, precise)
    for dim in range(len(shape)):
        if shape[dim] > 2 and math.prod(shape) > shape[dim]:
            wrong = candidate.clone()
            wrong.select(dim, 1).copy_(candidate.select(dim, 2))
            found = measure(eager, wrong, precise)
            assert found.ratio > 1, dim
            assert found.index[dim] == 1
    wrong = candidate.clone()
    place = tuple(size // 2 for size in shape)
    wrong[place] += 1
    found = measure(eager, wrong, precise)
    assert found.ratio > 1 and found.index == place
    assert f"worst at {list(place)}" in difference(eager, wrong, precise)


def test_a_bias_too_small_for_any_element_is_seen_in_the_whole() -> None:
    eager, candidate, precise = rounded((64, 1000))
    assert difference(eager, (candidate.float() + 0.06).to(BF16), precise)


def test_what_eager_does_not_write_must_not_be_written() -> None:
    cache = torch.randn(2, 4, 64, 16, generator=NOISE).to(BF16)
    precise = cache.double()
    eager, candidate, precise[:, :, 7] = cache.clone(), cache.clone(), torch.randn(2, 4, 16, generator=NOISE)
    eager[:, :, 7] = (precise[:, :, 7] + 0.05 * torch.randn(2, 4, 16, generator=NOISE)).to(BF16)
    candidate[:, :, 7] = (precise[:, :, 7] + 0.05 * torch.randn(2, 4, 16, generator=NOISE)).to(BF16)
    assert not difference(eager, candidate, precise)
    candidate[1, 2, 8] *= 1.05
    assert difference(eager, candidate, precise)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_numbers_stand_where_eager_has_them(value: float) -> None:
    eager, candidate, precise = rounded((8, 16))
    candidate[3, 5] = value
    assert "not finite" in difference(eager, candidate, precise)
    eager[3, 5] = precise[3, 5] = value
    assert not difference(eager, candidate, precise)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_whole_numbers_agree_exactly(dtype: torch.dtype) -> None:
    eager = torch.arange(6).to(dtype)
    assert not difference(eager, eager.clone(), eager)
    assert difference(eager, eager.roll(1), eager)


def judged(step: Callable[..., Any], candidate: Sequence[Tensor], *args: Tensor) -> Any:
    written = TensorState()
    with torch.no_grad():
        expected = [out.clone() for out in step(*args)]
    rerun = Rerun(lambda: None, lambda: step(*args), written)
    with torch.no_grad():
        return candidate_difference(expected, list(candidate), [], rerun)


def test_a_tie_may_be_broken_either_way_and_nothing_else_may() -> None:
    torch.manual_seed(0)
    router, experts = torch.randn(32, 8), torch.randn(8, 32, 32) / 6
    x = torch.randn(5, 32)
    router[:, 5] = router[:, 2] + 1e-3 * torch.randn(32)  # these two are told apart by rounding
    router, experts, x = router.to(BF16), experts.to(BF16), x.to(BF16)

    def step(x: Tensor, turn: Callable[[Tensor], Tensor] = lambda chosen: chosen) -> list[Tensor]:
        chosen = turn((x @ router).topk(1, -1).indices.squeeze(-1))
        return [torch.bmm(x.unsqueeze(1), experts[chosen]).squeeze(1), chosen]

    chosen = step(x)[1]
    assert int(((chosen == 2) | (chosen == 5)).sum()) > 0
    turned = step(x, lambda chosen: torch.where(chosen == 2, 5, torch.where(chosen == 5, 2, chosen)))
    assert judged(step, turned, x) is None
    assert judged(step, step(x, lambda chosen: (chosen + 1) % 8), x) is not None
    wrong = [turned[0].clone(), turned[1]]
    wrong[0][0] = turned[0][1]
    assert judged(step, wrong, x) is not None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_second_and_third_that_a_choice_left_may_be_taken_too(rank: int, masked: bool) -> None:
    torch.manual_seed(0)
    rows = 3
    x, columns = torch.randn(rows, 64), torch.randn(64, 512) / 8
    alike = torch.tensor([10, 20, 30, 40])
    columns[:, alike] = x.sum(0)[:, None] / 3  # ahead of all others
    columns[torch.arange(4), alike] *= 1.01  # and told apart by rounding
    x, columns = x.to(BF16), columns.to(BF16)

    def step(x: Tensor) -> list[Tensor]:
        scores = (x @ columns).float()
        return [scores.masked_fill(scores < 5, -torch.inf).argmax(-1) if masked else scores.argmax(-1)]

    exact = (x.double() @ columns.double())[:, alike]
    order = alike[exact.argsort(-1, descending=True)]
    taken = step(x)[0]
    assert all(int(token) in order[row] for row, token in enumerate(taken))
    others = torch.stack([order[row][order[row] != taken[row]][rank - 1] for row in range(rows)])
    assert judged(step, [others], x) is None
    assert judged(step, [torch.where(torch.arange(rows) == 1, 7, taken)], x) is not None


CHOICES: dict[str, Callable[[Tensor], Any]] = {
    "topk": lambda scores: scores.topk(4, -1).indices,
    "topk with its values": lambda scores: scores.topk(4, -1),
    "topk of the least": lambda scores: scores.topk(4, -1, largest=False),
    "topk along another dimension": lambda scores: scores.t().topk(4, 0).indices,
    "argmin": lambda scores: scores.argmin(-1),
    "min": lambda scores: scores.min(-1),
    "argmax of all": lambda scores: scores.argmax(),
}


@pytest.mark.parametrize("kind", sorted(CHOICES))
def test_products_that_are_summed_in_two_halves_choose_as_well(kind: str) -> None:
    """As a library splits a product; what differs from eager in its numbers or in their order is no mistake."""
    differed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        x, columns = torch.randn(4, 64).to(BF16), torch.randn(64, 2000).to(BF16)

        def step(x: Tensor, columns: Tensor = columns) -> list[Tensor]:
            found = CHOICES[kind](x @ columns)
            return [found] if isinstance(found, Tensor) else list(found)

        halves = [(x[:, part].float() @ columns[part].float()).to(BF16) for part in (slice(0, 32), slice(32, 64))]
        found = CHOICES[kind](halves[0] + halves[1])
        candidate = [found] if isinstance(found, Tensor) else list(found)
        differed += not torch.equal(candidate[-1], step(x)[-1])
        assert judged(step, candidate, x) is None, seed
        wrong = [*candidate[:-1], (candidate[-1] + 1) % 2000]
        assert judged(step, wrong, x) is not None, seed
    assert differed or kind in ("argmax of all", "min", "topk along another dimension", "topk of the least")


@pytest.mark.parametrize("seed", range(20))
def test_a_single_number_is_not_judged_by_the_luck_of_eager(seed: int) -> None:
    torch.manual_seed(seed)
    layers, x = [(torch.randn(32, 32) / 5).to(BF16) for _ in range(6)], torch.randn(8, 32).to(BF16)

    def step(x: Tensor) -> list[Tensor]:
        for layer in layers:
            x = torch.nn.functional.silu(x @ layer) + x
        return [x.float().square().mean()]

    with torch.no_grad(), Reordered("split"):
        candidate = [step(x)[0].clone()]
    candidate[0] *= 1 + 2e-3 * (-1) ** seed  # beyond the tolerance of float32, within the rounding of bfloat16
    assert judged(step, candidate, x) is None
    assert judged(step, [candidate[0] * 1.1], x) is not None


def test_without_a_run_in_float64_the_tolerance_decides_and_the_refusal_says_so() -> None:
    def step(x: Tensor) -> list[Tensor]:
        return [torch.normal(x.exp(), 0.0)]

    x = torch.randn(64, generator=NOISE).to(BF16)
    right = step(x)[0]
    assert judged(step, [right * 1.05], x) is None
    refused = judged(step, [right * 1.5], x)
    assert refused is not None and "by tolerance, since aten.normal.Tensor_float does not run in float64" in refused[1]


def test_where_eager_is_mostly_rounding_its_error_accepts_nothing() -> None:
    layers, x = [(2.5 * torch.randn(64, 64, generator=NOISE) / 8).to(BF16) for _ in range(40)], torch.randn(4, 64).to(BF16)

    def step(x: Tensor) -> list[Tensor]:
        for layer in layers:
            x = torch.tanh(x @ layer)
        return [x]

    right = step(x)[0]
    refused = judged(step, [right.roll(1, 0)], x)
    assert refused is not None and "of what it computes" in refused[1]


class Deep(nn.Module):
    """Enough layers in bfloat16 for rounding to exceed any elementwise tolerance somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(24))
        self.head = nn.Linear(64, 8000, bias=False)
        for layer in [*self.layers, self.head]:
            nn.init.normal_(layer.weight, std=1.8 / 8)
        self.to(BF16)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        yield


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, autocast])
@pytest.mark.parametrize("fault", [False, True])
def test_a_substitute_is_judged_by_eager_s_own_error(context: Any, fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unrounded:
        """Stands for what a compiler makes of the model: float32 inside."""

        seconds = 0.0
        changes = ()

        def __init__(self, model: Any, *_: Any, **__: Any) -> None:
            self.model = model
            self.twin = copy.deepcopy(model).float()

        def __call__(self, x: Tensor) -> Tensor:
            self.model.count.add_(1)
            with torch.autocast("cpu", enabled=False):
                y = self.twin(x.float()).to(BF16)
            if fault:
                y[:, 77] = y[:, 78]
            return y

    monkeypatch.setattr(candidates, "CompiledModel", Unrounded)
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(4, 64).to(BF16)
    if context is autocast:
        model, x = model.float(), x.float()
    step = graphs.capture(model, compiler="inductor")
    with context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        wanted, count = model(x), int(model.count)
        got = step(x)
    assert int(model.count) == count + 1
    assert float((got.float() - wanted.float()).abs().max()) < 0.5 * float(wanted.float().abs().max())
    report = step.report()
    assert report.keys[0].compiler == ("none" if fault else "inductor"), str(report)
    assert [refusal.reason for refusal in report.refusals] == ["verify-mismatch"] * fault
    if fault:
        assert "against a run in float64" in report.refusals[0].detail and "77]" in report.refusals[0].detail
