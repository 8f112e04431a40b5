"""Steps that are served by a recording as they are: each has to be replayed, not only right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.hazards.case import AUTOCAST, INFERENCE, NO_GRAD, Run, hazard, noise, whole

Tensor = torch.Tensor
ALL = (NO_GRAD, INFERENCE, AUTOCAST)

LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sliced_into_linear": (
        lambda x: nn.functional.linear(x, torch.ones(4, 4, device=x.device)),
        lambda x: torch.cat([x, x], 1)[:, -1:],
    ),
    "transposed_reshaped": (lambda x: x.reshape(-1) * 2, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "last_row_viewed": (lambda x: x.reshape(2, 4).relu(), lambda x: x[:, -1:]),
    "every_other": (lambda x: (x @ x.mT).flatten(), lambda x: torch.cat([x, x], -1)[..., ::2]),
    "expanded": (lambda x: x.reshape(-1).cumsum(0), lambda x: x[:1].expand(2, 3, 4)),
    "part_of_a_storage": (lambda x: x.contiguous() + 1, lambda x: torch.cat([x, x])[1:3]),
}
for _name, (_step, _layout) in LAYOUTS.items():

    def _made(device: torch.device, step: Any = _step, layout: Any = _layout) -> Run:
        return Run(step, lambda i: (layout(noise(i, 2, 3, 4, device=device)),))

    _made.__name__ = _name
    hazard("E", contexts=ALL, replays=4)(_made)


@hazard("E", contexts=ALL, replays=4)
def attention_of_one_argument(device: torch.device) -> Run:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval().to(device)

    def arguments(i: int) -> tuple[Tensor, Tensor, Tensor]:
        x = noise(i, 2, 3, 8, device=device)
        return x, x, x

    return Run(model, arguments)


@hazard("E", contexts=ALL, replays=4)
def same_argument_twice(device: torch.device) -> Run:
    def arguments(i: int) -> tuple[Tensor, Tensor]:
        x = noise(i, 3, 4, device=device)
        return x, x.t() if i > 99 else x

    return Run(lambda a, b: a @ b.t(), arguments)


@hazard("E", contexts=ALL, replays=4)
def arguments_that_overlap(device: torch.device) -> Run:
    def arguments(i: int) -> tuple[Tensor, Tensor]:
        x = noise(i, 4, 4, device=device)
        return x[:3], x[1:]

    return Run(lambda a, b: a * b, arguments)


@hazard("E", contexts=(NO_GRAD, INFERENCE), replays=4)
def lstm(device: torch.device) -> Run:
    return Run(nn.LSTM(4, 3, batch_first=True).eval().to(device), lambda i: (noise(i, 2, 5, 4, device=device),))


@hazard("E", contexts=(NO_GRAD, INFERENCE), replays=4)
def gru(device: torch.device) -> Run:
    return Run(nn.GRU(4, 3, 2, bidirectional=True).eval().to(device), lambda i: (noise(i, 5, 2, 4, device=device),))


@hazard("E", contexts=ALL, replays=4)
def decoder_layer(device: torch.device) -> Run:
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval().to(device)
    return Run(layer, lambda i: (noise(i, 2, 3, 8, device=device), noise(i + 9, 2, 4, 8, device=device)))


@hazard("E", contexts=(NO_GRAD, INFERENCE), replays=4)
def temperature_on_the_host(device: torch.device) -> Run:
    return Run(lambda x, t: (x / t).softmax(-1), lambda i: (noise(i, 3, 4, device=device), torch.tensor(0.5 + i)))


@hazard("E", contexts=(NO_GRAD, INFERENCE), replays=4)
def lengths_on_the_host(device: torch.device) -> Run:
    def step(x: Tensor, lengths: Tensor) -> Tensor:
        return x * (torch.arange(4, device=x.device) < lengths.to(x.device)[:, None])

    return Run(step, lambda i: (noise(i, 3, 4, device=device), whole(i, 5, 3)))


def _replaced(name: str, change: Callable[[Any, int], object], **settings: Any) -> None:
    """A model that is changed at call 4 and replays before and after."""

    def make(device: torch.device) -> Run:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval().to(device)
        return Run(model, lambda i: (noise(i, 3, 4, device=device),), lambda i: change(model, i) if i == 4 else None)

    make.__name__ = name
    hazard("E", calls=10, replays=6, **settings)(make)


_replaced("state_assigned", lambda m, i: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True))
_replaced("state_loaded", lambda m, i: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}))
_replaced("buffer_registered_again", lambda m, i: m[1].register_buffer("running_mean", torch.ones_like(m[1].running_mean)))
_replaced("parameter_assigned", lambda m, i: setattr(m[0], "weight", nn.Parameter(m[0].weight * 2)))
_replaced("data_assigned", lambda m, i: setattr(m[0].weight, "data", m[0].weight.data * 2))


@hazard("E", calls=10, replays=6)
def model_in_another_dtype(device: torch.device) -> Run:
    model = nn.Linear(4, 4).eval().to(device)

    def step(x: Tensor) -> Tensor:
        return model(x.to(model.weight.dtype))

    return Run(step, lambda i: (noise(i, 3, 4, device=device),), lambda i: model.bfloat16() if i == 4 else None)


class Options:
    """Settings that a caller makes anew for each call."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


