"""Objects of torch that are parts of a step: what is set on them between calls is seen, as on the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs

pytestmark = [
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
    pytest.mark.filterwarnings("ignore:.*quantize:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao:DeprecationWarning"),
]
Tensor = torch.Tensor
Case = tuple[Callable[[Tensor], Tensor], Callable[[int], object], Tensor]
ENGINES = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
needs_engine = pytest.mark.skipif(not ENGINES, reason="torch was built without an engine for quantised operators")


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    if ENGINES:
        monkeypatch.setattr(torch.backends.quantized, "engine", ENGINES[0])


def quantised(value: int, *size: int) -> Tensor:
    return torch.quantize_per_tensor(torch.full(size, float(value)), 0.1, 0, torch.qint8)


def dynamic(layer: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)}, dtype=torch.qint8)


def linear() -> Case:
    model = dynamic(nn.Linear(8, 8))
    return model, lambda i: model[0].set_weight_bias(quantised(i, 8, 8), torch.ones(8)), torch.ones(2, 8)


def loaded() -> Case:
    model = dynamic(nn.Linear(8, 8))
    return model, lambda i: model.load_state_dict(dynamic(nn.Linear(8, 8)).state_dict()), torch.ones(2, 8)


def embedding() -> Case:
    model = torch.ao.nn.quantized.Embedding(10, 8)

    def change(i: int) -> None:
        rows = torch.full((10, 8), float(i))
        model.set_weight(torch.quantize_per_channel(rows, torch.ones(10), torch.zeros(10), 0, torch.quint8))

    return model, change, torch.tensor([1, 2])


def recurrent() -> Case:
    model, other = dynamic(nn.LSTM(8, 8)), dynamic(nn.LSTM(8, 8))

    def change(i: int) -> None:
        one, two = model[0]._all_weight_values[0], other[0]._all_weight_values[0]
        one.param, two.param = two.param, one.param

    return lambda x: model(x)[0], change, torch.ones(2, 1, 8)


def convolution() -> Case:
    model = torch.ao.nn.quantized.Conv2d(3, 3, 1)

    def step(x: Tensor) -> Tensor:
        return model(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)).dequantize()

    return step, lambda i: model.set_weight_bias(quantised(i, 3, 3, 1, 1), torch.ones(3)), torch.ones(1, 3, 2, 2)


def optimizer(foreach: bool) -> Case:
    weight = torch.zeros(4)
    weight.grad = torch.ones(4)
    made = torch.optim.SGD([weight], lr=0.1, foreach=foreach)

    def step(x: Tensor) -> Tensor:
        weight.zero_()
        made.step()
        return weight * x

    return step, lambda i: made.param_groups[0].update(lr=float(i)), torch.ones(4)


def transform() -> Case:
    affine = torch.distributions.AffineTransform(0.0, 2.0)
    made = torch.distributions.TransformedDistribution(torch.distributions.Normal(0.0, 1.0), [affine])
    return made.log_prob, lambda i: setattr(affine, "scale", float(i)), torch.ones(4)


def fake_quantised() -> Case:
    model = torch.ao.quantization.FakeQuantize(quant_min=0, quant_max=255)
    model(torch.linspace(-1, 1, 6))
    model.disable_observer()
    return model, lambda i: setattr(model, "quant_max", 10 * i), torch.linspace(-1, 1, 6)


def scaler() -> Case:
    made = torch.amp.GradScaler("cpu", init_scale=2.0)
    made.scale(torch.ones(1))
    return made.scale, lambda i: setattr(made, "_enabled", not made._enabled), torch.ones(2)


QUANTISED = [linear, loaded, embedding, recurrent, convolution]
OTHERS = [lambda: optimizer(False), lambda: optimizer(True), transform, fake_quantised, scaler]


def check(make: Callable[[], Case], context: Any) -> None:
    step, change, x = make()
    captured = graphs.capture(step)
    with context():
        for call in range(6):
            if call in (3, 5):
                change(call)
            assert torch.equal(captured(x), step(x)), call
    report = captured.report()
    assert report.replays and {refusal.reason for refusal in report.refusals} == {"changing-value"}, report


@needs_engine
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", QUANTISED)
def test_packed_weights_that_are_exchanged_are_seen(make: Callable[[], Case], context: Any) -> None:
    check(make, context)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", OTHERS)
def test_settings_of_optimizers_distributions_and_quantisers_are_seen(make: Callable[[], Case], context: Any) -> None:
    check(make, context)


def test_an_object_of_cpp_that_can_change_inside_is_refused_by_name() -> None:
    made = torch.classes.profiling._ScriptProfile()
    step = graphs.capture(lambda x: x * 2 if made is not None else x)
    with torch.no_grad():
        assert step(torch.ones(2)).tolist() == [2.0, 2.0]
    assert {refusal.reason for refusal in step.report().refusals} == {"unguarded-read"}
