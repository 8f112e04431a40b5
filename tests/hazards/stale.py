"""Values that change between calls and that a recording froze: each is compared right at the next call."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tests.hazards.case import AUTOCAST, INFERENCE, NO_GRAD, Run, hazard, noise
from tests.hazards.libraries import LOCATIONS, adapters

Tensor = torch.Tensor
AT = (5, 7, 10)
"""Calls before which the value changes: not the first, second, fourth or eighth replay."""
CALLS = 12


class Small(nn.Module):
    """A model that reads values of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.act = nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])
        self.table, self.items = {"s": 1.5, "deep": {"s": 0.5}}, [1.0, 2.0]
        self.number, self.space = numpy.float32(1.5), types.SimpleNamespace(scale=2.0)
        self.array = numpy.array([1.0, 2.0], dtype=numpy.float32)
        self.pair, self.kinds, self.shared = (1.0, [3.0]), {"relu"}, None
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.lin(x))) * self.table["s"] * self.table["deep"]["s"] * sum(self.items)
        for block in self.blocks:
            x = block(x)
        x = x * float(self.number) * self.space.scale + float(self.array.sum()) * self.pair[1][0]
        x = x.relu() if "relu" in self.kinds else x
        return x + 1 if self.shared is None else x * self.shared.scale


CHANGES: dict[str, Callable[[Small, int], object]] = {
    "dict_entry": lambda model, i: model.table.update(s=float(i)),
    "entry_of_an_inner_dict": lambda model, i: model.table["deep"].update(s=float(i)),
    "list_entry": lambda model, i: model.items.__setitem__(0, float(i)),
    "list_append": lambda model, i: model.items.append(float(i)),
    "list_in_a_tuple": lambda model, i: model.pair[1].__setitem__(0, float(i)),
    "set_entry": lambda model, i: model.kinds.symmetric_difference_update({"relu"}),
    "numpy_number": lambda model, i: setattr(model, "number", numpy.float32(i)),
    "numpy_array": lambda model, i: model.array.__setitem__(0, i),
    "simple_namespace": lambda model, i: setattr(model.space, "scale", float(i)),
    "object_in_place_of_none": lambda model, i: setattr(model, "shared", types.SimpleNamespace(scale=float(i))),
    "module_list_append": lambda model, i: model.blocks.append(nn.Sigmoid()),
    "module_list_entry": lambda model, i: model.blocks.__setitem__(1, nn.Sigmoid() if i % 2 else nn.ReLU()),
    "submodule": lambda model, i: setattr(model, "act", nn.Sigmoid() if i % 2 else nn.ReLU()),
    "method_of_a_submodule": lambda model, i: setattr(model.act, "forward", torch.sigmoid if i % 2 else torch.relu),
    "epsilon_of_a_library_module": lambda model, i: setattr(model.norm, "eps", 0.1 * i),
    "probability_of_a_library_module": lambda model, i: (model.drop.train(), setattr(model.act, "inplace", i % 2 == 0)),
    "hook_on_a_submodule": lambda model, i: model.lin.register_forward_hook(lambda m, a, output: output * 2),
    "pre_hook_on_a_submodule": lambda model, i: model.norm.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    "hook_on_the_model": lambda model, i: model.register_forward_hook(lambda m, a, output: output - 1),
    "data_of_a_parameter": lambda model, i: setattr(model.lin.weight, "data", noise(i, 4, 4, device=model.lin.weight.device)),
    "parameter": lambda model, i: setattr(model.lin, "bias", nn.Parameter(noise(i, 4, device=model.lin.weight.device))),
    "parameter_in_place": lambda model, i: model.lin.weight.data.mul_(1.5),
    "parameter_gone": lambda model, i: setattr(model.lin, "bias", None),
}


def _changed(change: Callable[[Any, int], object], make: Callable[[], Any]) -> Callable[[torch.device], Run]:
    def made(device: torch.device) -> Run:
        model = make().eval().to(device)
        return Run(model, lambda i: (noise(i, 3, 4, device=device),), lambda i: change(model, i) if i in AT else None)

    return made


for _name, _change in CHANGES.items():
    _made = _changed(_change, Small)
    _made.__name__ = _name
    hazard("D", calls=CALLS, replays=3)(_made)


@hazard("D", calls=CALLS)
def forward_of_the_model(device: torch.device) -> Run:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval().to(device)
    ways: list[Callable[[Tensor], Tensor]] = [lambda x: x * 3, lambda x: model[0](x), torch.relu]
    return Run(
        *(model, lambda i: (noise(i, 3, 4, device=device),)),
        lambda i: setattr(model, "forward", ways[AT.index(i)]) if i in AT else None,
    )