@hazard("E", calls=24)
def object_made_anew(device: torch.device) -> Run:
    return Run(lambda x, o: x * o.scale, lambda i: (noise(i, 3, 4, device=device), Options(1.0 + i % 3)))


@hazard("E", calls=24)
def function_made_anew(device: torch.device) -> Run:
    return Run(lambda x, f: f(x), lambda i: (noise(i, 3, 4, device=device), lambda v: v * (1 + i % 3)))


@hazard("E", calls=24)
def number_that_changes(device: torch.device) -> Run:
    return Run(lambda x, n: x * n, lambda i: (noise(i, 3, 4, device=device), i))


@hazard("E", calls=24)
def float_that_changes(device: torch.device) -> Run:
    return Run(lambda x, n: x * n, lambda i: (noise(i, 3, 4, device=device), 0.5 * i))


@hazard("E", contexts=ALL, replays=4)
def argument_written(device: torch.device) -> Run:
    return Run(lambda x: x.mul_(2), lambda i: (noise(i, 3, 4, device=device),))


@hazard("E", contexts=ALL, replays=4)
def part_of_an_argument_written(device: torch.device) -> Run:
    def step(x: Tensor, y: Tensor) -> Tensor:
        y[:, 1] = x.sum(1)
        return y * 2

    return Run(step, lambda i: (noise(i, 3, 4, device=device), noise(i + 9, 3, 4, device=device)))


@hazard("E", contexts=ALL, replays=4)
def strided_argument_written(device: torch.device) -> Run:
    def step(x: Tensor) -> Tensor:
        x.t().add_(1)
        return x.sum(0)

    return Run(step, lambda i: (noise(i, 4, 3, device=device).t(),))


@dataclass
class Output:
    """What a step of the user's returns."""

    logits: Tensor
    length: int
    hidden: Tensor | None = None


@dataclass(frozen=True)
class FrozenOutput:
    """The same, frozen and nested."""

    inner: Output
    scale: float


@hazard("E", replays=4)
def dataclass_output(device: torch.device) -> Run:
    return Run(lambda x: Output(x * 2, 3), lambda i: (noise(i, 3, 4, device=device),))


@hazard("E", replays=4)
def nested_dataclass_output(device: torch.device) -> Run:
    def wrap(step: Any) -> Any:
        def call(x: Tensor) -> Any:
            made = step(x)
            return made.inner.logits, made.inner.length, made.scale, type(made).__name__

        return call

    return Run(lambda x: FrozenOutput(Output(x * 2, 3), 0.5), lambda i: (noise(i, 3, 4, device=device),), wrap=wrap)


class Store:
    """A cache of the user's."""

    def __init__(self, device: torch.device) -> None:
        self.keys = torch.zeros(3, 4, device=device)


class Caching(nn.Module):
    """A model that holds its cache and returns it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.store = Store(device)

    def forward(self, x: Tensor) -> tuple[Tensor, Store]:
        self.store.keys.add_(x)
        return self.store.keys * 2, self.store


@hazard("E", replays=4)
def own_cache_returned(device: torch.device) -> Run:
    model = Caching(device)

    def wrap(step: Any) -> Any:
        def call(x: Tensor) -> Any:
            out, store = step(x)
            return out, store is model.store

        return call

    return Run(model, lambda i: (noise(i, 3, 4, device=device),), wrap=wrap)


@hazard("E", replays=4)
def given_cache_returned(device: torch.device) -> Run:
    store = Store(device)

    def step(x: Tensor, held: Store) -> tuple[Tensor, Store]:
        held.keys.add_(x)
        return held.keys * 2, held

    def wrap(called: Any) -> Any:
        def call(x: Tensor, held: Store) -> Any:
            out, returned = called(x, held)
            return out, returned is held

        return call

    return Run(step, lambda i: (noise(i, 3, 4, device=device), store), wrap=wrap)
