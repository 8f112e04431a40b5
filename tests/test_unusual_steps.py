"""Sparse and wrapped tensors, operators that take functions, TorchScript, collectives: replayed right or refused by name."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention
from torch.testing._internal.two_tensor import TwoTensor

import graphs
from graphs.dispatch.call_log import NotReplayed
from tests.parity import assert_same

Tensor = torch.Tensor
REPLAYED = "replayed"
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


class Holding(nn.Module):
    """A product with a matrix of some kind."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix @ x


class Wrapped(nn.Module):
    """A weight that holds other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(TwoTensor(torch.eye(8), torch.eye(8)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y.a + y.b


class Trained(nn.Module):
    """Takes a step of an optimiser."""

    def __init__(self, grad: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.grad = nn.Linear(8, 8), grad
        self.optimiser = torch.optim.SGD(self.layer.parameters(), lr=0.1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.grad or torch.is_grad_enabled()):
            loss = self.layer(x).square().mean()
            loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()


class Scripted(nn.Module):
    """Counts where Python cannot see it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@torch.jit.script
def scripted_branch(x: Tensor) -> Tensor:
    if bool(x.sum() > 0):
        return x * 2
    return x - 1


def quantised() -> nn.Module:
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.qint8)


def exported() -> Any:
    torch.manual_seed(0)
    return torch.export.export(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.ones(8, 8),)).module()


def sparse_inside(x: Tensor) -> Tensor:
    return x.relu().to_sparse() @ x


def jagged(x: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged) * 2, 0.0)


def mkldnn(x: Tensor) -> Tensor:
    return x.to_mkldnn().relu().to_dense()


def conditional(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))


def flexible(x: Tensor) -> Tensor:
    return flex_attention(x[None, None], x[None, None], x[None, None], score_mod=lambda score, b, h, q, k: score + q - k)


def scanned(x: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    return scan(lambda carry, y: (carry + y, carry * 1.0), torch.zeros(8), x)[0]


def biased(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], attn_mask=causal_lower_right(8, 8))


def profiled(x: Tensor) -> Tensor:
    with torch.profiler.record_function("part"):
        return x * 2


def wrapped_inside(x: Tensor) -> Tensor:
    y = TwoTensor(x, x + 1) * 2
    return y.a + y.b


def forked(x: Tensor) -> Tensor:
    return torch.jit.wait(torch.jit.fork(torch.relu, x))


KINDS: list[Any] = [
    pytest.param(make, reason, id=name)
    for name, make, reason in [
        ("coo", lambda: Holding(torch.eye(8).to_sparse()), "unsupported-tensor"),
        ("csr", lambda: Holding(torch.eye(8).to_sparse_csr()), "unsupported-tensor"),
        ("coo-inside", lambda: sparse_inside, "unsupported-tensor"),
        ("jagged", lambda: jagged, "unsupported-tensor"),
        ("mkldnn", lambda: mkldnn, "unsupported-tensor"),
        ("wrapper", Wrapped, "unsupported-tensor"),
        ("wrapper-inside", lambda: wrapped_inside, REPLAYED),
        ("cond", lambda: conditional, "higher-order-operator"),
        ("flex_attention", lambda: flexible, "higher-order-operator"),
        ("scan", lambda: scanned, "higher-order-operator"),
        ("script", lambda: torch.jit.script(Scripted()), "torchscript"),
        ("trace", lambda: torch.jit.trace(nn.ReLU(), torch.ones(8, 8)), "torchscript"),
        ("script-function", lambda: lambda x: scripted_branch(x), REPLAYED),
        ("script-fork", lambda: forked, REPLAYED),
        ("causal-bias", lambda: biased, "unwatchable"),
        ("record_function", lambda: profiled, REPLAYED),
        ("packed-weights", quantised, REPLAYED),
        ("exported", exported, REPLAYED),
        ("vmap", lambda: torch.vmap(lambda row: row.sin() * 2), REPLAYED),
        ("func-grad", lambda: torch.func.grad(lambda y: (y**2).sum()), REPLAYED),
    ]
]


def alike(make: Callable[[], Any], context: Any, calls: int = 4) -> graphs.CaptureReport:
    """Call a captured step and its reference; returns the report."""
    model, reference = make(), make()
    step = graphs.capture(model)
    for index in range(calls):
        with context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(index)).abs() * (1 - 2 * (index % 2))
            assert_same(reference(x.clone()), step(x), f"call {index}")
    return step.report()


@contexts
@pytest.mark.parametrize(("make", "reason"), KINDS)
def test_a_kind_of_step_is_replayed_right_or_refused_by_name(make: Callable[[], Any], reason: str, context: Any) -> None:
    report = alike(make, context)
    if reason == REPLAYED:
        assert report.replays >= 3, str(report)
    else:
        assert reason in {refusal.reason for refusal in report.refusals}, str(report)
        assert report.replays == 0


@pytest.mark.parametrize("grad", [True, False], ids=["own mode", "the caller's mode"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
def test_a_step_that_trains_is_as_in_eager(grad: bool, context: Any) -> None:
    if context is torch.no_grad and not grad:
        with pytest.raises(RuntimeError, match="does not require grad"), context():
            graphs.capture(Trained(grad))(torch.ones(8, 8))
        return
    alike(lambda: Trained(grad), context)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process, as its own group."""
    from torch.distributed.tensor import init_device_mesh

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            yield init_device_mesh("cpu", (1,))
        finally:
            dist.destroy_process_group()


@contexts
def test_tensors_of_a_mesh_are_never_read_as_memory(mesh: Any, context: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(distribute_tensor(torch.eye(8), mesh, [Shard(0)]), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (DTensor.from_local(x, mesh, [Replicate()]) @ self.weight).full_tensor()

    for make in (Parallel, lambda: lambda x: (DTensor.from_local(x, mesh, [Shard(0)]) * 2 + 1).to_local()):
        report = alike(make, context)
        assert {refusal.reason for refusal in report.refusals} == {"unsupported-tensor"}, str(report)
    step = graphs.capture(lambda x: (x * 2).to_local())
    with context(), pytest.warns(NotReplayed, match="unsupported-argument"):
        assert torch.equal(step(DTensor.from_local(torch.ones(2), mesh, [Replicate()])), torch.full((2,), 2.0))


@contexts
def test_a_collective_is_refused_where_python_waits_for_it(mesh: Any, context: Any) -> None:
    def reduced(x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    def functional(x: Tensor) -> Tensor:
        import torch.distributed._functional_collectives as collectives

        return collectives.all_reduce(x * 2, "sum", dist.group.WORLD) + 1

    assert {refusal.reason for refusal in alike(lambda: reduced, context).refusals} == {"collective"}
    assert {refusal.reason for refusal in alike(lambda: functional, context).refusals} == {"unsupported-operator"}


@pytest.mark.parametrize("whole", [True, False], ids=["compiled itself", "inside a compiled function"])
def test_a_captured_module_inside_compiled_code_is_a_part_of_it(whole: bool) -> None:
    model = nn.Linear(8, 8)
    step = graphs.capture(model)
    compiled = torch.compile(step if whole else lambda x: step(x) * 2, backend="eager", fullgraph=True)
    x = torch.randn(2, 8)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), model(x) * (1 if whole else 2))
        assert torch.equal(step(x), model(x))
    assert step.report().replays == 1
