"""The captured step stands in for its model."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphs


class Toy(nn.Module):
    kind = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=4)
        self.up = nn.Linear(4, 4)
        self.register_buffer("offset", torch.zeros(4))
        self.drop = nn.Dropout(0.5)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.up(x)) * self.scale + self.offset

    def hidden(self) -> int:
        return self.config.hidden_size


@pytest.fixture
def model() -> Toy:
    return Toy().eval()


@pytest.fixture
def step(model: Toy) -> Any:
    return graphs.capture(model)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def test_attributes_and_methods_are_the_models(step: Any, model: Toy) -> None:
    assert step.config is model.config and step.up is model.up and step.kind == "toy"
    assert step.hidden() == 4
    assert {"up", "config", "mode", "report", "record_buckets"} <= set(dir(step))


def test_parameters_are_the_models(step: Any, model: Toy) -> None:
    assert [id(p) for p in step.parameters()] == [id(p) for p in model.parameters()]
    assert list(step.state_dict()) == list(model.state_dict())
    assert [name for name, _ in step.named_modules()] == [name for name, _ in model.named_modules()]


def test_an_unknown_attribute_is_the_models_error(step: Any) -> None:
    assert not hasattr(step, "nothing")
    with pytest.raises(AttributeError, match="'Toy' object has no attribute 'nothing'"):
        _ = step.nothing


@pytest.mark.parametrize("method", ["eval", "train", "cpu", "double", "requires_grad_"])
def test_methods_that_return_the_model_return_the_step(step: Any, method: str) -> None:
    assert getattr(step, method)() is step


def test_to_returns_the_step_and_the_next_call_uses_the_new_weights(step: Any, model: Toy) -> None:
    for _ in range(2):
        step(X)
    assert step.to(torch.float64) is step
    x = X.double()
    for _ in range(2):
        torch.testing.assert_close(step(x), model(x).detach())
    assert step.report().replays == 4


def test_training_mode_is_switched_through_the_step(step: Any, model: Toy) -> None:
    x = torch.ones(64, 4)
    step(x)
    assert step.train() is step and model.training and model.drop.training
    assert (step(x) == model.offset).sum() > 0, "dropout is off"
    step.eval()
    torch.testing.assert_close(step(x), model(x).detach())


def test_an_attribute_is_set_on_the_model_and_used(step: Any, model: Toy) -> None:
    step(X)
    before = step(X)
    step.scale = 2.0
    assert model.scale == 2.0
    torch.testing.assert_close(step(X), before * 2)
    step.offset = torch.ones(4)
    assert "offset" in dict(model.named_buffers()) and "offset" not in vars(step)
    torch.testing.assert_close(step(X), before * 2 + 1)


def test_an_attribute_is_deleted_from_the_model(step: Any, model: Toy) -> None:
    step(X)
    step.note = "x"
    del step.note
    assert not hasattr(model, "note") and not hasattr(step, "note")
    del step.scale
    with pytest.raises(AttributeError, match="scale"):
        step(X)


def test_weights_loaded_through_the_step_are_used(step: Any, model: Toy) -> None:
    step(X)
    step.load_state_dict({name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()})
    torch.testing.assert_close(step(X), model(X).detach())
    assert step.report().replays == 2


def test_a_deep_copy_is_on_its_own(step: Any, model: Toy) -> None:
    step(X)
    twin = copy.deepcopy(step)
    assert type(twin) is graphs.CapturedModule
    assert twin.up.weight is not model.up.weight and twin.report().replays == 0
    with torch.no_grad():
        twin.up.weight.zero_()
        twin.up.bias.zero_()
    for _ in range(2):
        assert twin(X).tolist() == torch.zeros(2, 4).tolist()
        torch.testing.assert_close(step(X), model(X))
    assert (twin.report().replays, step.report().replays) == (2, 3)


def test_a_deep_copy_of_a_structure_keeps_what_it_shares(step: Any, model: Toy) -> None:
    both = copy.deepcopy({"step": step, "model": model})
    assert both["step"].up is both["model"].up


def test_a_pickled_step_comes_back_with_its_settings() -> None:
    step = graphs.capture(Toy().eval(), outputs="borrowed", mode="eager")
    step.mode = "graph"
    back = pickle.loads(pickle.dumps(step))
    assert back.mode == "eager"
    torch.testing.assert_close(back(X), step(X))


def test_the_model_can_be_used_by_itself(step: Any, model: Toy) -> None:
    step(X)
    torch.testing.assert_close(model(X).detach(), step(X))
    assert step.report().replays == 2 and step.report().eager_calls == 0


def test_an_optimiser_trains_the_weights_that_replays_read(step: Any, model: Toy) -> None:
    with torch.no_grad():
        step(X)
    optimiser = torch.optim.SGD(step.parameters(), lr=0.5)
    model(X).square().sum().backward()
    optimiser.step()
    with torch.no_grad():
        torch.testing.assert_close(step(X), model(X))
    assert step.report().replays == 2


def test_the_text_of_a_step_shows_the_model(step: Any) -> None:
    assert repr(step).startswith("CapturedModule(Toy(") and "Linear" in repr(step)


def test_a_builtin_without_a_signature_is_captured() -> None:
    step = graphs.capture(torch.add)
    for _ in range(2):
        assert step(torch.ones(2), torch.ones(2), alpha=2).tolist() == [3, 3]
    assert step.report().replays == 2


def test_arguments_named_self_args_and_model_reach_the_model() -> None:
    step = graphs.capture(lambda x, **named: x * named["self"] + named["model"])
    arguments = {"self": torch.tensor(2.0), "model": torch.tensor(1.0)}
    for _ in range(2):
        assert step(torch.ones(2), **arguments).tolist() == [3, 3]
    assert step.report().replays == 2
