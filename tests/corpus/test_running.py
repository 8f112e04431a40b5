"""The harness of the corpus finds wrong results, waiting replays and refusals that are expected and do not come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs
from tests.corpus import running
from tests.corpus.case import RECORDED, STEPS, Case, number
from tests.corpus.running import check, outcomes, unexecuted_lines, watching

Tensor = torch.Tensor


class Pretended:
    """A captured step that claims ``replays`` and does ``call``."""

    def __init__(self, call: Callable[..., Any], replays: int = STEPS) -> None:
        self.call, self.replays = call, replays

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def report(self) -> graphs.CaptureReport:
        return graphs.CaptureReport("cpu", "graph", 1, self.replays, 0, (), ())


def scaled(x: Tensor) -> Tensor:
    return x * 2


def branches(x: Tensor) -> Tensor:
    if x > 100:
        return x + 1
    return x - 1


CASE = Case(scaled, lambda i: (number(i),))


@pytest.mark.parametrize(
    ("call", "replays", "expect", "message"),
    [
        (scaled, STEPS, RECORDED, None),
        (lambda x: x * 2 + 1e-6, STEPS, RECORDED, "output of step 0"),
        (lambda x: x.mul_(2), STEPS, RECORDED, "arguments of step 0"),
        (lambda x: torch.full_like(x, x.item() * 2), STEPS, RECORDED, "waits for the device"),
        (scaled, STEPS - 1, RECORDED, "19 replay"),
        (scaled, 0, "host-sync", "no refusal"),
    ],
)
def test_what_is_not_as_expected_fails(
    monkeypatch: pytest.MonkeyPatch, call: Any, replays: int, expect: str, message: str | None
) -> None:
    monkeypatch.setattr(running, "capture", lambda case, step: Pretended(call, replays))
    case = Case(scaled, CASE.inputs, expect)
    if message is None:
        check(case, "cpu")
    else:
        with pytest.raises(AssertionError, match=message):
            check(case, "cpu")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: bool(x.sum() > 0),
        lambda x: f"{x.sum()}",
        lambda x: repr(x),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1.0)[x.nonzero()],
        lambda x: x.unique(),
        lambda x: x.repeat_interleave((x > 0).long()),
        lambda x: x.long().abs().bincount(),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: list(range(x.long().abs().amax())),
    ],
)
def test_waiting_is_seen(wait: Callable[[Tensor], Any]) -> None:
    with watching() as seen:
        wait(torch.tensor([1.0, -2.0]))
    assert seen.waits


def test_device_work_does_not_count_as_waiting() -> None:
    with watching() as seen:
        x = torch.randn(3)
        x.index_select(0, x.argmax().view(1))
        x.repeat_interleave(torch.tensor([1, 1, 1]), output_size=3)
        x.index_put_((torch.tensor([0]),), torch.ones(1))
    assert seen.waits == []


def test_lines_that_no_step_reaches_are_named() -> None:
    (line,) = unexecuted_lines(Case(branches, lambda i: (number(i),)))
    assert line == f"branches:{branches.__code__.co_firstlineno + 2}"


def test_outcomes_hold_what_the_host_learns() -> None:
    told = Case(lambda x: x * x.item(), lambda i: (number(i),))
    assert len(set(outcomes(told))) > 5 and len(set(outcomes(CASE))) == 1
