"""What surrounds a call: grad, inference and autocast modes, tensors made in inference mode, settings, modes of the caller's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
from graphs.contract.settings import ambient_of
from graphs.observation.eager_trace import trace_eager
from tests.parity import assert_same

Tensor = torch.Tensor
Context = Callable[[], contextlib.AbstractContextManager[Any]]


def together(*contexts: Context) -> Context:
    """Several contexts as one, the first outermost."""

    @contextlib.contextmanager
    def entered() -> Any:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    return entered


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": together(torch.no_grad, autocast),
    "inference-autocast": together(torch.inference_mode, autocast),
}
in_every_context = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)


@torch.library.custom_op("context_tests::product", mutates_args=())
def product(x: Tensor) -> Tensor:
    """Has no kernel for autocast, and what it calls does."""
    return x @ x.mT


product.register_fake(lambda x: x @ x.mT)
linear = nn.Linear(8, 8)
attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x - 1


def expression(x: Tensor) -> Tensor:
    return x * 2 if x.mean() > 0 else x - 1


def masked_loop(x: Tensor) -> Tensor:
    out, kind = torch.zeros_like(x), (x[:, 0] * 10).long() % 3
    for index in range(3):
        (rows,) = torch.where(kind[:, 0] == index)
        out[rows] = x[rows] * index
    return out


def layers(x: Tensor) -> Tensor:
    y = linear(x) @ x.mT
    y = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0] + y.mean()
    return F.dropout(F.layer_norm(y, (8,)), 0.0).softmax(-1).reshape(-1, 8).chunk(2)[0]


def attended(x: Tensor) -> Tensor:
    return attention(x, x, x, need_weights=False)[0]


def contracted(x: Tensor) -> Tensor:
    return torch.einsum("bij,bjk->bik", x, x.mT)


def nested_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.einsum("bij,bkj->bik", x, x) + product(x)
    with torch.autocast("cpu", enabled=False):
        return y.float() + product(x)


def inverse(x: Tensor) -> Tensor:
    return torch.pinverse(x)


STEPS = [
    *(branch, expression, masked_loop, layers, attended, contracted, nested_autocast, product, inverse),
    *(torch.linalg.pinv, layer, encoder, attention_with_weights := (lambda x: attention(x, x, x)[1])),
]


def drawn(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def called(step: Callable[..., Any], reference: Callable[..., Any], context: Context, calls: int = 4) -> None:
    """Call both in a context on the same data; results must be the same, and usable in the same modes."""
    for index in range(calls):
        with context():
            x = drawn(index, 2, 8, 8)
            wanted, got = reference(x.clone()), step(x)
        assert_same(wanted, got, f"call {index}")
        assert wanted.is_inference() == got.is_inference()


@in_every_context
@pytest.mark.parametrize("model", STEPS, ids=lambda step: getattr(step, "__name__", type(step).__name__))
def test_a_step_is_replayed_and_equals_eager_in_every_context(model: Callable[..., Any], context: Context) -> None:
    step = graphs.capture(model)
    called(step, model, context)
    assert step.report().replays >= 3, str(step.report())


@pytest.mark.parametrize("model", [branch, masked_loop, layers, contracted], ids=lambda step: step.__name__)
@pytest.mark.parametrize("made", ["plain", "inference"])
def test_the_operators_that_are_watched_do_not_depend_on_inference_mode(model: Any, made: str) -> None:
    x = drawn(0, 2, 8, 8)
    with torch.inference_mode(made == "inference"):
        given = x.clone()

    def seen(context: Context, tensor: Tensor) -> list[str]:
        with context():
            return [str(operation.func) for operation in trace_eager(lambda: model(tensor), [tensor])[1].operations]

    expected = seen(torch.no_grad, x)
    assert seen(torch.inference_mode, given) == expected
    assert seen(torch.no_grad, given) == expected


def test_a_recording_serves_the_mode_it_was_made_in() -> None:
    def step(x: Tensor) -> Tensor:
        return x * 2 if torch.is_inference_mode_enabled() else x * 3

    captured = graphs.capture(step)
    for _ in range(2):
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            called(captured, step, context, calls=2)
    assert captured.report().recordings == 3


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@pytest.mark.parametrize(
    ("model", "operator"),
    [
        (lambda x: x * 2 if torch.is_grad_enabled() else x * 3, "torch.is_grad_enabled"),
        (lambda x: (y := linear(x)) * (2 if y.requires_grad else 3), "Tensor.requires_grad"),
        (lambda x: (y := linear(x)) * (2 if y.grad_fn is not None else 3), "Tensor.grad_fn"),
        (attended, "torch.is_grad_enabled"),
        (layer, "torch.is_grad_enabled"),
    ],
)
def test_a_step_that_asks_for_the_grad_mode_agrees_with_eager(model: Any, operator: str) -> None:
    step = graphs.capture(model)
    called(step, model, torch.enable_grad, calls=2)
    (refusal,) = step.report().refusals
    assert (refusal.reason, refusal.operator) == ("autograd", operator)
    called(step, model, torch.no_grad, calls=2)
    assert step.report().replays == 2


class Cached(nn.Module):
    """Writes a cache and reads weights, as a decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(4, 8))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.cache[self.at % 4] = self.linear(x)[0]
        self.at.add_(1)
        return self.cache * 2 + x.sum()


