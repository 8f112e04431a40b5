"""Outputs: which parts are one object, what hangs on tensors, and what no replay can hand out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree

import graphs
from graphs.dispatch.call_log import NotReplayed

Tensor = torch.Tensor
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


@dataclass
class Both:
    """An output that is a dataclass."""

    left: Any
    right: Any


def pattern(value: Any, seen: dict[int, int] | None = None) -> Any:
    """An output with each object as the number of the object that it is."""
    seen = {} if seen is None else seen
    number = seen.setdefault(id(value), len(seen))
    parts = [value.left, value.right] if isinstance(value, Both) else value
    if isinstance(parts, dict):
        return number, {key: pattern(item, seen) for key, item in parts.items()}
    if isinstance(parts, (list, tuple)):
        return number, [pattern(item, seen) for item in parts]
    return number, parts.tolist() if isinstance(parts, Tensor) else parts


def tensor_and_view(x: Tensor) -> Any:
    a = x * 2
    return a, a[1:], a


def view_twice(x: Tensor) -> Any:
    a = (x * 2)[1:]
    return a, a


def view_of_an_argument_twice(x: Tensor) -> Any:
    a = x[1:]
    return a, a, x


def conjugated_twice(x: Tensor) -> Any:
    a = (x * 1j).conj()
    return a, a, a[1:]


def list_twice(x: Tensor) -> Any:
    a = [x * 2]
    return a, a


def dict_in_a_list(x: Tensor) -> Any:
    a = {"x": x * 2, "y": x * 3}
    return [a, {"a": a}, Both(a, x)]


def record_twice(x: Tensor) -> Any:
    a = Both(x * 2, [1])
    return {"a": a, "b": [a, a.right]}


def equal_and_apart(x: Tensor) -> Any:
    return [x * 2], [x * 2], [], []


def argument_twice(x: Tensor) -> Any:
    return x, [x, x * 2]


IDENTITIES = [
    *(tensor_and_view, view_twice, view_of_an_argument_twice, conjugated_twice, list_twice, dict_in_a_list, record_twice),
    *(equal_and_apart, argument_twice),
]


@contexts
@pytest.mark.parametrize("step", IDENTITIES)
def test_what_is_one_object_stays_one(step: Callable[[Tensor], Any], context: Any) -> None:
    captured = graphs.capture(step)
    with context():
        kept = []
        for seed in range(4):
            x = torch.arange(4.0) + seed
            kept.append(captured(x))
            assert repr(pattern(kept[-1])) == repr(pattern(step(x)))
        held = [id(part) for output in kept for part in output if isinstance(output, tuple) and isinstance(part, list)]
        assert len({*held}) == len(held) or step is list_twice, "an output is another's"
    assert captured.report().replays == 4, str(captured.report())


def list_twice_by_data(x: Tensor) -> Any:
    a = [x * 2 if x.sum() > 0 else x * 3]
    return a, a


def test_one_object_stays_one_in_a_rewritten_step() -> None:
    captured = graphs.capture(list_twice_by_data)
    with torch.no_grad():
        for seed in range(4):
            x = torch.arange(4.0) - 3 * (seed % 2)
            assert repr(pattern(captured(x))) == repr(pattern(list_twice_by_data(x)))
    assert captured.report().replays == 4, str(captured.report())


def tagged(x: Tensor) -> Any:
    y = x * 2
    y.tag = ["t", 1]  # type: ignore[attr-defined]
    return y


def tagged_view(x: Tensor) -> Any:
    y = x[1:]
    y.tag = ["t", 1]  # type: ignore[attr-defined]
    return y


def tagged_alias(x: Tensor) -> Any:
    y = x.view_as(x)
    y.tag = ["t", 1]  # type: ignore[attr-defined]
    return y


def tagged_part(x: Tensor) -> Any:
    y = x * 2
    y.tag = ["t", 1]  # type: ignore[attr-defined]
    return y, y[1:]


@contexts
@pytest.mark.parametrize("step", [tagged, tagged_view, tagged_alias, tagged_part])
def test_constants_that_hang_on_outputs_are_kept(step: Callable[[Tensor], Any], context: Any) -> None:
    captured = graphs.capture(step)
    with context():
        for seed in range(4):
            output = captured(torch.arange(4.0) + seed)
            first = output[0] if isinstance(output, tuple) else output
            assert first.tag == ["t", 1]
            first.tag.append(2)
            assert not isinstance(output, tuple) or not hasattr(output[1], "tag")
    assert captured.report().replays == 4, str(captured.report())


def tensor_hangs(x: Tensor) -> Any:
    y = x * 2
    y.extra = x * 3  # type: ignore[attr-defined]
    return y


def holds_itself(x: Tensor) -> Any:
    a: list[Any] = [x * 2]
    a.append(a)
    return a


def dict_holds_itself(x: Tensor) -> Any:
    a: dict[str, Any] = {"x": x * 2}
    a["a"] = (a,)
    return a


def sparse(x: Tensor) -> Any:
    return x.to_sparse(), x * 2


def with_gradient(x: Tensor) -> Any:
    with torch.inference_mode(False), torch.enable_grad():
        return torch.ones(4, requires_grad=True) * 2, x * 2


def tagged_by_data(x: Tensor) -> Any:
    y = x * 2 if x.sum() > 0 else x * 3
    y.tag = "t"  # type: ignore[attr-defined]
    return y


REFUSED = [
    *((tensor_hangs, "unsupported-output"), (holds_itself, "unsupported-output"), (dict_holds_itself, "unsupported-output")),
    *((sparse, "unsupported-output"), (with_gradient, "autograd"), (tagged_by_data, "unsupported-output")),
]


@contexts
@pytest.mark.parametrize(("step", "reason"), REFUSED)
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_what_no_replay_can_hand_out_is_refused_by_name(step: Callable[[Tensor], Any], reason: str, context: Any) -> None:
    captured = graphs.capture(step)
    with context():
        for seed in range(3):
            output, wanted = captured(torch.arange(4.0) + seed), step(torch.arange(4.0) + seed)
            assert type(output) is type(wanted)
            if step is with_gradient:
                assert output[0].requires_grad and output[0].grad_fn is not None
            if step is tensor_hangs:
                assert torch.equal(output.extra, wanted.extra)
    assert reason in {refusal.reason for refusal in captured.report().refusals}, str(captured.report())
    assert captured.report().replays == 0


class Picky:
    """A container of the user's that is registered with pytree, and may refuse to be made."""

    refusing = False

    def __init__(self, value: Any) -> None:
        if Picky.refusing:
            raise ValueError("not now")
        self.value = value


