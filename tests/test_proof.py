"""`graphs.rewriting.proof`: a wrong rewriting is refused although the data of the call does not show it."""

from __future__ import annotations

import logging
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphs
from graphs.dispatch.call_log import NotReplayed
from passes.control_flow.branches import TracedBranch
from passes.host_values.rewriter import Rewriter


def branching(x: Tensor, t: Tensor) -> Tensor:
    if t > 0:
        x = x * 2 + 1
    return x - 3


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].sum()


def written(x: Tensor, mask: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[mask] = y[mask] * 2
    return out


def twice(x: Tensor, mask: Tensor) -> Tensor:
    rows = (x > 0).nonzero().squeeze(1)
    return x[rows].amax() if mask.any() else x[x > 0].sum()


def raising(x: Tensor, t: Tensor, picked: Tensor) -> Tensor:
    n = int(t)
    if n > 2:
        x = x + x.new_ones(n)  # of one size alone
    return x


class Cache(torch.nn.Module):
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.ones(4, 3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if t == 0:
            self.rows[1].zero_()
        self.rows[int(t) % 4] += x
        return self.rows.sum(0)


X = torch.tensor([1.0, -2.0, 3.0, 4.0])
MASK = torch.tensor([True, True, True, True])


def first_report(step: Any, *arguments: Tensor) -> graphs.CaptureReport:
    captured = graphs.capture(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        expected = step(*[tensor.clone() for tensor in arguments]) if not isinstance(step, torch.nn.Module) else None
        got = captured(*[tensor.clone() for tensor in arguments])
    assert expected is None or torch.equal(got, expected)
    return captured.report()


def refused_line(report: graphs.CaptureReport) -> tuple[str, str, int]:
    refusal = report.refusals[0]
    return refusal.reason, refusal.file, refusal.line


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_other_outcomes_are_compared_and_counted(context: Any) -> None:
    with context():
        report = first_report(branching, X, torch.tensor(2))
        assert report.keys[0].proved == {"branch": 1} and not report.keys[0].unproved
        report = first_report(masked, X, MASK)
    assert report.keys[0].proved == {"length": 3}
    assert "outcomes forced and compared: 3 length; not comparable: none; left out: 0" in str(report)


def test_a_join_that_takes_the_wrong_side_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TracedBranch, "_joined_tensors", lambda self, a, b: torch.where(torch.ones((), dtype=torch.bool), a, b))
    report = first_report(branching, X, torch.tensor(2))
    line = branching.__code__.co_firstlineno + 1
    assert refused_line(report) == ("verify-mismatch", __file__, line) and report.recordings == 0


def test_a_mask_that_is_dropped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rewriter, "neutral", lambda self, node, fill, dims=None: node)  # nothing is padding in this call
    report = first_report(masked, X, MASK)
    line = masked.__code__.co_firstlineno + 1
    assert refused_line(report) == ("verify-mismatch", __file__, line)


def test_a_write_without_its_condition_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Cache()
    monkeypatch.setattr(
        "passes.host_values.construction.predicated_write", lambda rw, target, args, kwargs: rw.plain(target, *args, **kwargs)
    )
    report = first_report(step, torch.ones(3), torch.tensor(0))
    assert refused_line(report)[0] == "verify-mismatch"
    assert torch.equal(step.rows, torch.ones(3) * torch.tensor([[2.0], [0.0], [1.0], [1.0]]))


def test_the_state_is_as_eager_leaves_it() -> None:
    step, twin = Cache(), Cache()
    captured = graphs.capture(step)
    for t in (0, 1, 0, 2, 3, 0):
        assert torch.equal(captured(torch.ones(3), torch.tensor(t)), twin(torch.ones(3), torch.tensor(t)))
    assert torch.equal(step.rows, twin.rows)
    assert captured.report().keys[0].proved["branch"] == 1


def test_reads_of_one_mask_are_forced_together() -> None:
    report = first_report(written, X, MASK, X + 1)
    assert report.keys[0].proved == {"length": 3}


def test_random_numbers_are_not_drawn_by_a_proof() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        x = x * 2 if t > 0 else x
        return x + torch.rand(4)

    torch.manual_seed(3)
    expected = [step(X, torch.tensor(1)) for _ in range(3)]
    torch.manual_seed(3)
    captured = graphs.capture(step)
    assert all(torch.equal(captured(X.clone(), torch.tensor(1)), value) for value in expected)


def test_a_branch_that_cannot_be_compared_is_assumed() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        n = int(t)
        y = x[:2] * n
        if n > 2:
            y = y + 1
        return y.view(n - n + 2) if n < 3 else y.view(2) * len(range(3 - n + n))

    captured = graphs.capture(step)
    for t in (1, 5, 1, 2, 7):
        assert torch.equal(captured(X.clone(), torch.tensor(t)), step(X, torch.tensor(t)))


def test_what_eager_refuses_proves_nothing_and_is_not_merged() -> None:
    def step(x: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        rows = x[mask]
        if y.sum() > 0:
            rows = rows * 2
        return (rows.view(2, 2) if int(mask.sum()) == 4 else rows[:1].expand(2, 2)).sum(0)

    captured = graphs.capture(step)
    for value in (1.0, -1.0, 1.0, -1.0):
        arguments = X, MASK, torch.full((2,), value)
        assert torch.equal(captured(*[tensor.clone() for tensor in arguments]), step(*arguments))


def test_a_read_that_the_call_did_not_come_to_is_forced_with_the_others() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        if t.item() == 0:
            return x
        return (x / t.item()).round()

    captured = graphs.capture(step)
    for value in (0.0, 2.0, -3.0, 0.0):
        assert torch.equal(captured(X.clone(), torch.tensor(value)), step(X, torch.tensor(value)))
    assert captured.report().recordings == 1 and captured.report().keys[0].proved["branch"] >= 1


class _Registry(dict[str, int]):
    """A dictionary with a lookup of its own, as libraries have them."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(str(key), default)


_REGISTRY, _ACTIVE = _Registry(), ContextVar[int]("active", default=0)


def as_a_library_does(x: Tensor, t: Tensor) -> Tensor:
    warnings.warn("an argument of this call is deprecated", FutureWarning, stacklevel=2)
    token = _ACTIVE.set(1)
    try:
        if t > _REGISTRY.get(1, 0):
            x = x * 2 + _ACTIVE.get()
        return x - 3
    finally:
        _ACTIVE.reset(token)


def test_what_libraries_do_around_a_step_does_not_keep_it_from_being_proved() -> None:
    captured = graphs.capture(as_a_library_does)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for t in (1, -1, 1):
            assert torch.equal(captured(X.clone(), torch.tensor(t)), branching(X, torch.tensor(t)))
    report = captured.report()
    assert report.recordings == 1 and report.keys[0].proved == {"branch": 1} and not report.keys[0].unproved


def test_a_handler_of_logs_that_writes_stops_no_side(tmp_path: Path) -> None:
    """Torch logs while it traces, and whoever listens writes: that is not done by the side that is traced."""
    logger, handler = logging.getLogger("torch.__trace"), logging.FileHandler(tmp_path / "log.txt")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        report = first_report(branching, X, torch.tensor(1))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert report.recordings == 1 and report.keys[0].proved == {"branch": 1}


def test_outcomes_of_computed_fractions_are_forced() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        a = t.item()
        if a > 0.5 and a * 2 < 20.5:
            x = x + a
        elif a != a:
            x = x * 0
        return x

    captured = graphs.capture(step)
    for value in (0.0, 4.0, float("nan"), 11.0, 0.5, float("inf")):
        assert torch.equal(captured(X.clone(), torch.tensor(value)), step(X, torch.tensor(value)))
    report = captured.report()
    assert report.recordings == 1 and report.keys[0].proved["branch"] == 3