@pytest.mark.parametrize("build", [torch.no_grad, torch.inference_mode], ids=["plain", "inference"])
@pytest.mark.parametrize("context", [torch.inference_mode, together(torch.inference_mode, autocast)], ids=["alone", "autocast"])
def test_caches_and_weights_may_be_made_in_either_mode(build: Context, context: Context) -> None:
    with build():
        torch.manual_seed(0)
        model = Cached()
        torch.manual_seed(0)
        reference = Cached()
    step = graphs.capture(model)
    for index in range(6):
        with context():
            x = drawn(index, 1, 8)
            assert_same(reference(x), step(x), f"call {index}")
    assert_same([*reference.buffers()], [*model.buffers()], "state")
    assert step.report().replays == 6, str(step.report())


def test_a_write_that_inference_tensors_do_not_allow_raises_what_eager_raises() -> None:
    with torch.inference_mode():
        model = Cached()
    step = graphs.capture(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"), torch.no_grad():
            step(torch.ones(1, 8))
    with torch.inference_mode():
        step(torch.ones(1, 8))
    assert int(model.at) == 1


def test_what_a_replay_returns_in_grad_mode_can_be_trained_on() -> None:
    step = graphs.capture(lambda x: x * 2)
    for _ in range(3):
        weight = torch.ones(2, requires_grad=True)
        (step(torch.ones(2)) * weight).sum().backward()
        assert torch.equal(weight.grad, torch.full((2,), 2.0))


def _setting(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Context:
    @contextlib.contextmanager
    def changed() -> Any:
        before = read()
        write(value)
        try:
            yield
        finally:
            write(before)

    return changed


cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
SETTINGS: dict[str, Context] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": autocast,
    "autocast-other-dtype": lambda: torch.autocast("cpu", torch.float16),
    "default-dtype": _setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default-device": lambda: torch.device("meta"),
    "deterministic": _setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "matmul-precision": _setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "attention": lambda: nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    "fused-layers": _setting(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
    "cudnn-tf32": _setting(lambda: cudnn.allow_tf32, lambda value: setattr(cudnn, "allow_tf32", value), False),
    "cudnn-deterministic": _setting(lambda: cudnn.deterministic, lambda value: setattr(cudnn, "deterministic", value), True),
    "half-reduction": _setting(
        lambda: cuda.matmul.allow_fp16_reduced_precision_reduction,
        lambda value: setattr(cuda.matmul, "allow_fp16_reduced_precision_reduction", value),
        False,
    ),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_kernels_and_steps_read_belong_to_the_key(setting: Context) -> None:
    before = ambient_of(None)
    with setting():
        assert ambient_of(None) != before
        assert ambient_of(None) == ambient_of(None)
    assert ambient_of(None) == before


def test_the_default_dtype_is_that_of_the_call() -> None:
    step = graphs.capture(lambda x: x + torch.ones(2))
    x = torch.ones(2)
    for _ in range(3):
        assert step(x).dtype is torch.float32
        with SETTINGS["default-dtype"]():
            assert step(x).dtype is torch.float64


class Doubling(TorchDispatchMode):
    """Changes what an operator gives."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.sin.default else result


class Renaming(TorchFunctionMode):
    """Calls another function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.cos(*args) if func is torch.sin else func(*args, **(kwargs or {}))


class Looking(TorchDispatchMode):
    """Changes nothing, and says so."""

    graphs_observer = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@pytest.mark.parametrize("mode", [Doubling, Renaming])
def test_a_mode_of_the_caller_sees_the_step(mode: Any) -> None:
    step = graphs.capture(lambda x: torch.sin(x))
    x = drawn(0, 3)
    for _ in range(2):
        assert torch.equal(step(x), torch.sin(x))
        with mode():
            wanted = torch.sin(x)
            assert torch.equal(step(x), wanted)
        assert not torch.equal(wanted, torch.sin(x))
    assert [(refusal.reason, refusal.operator) for refusal in step.report().refusals] == [("active-mode", mode.__name__)]


def test_a_mode_that_only_looks_on_is_no_obstacle() -> None:
    step = graphs.capture(lambda x: torch.sin(x))
    with Looking():
        for index in range(3):
            assert torch.equal(step(drawn(index, 3)), torch.sin(drawn(index, 3)))
    assert step.report().replays == 3
