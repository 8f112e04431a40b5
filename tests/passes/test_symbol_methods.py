"""The classes of torch that tracing changes: only while it lasts, only for its thread, and back whatever happens."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import passes
from passes.core.symbols import SYMBOLS
from passes.tracing.number_builtins import symbolic_builtins
from passes.tracing.symbol_methods import value_methods

NAMES = ("__format__", "__hash__", "__str__", "__repr__")


def methods() -> list[Any]:
    return [vars(kind).get(name) for kind in SYMBOLS for name in NAMES]


def symbol() -> torch.SymInt:
    return ShapeEnv().create_unbacked_symint()


def test_text_of_a_symbol_is_refused_while_a_step_is_traced() -> None:
    known = symbol()
    with value_methods(), pytest.raises(passes.Unremovable, match="text needs the value"):
        f"{known}"
    assert f"{known}".startswith("u")


@pytest.mark.parametrize("write", [str, repr, print, "{0!r}".format, lambda u: "%s" % u])  # noqa: UP031
def test_output_of_a_value_is_refused(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    known = symbol()
    with value_methods(), pytest.raises(passes.Unremovable, match="text needs the value"):
        write(known)
    assert capsys.readouterr().out == ""


def test_methods_are_put_back_when_a_trace_fails() -> None:
    before = methods()
    with pytest.raises(ZeroDivisionError), value_methods():
        assert methods() != before
        raise ZeroDivisionError
    assert methods() == before


def test_another_thread_sees_the_methods_of_torch() -> None:
    seen: list[str] = []
    other = symbol()
    with value_methods():
        thread = threading.Thread(target=lambda: seen.append(f"{other}"))
        thread.start()
        thread.join()
    assert seen == [str(other)]


def printing(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    print("loss", t.item())
    return x * 2


def test_a_step_that_prints_is_refused_by_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    import graphs

    step = graphs.capture(printing)
    with pytest.warns(match="side-effect .*the step writes to a file, a terminal"):
        for value in (3, 4, 5):
            step(torch.ones(2), torch.tensor(value))
    (refusal,) = step.report().refusals
    assert (refusal.line, refusal.count) == (printing.__code__.co_firstlineno + 1, 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["loss 4", "loss 5"] and not any("u0" in line for line in lines)


def test_two_threads_trace_one_after_the_other() -> None:
    before, order = methods(), []
    inside, may_end = threading.Event(), threading.Event()

    def first() -> None:
        with symbolic_builtins([__name__]):
            order.append("first in")
            inside.set()
            may_end.wait(30)
            order.append("first out")

    def second() -> None:
        inside.wait(30)
        with symbolic_builtins([__name__]):
            order.append("second in")
            assert "int" in globals()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    inside.wait(30)
    may_end.set()
    for thread in threads:
        thread.join()
    assert order == ["first in", "first out", "second in"]
    assert methods() == before and "int" not in globals()


def test_a_step_that_hashes_and_formats_leaves_torch_as_it_was() -> None:
    import graphs

    before = methods()
    table = {1: 2.0, 2: 3.0}
    step = graphs.capture(lambda x, t: x * table[t.item()])
    for value in (1, 2, 1):
        assert torch.equal(step(torch.ones(2), torch.tensor(value)), torch.ones(2) * table[value])
    assert methods() == before
