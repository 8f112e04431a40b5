"""Device graphs pointed at other memory: compared with eager after each move."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import graphs
from graphs.dynamo.backend import backend_report, graphs_backend
from graphs.recording.recorder import CannotPoint

Tensor = torch.Tensor
LAYERS, HEADS, LENGTH, WIDTH = 4, 4, 64, 32


class Layer:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.length = torch.zeros(1, dtype=torch.int64, device=keys.device)


class Cache:
    def __init__(self, *layers: tuple[Tensor, Tensor]) -> None:
        self.layers = [Layer(*pair) for pair in layers]


class Decoder(nn.Module):
    """Attention over a static cache: products by the library, indexed writes, copies, reductions."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = HEADS * WIDTH
        self.projections = nn.ModuleList(nn.Linear(inner, 3 * inner) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(inner)
        self.register_buffer("scale", torch.full((inner,), 0.5))
        self.to(dtype)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        for projection, layer in zip(self.projections, cache.layers, strict=True):
            q, k, v = (part.view(-1, HEADS, 1, WIDTH) for part in projection(self.norm(x)).chunk(3, -1))
            layer.keys.index_copy_(2, layer.length, k)
            layer.values.index_copy_(2, layer.length, v)
            layer.length.add_(1)
            seen = torch.arange(LENGTH, device=x.device) < layer.length
            y = scaled_dot_product_attention(q, layer.keys.clone(), layer.values, attn_mask=seen[None, None, None])
            x = x + y.reshape(x.shape) * self.scale
        return x


def dense(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(2, HEADS, LENGTH, WIDTH, device=device, dtype=dtype)


def strided(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(2, LENGTH, HEADS, WIDTH, device=device, dtype=dtype).transpose(1, 2)


def offset(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(3, HEADS, LENGTH, WIDTH, device=device, dtype=dtype)[1:]


class Pair:
    """A captured decoder and an eager twin on one device, compared after each call."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.device, self.dtype = device, dtype
        self.model = Decoder(dtype).to(device)
        self.twin = copy.deepcopy(self.model)
        self.step = graphs.capture(self.model, **options)

    def cache(self, make: Callable[[torch.device, torch.dtype], Tensor] = dense) -> tuple[Cache, Cache]:
        made = [Cache(*((make(self.device, self.dtype), make(self.device, self.dtype)) for _ in range(LAYERS))) for _ in range(2)]
        return made[0], made[1]

    def feed(self, pair: tuple[Cache, Cache], count: int = 2) -> None:
        cache, reference = pair
        with torch.no_grad():
            for _ in range(count):
                x = torch.randn(2, HEADS * WIDTH, device=self.device, dtype=self.dtype)
                torch.testing.assert_close(self.step(x, cache), self.twin(x, reference))
                self.same(pair)

    def same(self, pair: tuple[Cache, Cache]) -> None:
        for layer, other in zip(pair[0].layers, pair[1].layers, strict=True):
            for name in ("keys", "values", "length"):
                torch.testing.assert_close(getattr(layer, name), getattr(other, name))

    def counts(self) -> tuple[int, int]:
        report = self.step.report()
        return report.recordings, report.moved


@pytest.mark.parametrize("make", [dense, strided, offset])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_caches_are_served_by_one_recording(make: Callable[..., Tensor], dtype: torch.dtype, device: torch.device) -> None:
    pair = Pair(device, dtype, strict=True)
    first = pair.cache(make)
    pair.feed(first)
    for _ in range(3):
        pair.feed(pair.cache(make))
    pair.same(first)  # nobody wrote to it
    pair.feed(first)
    assert pair.counts() == (1, 3)


def test_caches_take_turns(device: torch.device) -> None:
    pair = Pair(device, strict=True)
    caches = [pair.cache() for _ in range(3)]
    for _ in range(4):
        for cache in caches:
            pair.feed(cache, 1)
    for cache in caches:
        pair.same(cache)
    assert pair.counts() == (1, 2)


def test_replays_in_flight_keep_the_memory_they_were_launched_with(device: torch.device) -> None:
    pair = Pair(device, strict=True)
    caches = [pair.cache() for _ in range(2)]
    for cache in caches:
        pair.feed(cache, 1)
    xs = torch.randn(20, 2, HEADS * WIDTH, device=device)
    with torch.no_grad():
        got = [pair.step(x, caches[i % 2][0]) for i, x in enumerate(xs)]  # nothing waits in between
        wanted = [pair.twin(x, caches[i % 2][1]) for i, x in enumerate(xs)]
    torch.testing.assert_close(got, wanted)
    for cache in caches:
        pair.same(cache)


def test_memory_that_is_freed_and_used_by_others_is_not_written(device: torch.device) -> None:
    pair = Pair(device, strict=True)
    cache = pair.cache()
    pair.feed(cache)
    dead = weakref.ref(cache[0].layers[0].keys)
    del cache
    pair.feed(pair.cache())
    gc.collect()
    assert dead() is None
    others = [torch.full((2, HEADS, LENGTH, WIDTH), 7.0, device=device) for _ in range(4 * LAYERS)]  # where the old cache was
    for _ in range(3):
        pair.feed(pair.cache())
    assert all(bool((other == 7).all()) for other in others)
    assert pair.counts()[0] == 1


def test_one_layer_moves_while_the_others_stay(device: torch.device) -> None:
    pair = Pair(device, strict=True)
    cache = pair.cache()
    pair.feed(cache)
    for index in (1, 3, 1):
        for one in cache:
            one.layers[index].values = one.layers[index].values.clone()
        pair.feed(cache)
    assert pair.counts() == (1, 3)


def test_two_layers_that_share_memory_now_are_recorded_anew(device: torch.device) -> None:
    pair = Pair(device)
    pair.feed(pair.cache())
    shared = pair.cache()
    for one in shared:
        one.layers[1].keys = one.layers[0].keys
    pair.feed(shared)
    assert pair.counts() == (2, 0)
    pair.feed(pair.cache())
    assert pair.counts() == (2, 1)


def test_a_large_cache_moves_without_a_copy_of_it(device: torch.device) -> None:
    def write(x: Tensor, row: Tensor, cache: Cache) -> Tensor:
        cache.layers[0].keys.index_copy_(0, row, x)
        return cache.layers[0].keys[:4].sum(0)

    step = graphs.capture(write, strict=True)
    size = (1 << 16, 1024)  # 256 MiB
    for turn in range(3):
        cache = Cache((torch.zeros(size, device=device), torch.zeros(1, device=device)))
        for row in range(3):
            x = torch.full((1, 1024), float(turn + row), device=device)
            got = step(x, torch.tensor([row], device=device), cache)
            torch.testing.assert_close(got, cache.layers[0].keys[:4].sum(0))
            assert bool((cache.layers[0].keys[row] == turn + row).all())
        assert float(cache.layers[0].keys[3:].abs().sum()) == 0
    assert (step.report().recordings, step.report().moved) == (1, 2)


def assigned(model: Decoder) -> None:
    model.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()}, assign=True)


def exchanged(model: Decoder) -> None:
    model.scale = model.scale * 0.75
    for projection in model.projections:
        projection.weight.data = projection.weight.data * 1.25


def there_and_back(model: Decoder) -> None:
    model.double()
    exchanged(model)
    model.float()


@pytest.mark.parametrize("change", [assigned, exchanged, there_and_back])
def test_other_weights_are_used(change: Callable[[Decoder], None], device: torch.device) -> None:
    pair = Pair(device)
    cache, other = pair.cache(), pair.cache()
    pair.feed(cache)
    pair.feed(other)
    for _ in range(2):
        kept = [tensor.detach() for tensor in pair.model.state_dict().values()]  # so that no new one lies there
        change(pair.model)
        change(pair.twin)
        del kept
        for one in (cache, other, cache):
            pair.feed(one, 1)
    assert pair.counts()[0] == 1 and pair.step.report().refusals == ()


def test_copies_and_fills_of_the_driver_move(device: torch.device) -> None:
    def step_of(x: Tensor, state: Cache) -> Tensor:
        layer = state.layers[0]
        layer.values.copy_(layer.keys)
        layer.keys.zero_()
        layer.keys[:4].copy_(x)
        return layer.values * 2

    step = graphs.capture(step_of, strict=True)
    for turn in range(4):
        state = [Cache((torch.full((64,), 1.0 + turn, device=device), torch.zeros(64, device=device))) for _ in range(2)]
        for value in (1.0, 2.0):
            x = torch.full((4,), value, device=device)
            torch.testing.assert_close(step(x, state[0]), step_of(x, state[1]))
            torch.testing.assert_close(state[0].layers[0].keys, state[1].layers[0].keys)
            torch.testing.assert_close(state[0].layers[0].values, state[1].layers[0].values)
    assert (step.report().recordings, step.report().moved) == (1, 3)


def test_a_driver_that_refuses_leads_to_another_recording(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphs.recording.cuda_graph import CudaRecording

    def refuse(self: CudaRecording, recorded: Any, storages: Any) -> None:
        raise CannotPoint("the driver refused")

    monkeypatch.setattr(CudaRecording, "point", refuse)
    pair = Pair(device)
    for _ in range(2):
        pair.feed(pair.cache())
    report = pair.step.report()
    assert (report.recordings, report.moved) == (1, 0)
    assert [refusal.reason for refusal in report.refusals] == ["moved-static-tensor"]


@pytest.mark.parametrize("options", [{"compiler": "inductor"}, {"outputs": "borrowed"}, {"verify": "always"}])
def test_options_do_not_stand_in_the_way(options: dict[str, Any], device: torch.device) -> None:
    pair = Pair(device, **options)
    for _ in range(3):
        pair.feed(pair.cache())
    assert pair.counts() == (1, 2) and pair.step.report().refusals == ()


@pytest.mark.parametrize("compiler", ["aten", "inductor"])
def test_the_backend_points_its_graphs(compiler: str, device: torch.device) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 64)
            self.register_buffer("cache", torch.zeros(64))

        def forward(self, x: Tensor) -> Tensor:
            self.cache.add_(x.sum(0))
            return self.layer(x) + self.cache

    torch.compiler.reset()
    model, twin = Step().to(device), Step().to(device)
    step = torch.compile(model, backend=graphs_backend, options={"compiler": compiler})
    kept = []
    with torch.no_grad():
        for turn in range(5):
            x = torch.randn(4, 64, device=device)
            torch.testing.assert_close(step(x), twin(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model.cache, twin.cache)
            kept.append((model.cache, model.layer.weight.data))
            model.cache = model.cache.clone()
            if turn % 2:
                model.layer.weight.data = model.layer.weight.data * 1.5
                twin.layer.weight.data.mul_(1.5)
    piece = backend_report().pieces[-1]
    assert (piece.recordings, piece.moved, piece.refusals) == (1, 4, ())
