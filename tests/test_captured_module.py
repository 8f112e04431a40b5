"""What `capture` returns for an ``nn.Module`` is one: in a parent, in state dicts, with hooks, copied and pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphs

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Loaded(nn.Linear):
    """A model with methods of its own where ``nn.Module`` has some."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.trained: list[bool] = []

    def train(self, mode: bool = True) -> Loaded:
        self.trained.append(mode)
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}w" in state_dict:  # the name in an older version
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}w")
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]


def halved(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output / 2


def test_a_captured_module_is_a_module_and_a_captured_function_is_none() -> None:
    assert isinstance(graphs.capture(nn.Linear(4, 4)), nn.Module)
    step = graphs.capture(torch.relu)
    assert isinstance(step, graphs.CapturedStep) and not isinstance(step, nn.Module)
    assert not hasattr(step, "state_dict")


def test_a_parent_has_the_parameters_under_the_names_that_the_model_gives_them() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    parent, plain = nn.Sequential(graphs.capture(inner), nn.ReLU()), nn.Sequential(inner, nn.ReLU())
    assert list(parent.state_dict()) == list(plain.state_dict())
    assert parent.state_dict()._metadata == plain.state_dict()._metadata
    assert [*map(id, parent.parameters())] == [*map(id, plain.parameters())]
    assert [name for name, _ in parent.named_buffers()] == [name for name, _ in plain.named_buffers()]
    walked = {name: id(module) for name, module in parent[0].named_modules(prefix="0")}
    assert walked == {name: id(module) for name, module in inner.named_modules(prefix="0")}
    assert [name for name, _ in parent.named_modules()] == ["", *walked, "1"]
    assert parent.get_submodule("0.1") is inner[1]
    assert parent[0].training is True


def test_a_parent_calls_the_step_which_replays() -> None:
    step = graphs.capture(nn.Linear(4, 4))
    parent = nn.Sequential(step, nn.ReLU())
    for _ in range(3):
        assert torch.equal(parent(X), step._graphs_model(X).relu())
    assert step.report().replays == 3


def test_a_layer_that_is_captured_in_place_keeps_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    expected, names = model(X), list(model.state_dict())
    model[0] = graphs.capture(model[0])
    for _ in range(2):
        assert torch.equal(model(X), expected)
    assert list(model.state_dict()) == names and model[0].report().replays == 2


def test_weights_are_loaded_through_a_parent_by_the_models_own_method() -> None:
    step = graphs.capture(Loaded())
    parent = nn.Sequential(step)
    parent(X)
    state = {"0.w": torch.eye(4), "0.bias": torch.zeros(4)}
    assert parent.load_state_dict(state).missing_keys == []
    torch.testing.assert_close(parent(X), X)
    assert step.report().replays == 2


def test_what_a_parent_does_to_its_children_reaches_the_model() -> None:
    model = Loaded()
    parent, seen = nn.Sequential(graphs.capture(model)), list[type]()
    parent(X)
    parent.eval().apply(lambda module: seen.append(type(module)))
    assert model.trained == [False] and not model.training and not parent[0].training
    assert seen == [Loaded, nn.Sequential]
    parent.double().requires_grad_(False)
    assert model.weight.dtype == torch.float64 and not model.weight.requires_grad
    assert torch.equal(parent(X.double()), model(X.double()))


def test_a_captured_module_in_a_captured_parent_is_recorded_with_it() -> None:
    step = graphs.capture(nn.Linear(4, 4))
    outer = graphs.capture(nn.Sequential(step, nn.ReLU()))
    for _ in range(3):
        assert torch.equal(outer(X), step._graphs_model(X).relu())
    assert (outer.report().replays, step.report().replays) == (3, 0)


def test_a_captured_method_takes_the_place_of_forward() -> None:
    model = nn.Linear(4, 4)
    expected = model(X)
    model.forward = step = graphs.capture(model.forward)  # type: ignore[method-assign, assignment]
    for _ in range(2):
        assert torch.equal(model(X), expected)
    assert step.report().replays == 2 and "forward" not in dict(model.named_modules())


def test_a_hook_of_the_step_is_called_at_each_replay_and_changes_the_output() -> None:
    step, seen = graphs.capture(nn.Linear(4, 4)), list[tuple[nn.Module, int]]()
    plain = step(X)
    counting = step.register_forward_hook(lambda module, args, output: seen.append((module, len(args))))
    halving = step.register_forward_hook(halved)
    for _ in range(2):
        assert torch.equal(step(X), plain / 2)
    assert seen == [(step, 1)] * 2 and step.report().replays == 3 and step.report().recordings == 1
    counting.remove()
    halving.remove()
    assert torch.equal(step(X), plain) and len(seen) == 2


def test_a_pre_hook_of_the_step_changes_the_arguments() -> None:
    step = graphs.capture(nn.Linear(4, 4))
    plain = step(X)
    step.register_forward_pre_hook(lambda module, args: args[0] * 0)
    step.register_forward_pre_hook(lambda module, args, kwargs: ((), {"input": args[0] + X}), with_kwargs=True)
    assert torch.equal(step(X), plain)
    step.register_forward_pre_hook(lambda module, args, kwargs: args, with_kwargs=True)
    with pytest.raises(RuntimeError, match="must return None or"):
        step(X)


def test_hooks_of_the_step_run_in_the_order_asked_for_and_in_eager_mode() -> None:
    step, order = graphs.capture(nn.Linear(4, 4), mode="eager"), list[str]()
    step.register_forward_hook(lambda *_: order.append("second"))
    step.register_forward_hook(lambda *_: order.append("first"), prepend=True)
    step.register_forward_hook(lambda module, args, kwargs, output: order.append(f"{[*kwargs]}"), with_kwargs=True)
    step(input=X)
    step.mode = "graph"
    step(input=X)
    assert order == ["first", "second", "['input']"] * 2


def raising(module: nn.Module, args: Any) -> None:
    raise ValueError("by the hook")


@pytest.mark.parametrize("where", ["pre-hook", "model", "hook"])
def test_a_hook_that_is_always_called_is_called_when_something_raises(where: str) -> None:
    step, seen = graphs.capture(nn.Linear(4, 4)), list[Any]()
    if where == "pre-hook":
        step.register_forward_pre_hook(raising)
    if where == "hook":
        step.register_forward_hook(lambda module, args, output: raising(module, args))
    step.register_forward_hook(lambda module, args, output: seen.append(output), always_call=True)
    with pytest.raises((ValueError, RuntimeError)):
        step(X[:, :3] if where == "model" else X)
    assert len(seen) == 1 and (seen[0] is None) == (where != "hook")


def test_a_hook_of_the_model_is_part_of_the_step() -> None:
    model = nn.Linear(4, 4)
    step = graphs.capture(model)
    plain = step(X)
    model.register_forward_hook(halved)
    with pytest.warns(UserWarning, match="recorded anew"):
        assert torch.equal(step(X), plain / 2)
    assert torch.equal(step(X), plain / 2) and step.report().replays == 3


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_hook_inside_that_keeps_something_is_called_at_each_step() -> None:
    model, kept = nn.Sequential(nn.Linear(4, 4)), list[Tensor]()
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    step = graphs.capture(model)
    for count in range(1, 4):
        assert torch.equal(step(X), kept[-1]) and len(kept) == count
    assert step.report().replays == 0


def test_a_global_hook_is_called_once_for_the_model() -> None:
    model = nn.Linear(4, 4)
    step = graphs.capture(model)
    expected = model(X) / 2
    handle = nn.modules.module.register_module_forward_hook(halved)
    try:
        for _ in range(2):
            assert torch.equal(step(X), expected)
    finally:
        handle.remove()


def test_backward_hooks_are_the_models() -> None:
    model = nn.Linear(4, 4)
    step = graphs.capture(model)
    step.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert len(model._backward_hooks) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_weights_the_settings_and_the_hooks(copied: Callable[[Any], Any]) -> None:
    step = graphs.capture(nn.Linear(4, 4), outputs="borrowed", name="copied")
    step.register_forward_hook(halved)
    expected = step(X).clone()
    twin = copied(nn.Sequential(step))[0]
    assert type(twin) is graphs.CapturedModule and twin.weight is not step.weight
    for _ in range(2):
        assert torch.equal(twin(X), expected)
    assert twin.report().replays == 2 and step.report().replays == 1
    twin.weight.zero_()
    assert not torch.equal(twin(X), expected) and torch.equal(step(X), expected)
    assert step.report().refusals == ()  # what copying leaves in a class, ``__slotnames__``, is no change of the step


def test_a_copy_has_hooks_of_its_own() -> None:
    step = graphs.capture(nn.Linear(4, 4), mode="eager")
    twin, plain = copy.deepcopy(step), step(X)
    twin.register_forward_hook(halved)
    assert torch.equal(step(X), plain) and torch.equal(twin(X), plain / 2)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_parent_that_is_compiled_has_the_step_and_its_hooks_in_its_graph(hooked: bool) -> None:
    torch.compiler.reset()
    model = nn.Linear(4, 4)
    step = graphs.capture(model)
    if hooked:
        step.register_forward_hook(halved)
    compiled = torch.compile(nn.Sequential(step, nn.ReLU()), backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(X), (model(X) / 2 if hooked else model(X)).relu())
    assert step.report().replays == 0
