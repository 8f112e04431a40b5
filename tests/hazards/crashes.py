"""Ordinary arguments and models on which a call once raised."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from tests.hazards.case import INFERENCE, NO_GRAD, Run, hazard, noise, steps

Tensor = torch.Tensor


def a_list_of_one(x: Tensor, y: Any) -> Tensor:
    return x * 2 + y[0]


def one_of_one(x: Tensor, y: Any) -> Tensor:
    return x * 2 + y[0][0]


def entry_x(x: Tensor, y: Any) -> Tensor:
    return x * 2 + y["x"]


def _containers() -> None:
    ways: dict[str, tuple[Any, Any]] = {
        "list_of_one": (a_list_of_one, lambda y: [y]),
        "tuple_of_one": (a_list_of_one, lambda y: (y,)),
        "dict_of_one": (entry_x, lambda y: {"x": y}),
        "list_in_list": (one_of_one, lambda y: [[y]]),
        "tuple_in_list": (one_of_one, lambda y: [(y,)]),
        "list_with_none": (a_list_of_one, lambda y: [y, None]),
        "list_with_number": (a_list_of_one, lambda y: [y, 3]),
    }
    for name, (function, way) in ways.items():

        def make(device: torch.device, function: Any = function, way: Any = way) -> Run:
            return Run(function, lambda i: (noise(i, 3, 4, device=device), way(noise(i + 9, 3, 4, device=device))))

        make.__name__ = name
        hazard("B", replays=3)(make)


_containers()


@hazard("B", replays=3)
def list_kept_by_the_caller(device: torch.device) -> Run:
    held: list[Tensor] = []

    def arguments(i: int) -> tuple[Any, ...]:
        held[:] = [noise(i + 9, 3, 4, device=device)]
        return noise(i, 3, 4, device=device), held

    return Run(a_list_of_one, arguments)


@hazard("B", replays=3)
def dict_kept_by_the_caller(device: torch.device) -> Run:
    held: dict[str, Tensor] = {}

    def arguments(i: int) -> tuple[Any, ...]:
        held["x"] = noise(i + 9, 3, 4, device=device)
        return noise(i, 3, 4, device=device), held

    return Run(entry_x, arguments)


@hazard("B", replays=3)
def output_object_as_argument(device: torch.device) -> Run:
    from transformers.modeling_outputs import BaseModelOutput

    def step(x: Tensor, encoded: Any) -> Tensor:
        return x + encoded.last_hidden_state

    return Run(
        step, lambda i: (noise(i, 3, 4, device=device), BaseModelOutput(last_hidden_state=noise(i + 9, 3, 4, device=device)))
    )


@hazard("B", isolated=True, contexts=(NO_GRAD,))
def activation_of_a_lazy_mapping(device: torch.device) -> Run:
    from transformers.activations import ACT2FN

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.table = ACT2FN["silu"], ACT2FN

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) * 2

    kinds = {key: type(dict.__getitem__(ACT2FN, key)).__name__ for key in dict.keys(ACT2FN)}

    def after() -> Any:
        return kinds == {key: type(dict.__getitem__(ACT2FN, key)).__name__ for key in dict.keys(ACT2FN)}

    return Run(Model(), lambda i: (noise(i, 3, 4, device=device),), after=after)


class Counting(MutableMapping):  # type: ignore[type-arg]
    """A mapping that counts how often it is asked, written and deleted from."""

    def __init__(self) -> None:
        self.held, self.asked = {"scale": 2.0}, 0

    def __getitem__(self, key: str) -> float:
        self.asked += 1
        return self.held[key]

    def __setitem__(self, key: str, value: float) -> None:
        raise AssertionError("written")

    def __delitem__(self, key: str) -> None:
        raise AssertionError("deleted")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("walked")

    def __len__(self) -> int:
        raise AssertionError("measured")


class Hostile:
    """An object on which everything raises that a walk might try."""

    def __init__(self) -> None:
        self.factor = 2.0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        raise RuntimeError("measured")

    def __bool__(self) -> bool:
        raise RuntimeError("asked for truth")

    @property
    def secret(self) -> float:
        raise RuntimeError("read")


class Holder(nn.Module):
    def __init__(self, held: Any, read: Any) -> None:
        super().__init__()
        self.held, self.read = held, read

    def forward(self, x: Tensor) -> Tensor:
        return x * self.read(self.held)


@hazard("B")
def mapping_of_the_users(device: torch.device) -> Run:
    return Run(Holder(Counting(), lambda held: held.held["scale"]), lambda i: (noise(i, 3, 4, device=device),))


@hazard("B")
def object_that_raises(device: torch.device) -> Run:
    return Run(Holder(Hostile(), lambda held: held.factor), lambda i: (noise(i, 3, 4, device=device),))


@hazard("B")
def list_of_objects_that_raise(device: torch.device) -> Run:
    return Run(Holder([Hostile(), {"a": Hostile()}], lambda held: held[0].factor), lambda i: (noise(i, 3, 4, device=device),))


@hazard("B")
def object_that_raises_as_argument(device: torch.device) -> Run:
    held = Hostile()
    return Run(lambda x, h: x * h.factor, lambda i: (noise(i, 3, 4, device=device), held))


@hazard("B", isolated=True, contexts=(NO_GRAD,))
def weight_of_two_tensors(device: torch.device) -> Run:
    from torch.testing._internal.two_tensor import TwoTensor

    linear = nn.Linear(4, 4).to(device)
    linear.weight = nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach().clone()))

    def step(x: Tensor) -> Tensor:
        out = linear(x)
        return out.a if isinstance(out, TwoTensor) else out

    return Run(step, lambda i: (noise(i, 3, 4, device=device),))


@hazard("B", isolated=True, contexts=(NO_GRAD,))
def distributed_weight(device: torch.device) -> Run:
    import tempfile

    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (1,))
    weight = nn.Parameter(distribute_tensor(noise(0, 4, 4, device=device), mesh, [Replicate()]), requires_grad=False)

    def step(x: Tensor) -> Tensor:
        return (distribute_tensor(x, mesh, [Replicate()]) @ weight).to_local()

    return Run(step, lambda i: (noise(i, 3, 4, device=device),))


@hazard("B", isolated=True, contexts=(NO_GRAD,))
def all_reduce(device: torch.device) -> Run:
    import tempfile

    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)

    def step(x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    return Run(step, lambda i: (noise(i, 3, 4, device=device),))


class SparseBuffer(nn.Module):
    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.register_buffer("table", torch.eye(4).to_sparse(layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        return (self.table @ x.t()).t() * 2


@hazard("B")
def sparse_coo_buffer(device: torch.device) -> Run:
    return Run(SparseBuffer(torch.sparse_coo).to(device), lambda i: (noise(i, 3, 4, device=device),))


@hazard("B")
def sparse_csr_buffer(device: torch.device) -> Run:
    return Run(SparseBuffer(torch.sparse_csr).to(device), lambda i: (noise(i, 3, 4, device=device),))


def sparse_between(x: Tensor) -> Tensor:
    return torch.sparse.mm(x.relu().to_sparse(), x.t())


def sparse_output(x: Tensor) -> Tensor:
    return x.relu().to_sparse().to_dense() * 2


def nested_between(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[0], x[1, :2]]).to_padded_tensor(0.0)


def profiled(x: Tensor) -> Tensor:
    with torch.profiler.record_function("part"):
        y = x * 2
    return y + 1


def conditioned(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: v - 1, (x,))


def scanned(x: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    last, every = scan(lambda carry, row: (carry + row, carry * 2), torch.zeros(4, device=x.device), x)
    return last + every.sum(0)


def flexible_attention(x: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q = x[None, None].expand(1, 1, 3, 4).repeat(1, 1, 1, 4)
    return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + (i - j))


steps("B", sparse_between, sparse_output, nested_between, profiled, arguments=lambda i: (noise(i, 3, 4),))
steps("B", conditioned, scanned, flexible_attention, arguments=lambda i: (noise(i, 3, 4),), calls=4)


@hazard("B", contexts=(NO_GRAD,))
def mkldnn_module(device: torch.device) -> Run:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return Run(lambda x: x * 2, lambda i: (noise(i, 3, 4, device=device),))
    from torch.utils.mkldnn import to_mkldnn

    model = to_mkldnn(nn.Linear(4, 4).eval())
    return Run(lambda x: model(x.to_mkldnn()).to_dense(), lambda i: (noise(i, 3, 4),))


@hazard("B")
def causal_bias(device: torch.device) -> Run:
    def step(x: Tensor) -> Tensor:
        q = x[None, None]
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=causal_lower_right(3, 3))

    return Run(step, lambda i: (noise(i, 3, 8, device=device),))


@hazard("B")
def scripted_module(device: torch.device) -> Run:
    model = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval().to(device), (noise(0, 3, 4, device=device),))
    return Run(model, lambda i: (noise(i, 3, 4, device=device),))


@hazard("B")
def scripted_function_inside(device: torch.device) -> Run:
    inner = torch.jit.trace(lambda v: v.relu() * 2, (noise(0, 3, 4, device=device),))
    return Run(lambda x: inner(x) + 1, lambda i: (noise(i, 3, 4, device=device),))


@hazard("B", isolated=True, contexts=(NO_GRAD, INFERENCE))
def compiled_around_captured(device: torch.device) -> Run:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval().to(device)
    return Run(model, lambda i: (noise(i, 3, 4, device=device),), wrap=lambda step: torch.compile(step, backend="eager"))


@hazard("B", contexts=("grad",))
def optimiser_step(device: torch.device) -> Run:
    model = nn.Linear(4, 4).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(x: Tensor) -> Tensor:
        optimiser.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return Run(
        step, lambda i: (noise(i, 3, 4, device=device),), after=lambda: [round(v, 5) for v in model.weight.flatten().tolist()]
    )


@hazard("B", contexts=(NO_GRAD,))
def packed_quantised_weights(device: torch.device) -> Run:
    if device.type != "cpu":
        return Run(lambda x: x * 2, lambda i: (noise(i, 3, 4, device=device),))
    import torch.ao.quantization as quantization

    model = quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), {nn.Linear}, torch.qint8)
    return Run(model, lambda i: (noise(i, 3, 4),))


@hazard("B", contexts=(INFERENCE, NO_GRAD))
def weights_made_in_inference_mode(device: torch.device) -> Run:
    with torch.inference_mode():
        model = nn.Linear(4, 4).eval().to(device)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    return Run(lambda x: model(x) * 2, lambda i: (noise(i, 3, 4, device=device),))
