"""`passes.host_values.on_host`: what a recording of a device would not compute is refused by its line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import passes

DEVICE = torch.device("meta")  # stands for one: no graph here is run


def graph_of(function: Callable[..., Tensor], *, state_on: str = "cpu") -> GraphModule:
    """The graph of a function of one device tensor and one tensor of the step's own."""
    with FakeTensorMode():
        x, own = torch.empty(4, 3, device=DEVICE), torch.zeros((), dtype=torch.int64, device=state_on)
        module = make_fx(lambda given: function(given, own))(x)
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            node.meta["val"] = getattr(module, str(node.target))
            module.state_0 = node.meta["val"]
            node.target = "state_0"
    return module


@pytest.mark.parametrize(
    "function",
    [
        lambda x, own: x * torch.randint(4, ()),
        lambda x, own: x * 2 + torch.rand(3).sum().to(DEVICE),
        lambda x, own: x * own,
        lambda x, own: x + (own * 2).to(DEVICE),
        lambda x, own: x * own.add_(1).to(DEVICE),
    ],
)
def test_what_only_the_host_computes_is_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(passes.Unremovable, match="works on the host"):
        passes.refuse_host_results(graph_of(function).graph)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, own: x * 2,
        lambda x, own: x[torch.arange(2)],
        lambda x, own: x + torch.full((), 2.0).mul(3).to(DEVICE),
        lambda x, own: x + torch.rand_like(x),
    ],
)
def test_what_constants_make_is_the_same_in_every_run(function: Callable[..., Tensor]) -> None:
    passes.refuse_host_results(graph_of(function).graph)


def test_state_on_the_device_is_read_there() -> None:
    passes.refuse_host_results(graph_of(lambda x, own: x * own, state_on="meta").graph)