_pytree.register_pytree_node(Picky, lambda p: ([p.value], None), lambda children, _: Picky(children[0]))


class Counting(nn.Module):
    """Writes, and returns a container of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.total.add_(1)
        return Picky(x + self.total)


def test_a_container_that_refuses_to_be_made_does_not_run_the_step_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting()
    step = graphs.capture(model)
    with torch.no_grad():
        for _ in range(2):
            step(torch.ones(2))
        monkeypatch.setattr(Picky, "refusing", True)
        with pytest.raises(ValueError, match="not now"):
            step(torch.ones(2))
        monkeypatch.setattr(Picky, "refusing", False)
        assert step(torch.ones(2)).value.tolist() == [5, 5] and float(model.total) == 4


class Fickle:
    """A container that cannot be put together again from its parts."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _never(children: Any, context: Any) -> Any:
    raise TypeError("made by nobody but the step")


_pytree.register_pytree_node(Fickle, lambda p: ([p.value], None), _never)


def test_a_container_that_cannot_be_made_again_is_refused_by_name() -> None:
    total = torch.zeros(())

    def step(x: Tensor) -> Any:
        total.add_(1)
        return Fickle(x + total)

    captured = graphs.capture(step)
    with torch.no_grad(), pytest.warns(NotReplayed, match="unsupported-output"):
        for call in range(1, 5):
            assert captured(torch.ones(2)).value.tolist() == [1 + call, 1 + call]
    assert {refusal.reason for refusal in captured.report().refusals} == {"unsupported-output"}
