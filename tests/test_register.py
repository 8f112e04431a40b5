"""`graphs.register_op`: operators of users, and what `graphs.capture` makes of what is said about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graphs
from graphs import capture_check
from graphs.dispatch.call_log import NotReplayed
from graphs.errors import ConfigError

history: list[Tensor] = []


def kernel(x: Tensor, cache: Tensor) -> Tensor:
    cache.add_(x)
    return cache * 2


def keeping(x: Tensor) -> Tensor:
    if not history:
        history.append(x)
    return history[0] + x


def test_the_operator_does_what_the_function_does() -> None:
    op = graphs.register_op(
        kernel, name="register_tests::kernel", mutates_args=("cache",), fake=lambda x, cache: torch.empty_like(x)
    )
    cache = torch.ones(3)
    assert torch.equal(op(torch.ones(3), cache), torch.full((3,), 4.0)) and cache.tolist() == [2, 2, 2]
    assert "Tensor(a1!) cache" in str(torch.ops.register_tests.kernel.default._schema)
    graphs.capture_check(op, (torch.randn(3), torch.randn(3)))
    compiled = torch.compile(lambda x, cache: op(x, cache) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3), torch.ones(3)), torch.full((3,), 5.0))


def test_as_a_decorator_with_a_name_of_its_own() -> None:
    @graphs.register_op(graph_safe=True)
    def doubled_by_decorator(x: Tensor) -> Tensor:
        return x * 2

    assert doubled_by_decorator(torch.ones(2)).tolist() == [2, 2]
    assert doubled_by_decorator._qualname == f"{__name__.partition('.')[0]}::doubled_by_decorator"


def step_of(op: Any) -> Any:
    return lambda x: op(x) + 1


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_an_operator_declared_unsafe_is_refused_by_name_and_line() -> None:
    op = graphs.register_op(lambda_of(), name="register_tests::unsafe", graph_safe=False)
    step = graphs.capture(step_of(op))
    assert step(torch.ones(2)).tolist() == [3, 3]
    (refusal,) = step.report().refusals
    assert (refusal.reason, refusal.operator) == ("unsafe-operator", "register_tests.unsafe.default")
    assert refusal.file == __file__ and "capture_check" in refusal.remedy
    with pytest.raises(graphs.Refusal, match="unsafe-operator"):
        graphs.capture(step_of(op), strict=True)(torch.ones(2))


def lambda_of() -> Any:
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    return doubled


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were checked, in order."""
    seen = list[str]()

    def check(op: Any, *rest: Any) -> None:
        seen.append(str(op))
        capture_check(op, *rest)

    monkeypatch.setattr("graphs.custom_ops.register.capture_check", check)
    return seen


def test_an_operator_declared_safe_is_recorded_without_the_check(checked: list[str]) -> None:
    op = graphs.register_op(lambda_of(), name="register_tests::vouched", graph_safe=True)
    step = graphs.capture(step_of(op), strict=True)
    for _ in range(3):
        assert step(torch.ones(2)).tolist() == [3, 3]
    assert step.report().replays == 3 and checked == []


def test_by_default_an_operator_is_checked_once_before_it_is_recorded(checked: list[str]) -> None:
    op = graphs.register_op(lambda_of(), name="register_tests::checked")
    for size in (2, 3):
        step = graphs.capture(step_of(op), strict=True)
        for _ in range(3):
            assert step(torch.ones(size)).tolist() == [3] * size
        assert step.report().replays == 3
    assert checked == ["register_tests.checked.default"]


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_what_the_check_finds_is_the_reason_from_then_on() -> None:
    history.clear()
    op = graphs.register_op(keeping, name="register_tests::keeping")
    for _ in range(2):  # the second module finds the verdict of the first
        step = graphs.capture(step_of(op))
        for _ in range(2):
            step(torch.ones(2))
        (refusal,) = step.report().refusals
        assert (refusal.reason, refusal.operator, refusal.count) == ("hidden-state", "register_tests.keeping.default", 2)
        assert refusal.file == __file__ and "mutates_args" in refusal.remedy


def test_a_check_that_the_operator_does_not_survive_is_told() -> None:
    def picky(x: Tensor) -> Tensor:
        if x.data_ptr() not in allowed:
            raise LookupError("not registered with the other rank")
        return x * 2

    x = torch.ones(2)
    allowed = {x.data_ptr()}
    op = graphs.register_op(picky, name="register_tests::picky")
    with pytest.warns(NotReplayed, match=r"not registered with the other rank[\s\S]*graph_safe=True"):
        assert graphs.capture(step_of(op))(x).tolist() == [3, 3]


def scale(x: Tensor, by: float) -> None:
    x.mul_(by)


def test_an_operator_of_cpp_is_made_known() -> None:
    library = torch.library.Library("register_tests_cpp", "DEF")
    library.define("scale_(Tensor(a!) x, float by) -> ()")
    library.impl("scale_", scale, "CPU")
    packet = torch.ops.register_tests_cpp.scale_
    assert graphs.register_op(packet, mutates_args="x", fake=lambda x, by: None, graph_safe=False) is packet
    with pytest.raises(graphs.Refusal, match=r"unsafe-operator.*register_tests_cpp\.scale_"):
        graphs.capture(lambda x: packet(x, 2.0), strict=True)(torch.ones(2))
    with pytest.raises(ConfigError, match=r"mutates_args = \['y'\] is not legal; it must be what its schema says"):
        graphs.register_op(packet, mutates_args="y")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"graph_safe": "maybe"}, "graph_safe = 'maybe' is not legal; it must be one of True, False, 'check'"),
        ({"name": "no namespace"}, "'namespace::name', two identifiers"),
    ],
)
def test_wrong_settings_name_the_legal_ones(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        graphs.register_op(lambda_of(), **settings)