@hazard("D", calls=CALLS, replays=3)
def one_of_many_parameters(device: torch.device) -> Run:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(48))).eval().to(device)

    def change(i: int) -> None:
        if i in AT:
            model[i * 3].weight.data = noise(i, 4, 4, device=device)

    return Run(model, lambda i: (noise(i, 3, 4, device=device),), change)


ADAPTER_CHANGES: dict[str, Callable[[Any, int], object]] = {
    "set_adapter": lambda model, i: model.set_adapter("second" if i % 2 else "first"),
    "scale_layer": lambda model, i: model.scale_layer(0.5),
    "merge_adapter": lambda model, i: model.unmerge() if model.layers[0].merged else model.merge(),
    "add_adapter": lambda model, i: (model.add_adapter(f"new {i}"), model.set_adapter(f"new {i}")),
    "enable_adapters": lambda model, i: model.enable_adapters(i % 2 == 0),
}
for _name, _change in ADAPTER_CHANGES.items():
    _made = _changed(_change, lambda: adapters("site-packages").Adapted())
    _made.__name__ = _name
    hazard("D", calls=CALLS, contexts=(NO_GRAD, INFERENCE, AUTOCAST))(_made)


def _disabled(location: str) -> Callable[[torch.device], Run]:
    def made(device: torch.device) -> Run:
        model = adapters(location).Adapted().eval().to(device)

        def wrap(step: Any) -> Callable[[Tensor, bool], Tensor]:
            def call(x: Tensor, disable: bool) -> Tensor:
                if disable:
                    with model.disable_adapter():
                        return step(x)
                return step(x)

            return call

        return Run(model, lambda i: (noise(i, 3, 4, device=device), i in (5, 6, 9)), wrap=wrap)

    return made


for _location in LOCATIONS:
    _made = _disabled(_location)
    _made.__name__ = f"disable_adapter_{_location.replace('-', '_')}"
    hazard("D", calls=CALLS)(_made)


def _llama() -> Any:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    return transformers.LlamaModel(config)


LLAMA_CHANGES: dict[str, Callable[[Any, int], object]] = {
    "act_fn": lambda model, i: setattr(model.layers[1].mlp, "act_fn", nn.ReLU() if i % 2 else nn.Tanh()),
    "scaling": lambda model, i: setattr(model.layers[0].self_attn, "scaling", 0.5 * i),
    "variance_epsilon": lambda model, i: setattr(model.norm, "variance_epsilon", 0.5 * i),
    "hook_of_a_layer": lambda model, i: model.layers[0].mlp.register_forward_hook(lambda m, a, output: output * 2),
    "layers_fewer": lambda model, i: setattr(model, "layers", model.layers[:1]),
}


def _llama_run(change: Callable[[Any, int], object]) -> Callable[[torch.device], Run]:
    def made(device: torch.device) -> Run:
        model = _llama().eval().to(device)
        ids = torch.tensor([[3, 7, 1, 2]], device=device)
        run = Run(model, lambda i: ((ids + i) % 32,), lambda i: change(model, i) if i in (5, 6) else None)
        run.wrap = lambda step: lambda tokens: step(tokens, use_cache=False).last_hidden_state
        return run

    return made


for _name, _change in LLAMA_CHANGES.items():
    _made = _llama_run(_change)
    _made.__name__ = f"llama_{_name}"
    hazard("D", calls=8)(_made)


@hazard("D", calls=CALLS)
def cache_reset(device: torch.device) -> Run:
    cache = adapters("site-packages").CrossCache(device)
    encode = nn.Linear(4, 4).eval().to(device)

    def step(x: Tensor, encoded: Tensor, held: Any) -> Tensor:
        return x + held.keys(encode, encoded)

    return Run(
        *(step, lambda i: (noise(i, 3, 4, device=device), noise(i // 4, 3, 4, device=device), cache)),
        lambda i: cache.reset() if i % 4 == 0 else None,
    )


class Instrumented:
    """A function put in the place of one of torch's, and a hook for all modules, which read a setting and count."""

    def __init__(self) -> None:
        self.scale, self.count, self.own = 1.0, [0], F.gelu
        F.gelu = self.called
        self.handle = register_module_forward_hook(lambda module, args, output: output * self.scale)

    def called(self, x: Tensor, **options: Any) -> Tensor:
        self.count[0] += 1
        return self.own(x, **options) * self.scale

    def remove(self) -> None:
        F.gelu = self.own
        self.handle.remove()


@hazard("D", calls=CALLS, replays=7)
def settings_in_torchs_place(device: torch.device) -> Run:
    instrumented = Instrumented()
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).to(device)
    return Run(
        *(model, lambda i: (noise(i, 3, 4, device=device),)),
        change=lambda i: setattr(instrumented, "scale", float(i)) if i == AT[0] else None,
        after=lambda: instrumented.count[0],
        restore=instrumented.remove,
    )
