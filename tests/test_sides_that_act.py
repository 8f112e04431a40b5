"""A side of a branch that the data does not take leaves nothing behind: no output, no exit, no change of an object."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graphs

Tensor = torch.Tensor
Step = Callable[[Tensor, Tensor], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
log: list[str] = []
mode = 0
file = Path()


def leaves(x: Tensor, n: Tensor) -> Tensor:
    if n > 4:
        sys.exit(3)
    return x * 2


def is_interrupted(x: Tensor, n: Tensor) -> Tensor:
    if n > 4:
        raise KeyboardInterrupt
    return x * 2


def writes_a_file(x: Tensor, n: Tensor) -> Tensor:
    if n > 4:
        file.write_text(file.read_text() + "!")
        open(file, "a").close()
    return x * 2


def sets_the_environment(x: Tensor, n: Tensor) -> Tensor:
    if n > 4:
        os.environ["SIDE_OF_A_TEST"] = str(int(os.environ["SIDE_OF_A_TEST"]) + 1)
    return x * 2


def fills_a_global_list(x: Tensor, n: Tensor) -> Tensor:
    if n > 4:
        log.append("!")
    return x * 2


def sets_a_global(x: Tensor, n: Tensor) -> Tensor:
    global mode
    if n > 4:
        mode += 1
    return x * 2


def goes_round_until_it_is_small(x: Tensor, n: Tensor) -> Tensor:
    if n > 4:
        while n > 4:
            n = n - 1
    return x * n


def noted(x: Tensor) -> Tensor:
    """What a side calls by a name that tells nothing."""
    with file.open("a") as opened:
        opened.write("!")
    return x


def counted(x: Tensor) -> Tensor:
    os.environ["SIDE_OF_A_TEST"] = str(int(os.environ["SIDE_OF_A_TEST"]) + 1)
    return x + 1


def calls_what_writes(x: Tensor, n: Tensor) -> Tensor:
    if n > 4:
        x = noted(x) * 3
    return x * 2


def calls_what_writes_in_an_expression(x: Tensor, n: Tensor) -> Tensor:
    return (lambda y: noted(y) * 3)(x) if n > 4 else x * 2


def calls_what_writes_in_a_condition(x: Tensor, n: Tensor) -> Tensor:
    if n > 4 and noted(x).sum() > -1:
        x = x * 3
    return x * 2


def calls_what_sets_the_environment(x: Tensor, n: Tensor) -> Tensor:
    if n > 4:
        x = counted(x)
    return x * 2


def catches_what_stops_it(x: Tensor, n: Tensor) -> Tensor:
    if n > 4:
        try:
            x = noted(x)
        except Exception:
            x = noted(x) * 5
    return x * 2


def left_behind() -> tuple[Any, ...]:
    return list(log), mode, file.read_text(), os.environ["SIDE_OF_A_TEST"]


def outcome(step: Step, n: int) -> Any:
    try:
        return step(torch.ones(1), torch.tensor(n)).item()
    except BaseException as error:
        return repr(error)


STEPS = [
    *(leaves, is_interrupted, writes_a_file, sets_the_environment),
    *(fills_a_global_list, sets_a_global, goes_round_until_it_is_small),
    *(calls_what_writes, calls_what_writes_in_an_expression, calls_what_writes_in_a_condition),
    *(calls_what_sets_the_environment, catches_what_stops_it),
]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_side_acts_when_it_is_taken_and_only_then(
    step: Step, context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def driven(called: Step) -> list[Any]:
        globals().update(log=[], mode=0, file=tmp_path / "log.txt")
        file.write_text("")
        monkeypatch.setenv("SIDE_OF_A_TEST", "0")
        with context():
            return [(outcome(called, n), left_behind()) for n in (3, 2, 1, 5, 2, 6, 3)]

    assert driven(step) == driven(graphs.capture(step))
