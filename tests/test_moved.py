"""Static tensors that moved: the recording is pointed at them, gives what eager gives, and keeps nothing of the old ones."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.recording.cpu_tape import TapeRecording
from graphs.recording.recorder import CannotPoint
from graphs.state.storage import tensors_in
from tests.parity import assert_same

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")


class Layer:
    """One layer of a cache, with values that the step reads."""

    def __init__(self, keys: Tensor, limit: int = 8) -> None:
        self.keys, self.limit = keys, limit
        self.length = torch.zeros((), dtype=torch.int64)


class Cache:
    def __init__(self, *keys: Tensor, limit: int = 8) -> None:
        self.layers = [Layer(tensor, limit) for tensor in keys]


class Decoder(nn.Module):
    """Writes one row per layer and reads them all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 0.5))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        for layer, linear in zip(cache.layers, (self.first, self.second), strict=True):
            layer.keys.index_copy_(0, layer.length[None], x)
            layer.length.add_(1)
            x = linear(layer.keys[: layer.limit]).sum(0, keepdim=True) * self.scale
        return x


def fresh(limit: int = 8, layers: int = 2) -> Cache:
    return Cache(*(torch.zeros(8, 4) for _ in range(layers)), limit=limit)


def inputs(count: int, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(count, 1, 4, generator=torch.Generator().manual_seed(seed)))


class Pair:
    """A captured decoder and an eager twin, fed alike and compared after each call."""

    def __init__(self, **options: Any) -> None:
        self.model = Decoder()
        self.twin = copy.deepcopy(self.model)
        self.step = graphs.capture(self.model, **options)

    def feed(self, cache: Cache, reference: Cache, xs: list[Tensor]) -> None:
        with torch.no_grad():
            for x in xs:
                assert_same([self.twin(x, reference)], [self.step(x, cache)], "output")
                self.same(cache, reference)

    def same(self, cache: Cache, reference: Cache) -> None:
        for layer, other in zip(cache.layers, reference.layers, strict=True):
            assert_same([other.keys, other.length], [layer.keys, layer.length], "cache")

    def numbers(self) -> tuple[int, int]:
        report = self.step.report()
        return report.recordings, report.moved


def test_a_new_cache_is_served_by_the_recording_of_the_old_one() -> None:
    pair = Pair(strict=True)
    for seed in range(4):
        pair.feed(fresh(), fresh(), inputs(3, seed))
    assert pair.numbers() == (1, 3)
    report = pair.step.report()
    assert report.replays == 12 and report.eager_calls == 0 and len(report.keys) == 1 and report.keys[0].replays == 12
    assert "pointed at other tensors: 3x" in str(report)


def test_the_old_cache_is_not_written_any_more_and_still_serves_afterwards() -> None:
    pair, first, reference = Pair(strict=True), fresh(), fresh()
    pair.feed(first, reference, inputs(2))
    pair.feed(fresh(), fresh(), inputs(3, 7))
    pair.same(first, reference)
    pair.feed(first, reference, inputs(2, 9))
    assert pair.numbers() == (1, 1)


def test_caches_take_turns_without_being_recorded_or_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(strict=True)
    caches = [(fresh(), fresh()) for _ in range(3)]
    for cache, reference in caches:
        pair.feed(cache, reference, inputs(1))
    monkeypatch.setattr("graphs.dispatch.moved.compare_replay", None)
    for turn in range(4):
        for number, (cache, reference) in enumerate(caches):
            pair.feed(cache, reference, inputs(1, 10 * turn + number))
    assert pair.numbers() == (1, 2)
    pair.feed(fresh(), fresh(), inputs(2))  # nor is a further one compared
    assert pair.numbers() == (1, 3)


def test_a_cache_that_died_is_freed_and_its_recording_serves_the_next() -> None:
    pair, cache, reference = Pair(strict=True), fresh(), fresh()
    pair.feed(cache, reference, inputs(2))
    dead = [weakref.ref(cache.layers[0].keys), weakref.ref(cache)]
    del cache
    other = fresh()
    with torch.no_grad():
        pair.step(
            torch.randn(1, 4), Cache(*(layer.keys for layer in other.layers))
        )  # another key, or not: the occasion to tidy up
    gc.collect()
    assert [reference() for reference in dead] == [None, None]
    pair.feed(fresh(), fresh(), inputs(3))
    assert pair.numbers()[0] == 1 and pair.step.report().replays == 6


def test_a_dead_cache_is_let_go_by_a_call_of_another_kind_and_the_recording_survives() -> None:
    pair, cache, reference = Pair(), fresh(), fresh()
    pair.feed(cache, reference, inputs(2))
    dead = weakref.ref(cache.layers[0].keys)
    del cache
    with torch.no_grad():
        pair.step(torch.randn(1, 4).double().float()[:, ::1], fresh(limit=4))  # another recording, as after a prompt
    gc.collect()
    assert dead() is None
    pair.feed(fresh(), fresh(), inputs(3))
    assert pair.numbers() == (2, 1)


def another_limit() -> tuple[Cache, Cache]:
    return fresh(limit=4), fresh(limit=4)


def another_size() -> tuple[Cache, Cache]:
    return Cache(torch.zeros(9, 4), torch.zeros(9, 4)), Cache(torch.zeros(9, 4), torch.zeros(9, 4))


def other_strides() -> tuple[Cache, Cache]:
    return Cache(*(torch.zeros(4, 8).t() for _ in range(2))), Cache(*(torch.zeros(4, 8).t() for _ in range(2)))


def one_memory() -> tuple[Cache, Cache]:
    shared, other = torch.zeros(8, 4), torch.zeros(8, 4)
    return Cache(shared, shared), Cache(other, other)


def overlapping() -> tuple[Cache, Cache]:
    def halves() -> Cache:
        whole = torch.zeros(12, 4)
        return Cache(whole[:8], whole[4:])

    return halves(), halves()


def another_class() -> tuple[Cache, Cache]:
    class Other(Cache):
        pass

    return Other(torch.zeros(8, 4), torch.zeros(8, 4)), fresh()


def an_attribute_more() -> tuple[Cache, Cache]:
    found = fresh(), fresh()
    for cache in found:
        cache.layers[0].keys.limit = 3  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    "make", [another_limit, another_size, other_strides, one_memory, overlapping, another_class, an_attribute_more]
)
def test_a_cache_that_is_other_in_more_than_its_address_is_recorded_anew(make: Callable[[], tuple[Cache, Cache]]) -> None:
    pair = Pair()
    pair.feed(fresh(), fresh(), inputs(3))
    cache, reference = make()
    pair.feed(cache, reference, inputs(3))
    assert pair.step.report().moved == 0
    pair.feed(fresh(), fresh(), inputs(3))  # the first recording is still there
    assert pair.step.report().moved == 1


def test_layers_that_shared_memory_when_recorded_have_to_share_it_again() -> None:
    pair = Pair()
    pair.feed(*one_memory(), inputs(3))
    pair.feed(fresh(), fresh(), inputs(3))
    assert pair.step.report().moved == 0
    pair.feed(*one_memory(), inputs(3))
    assert pair.step.report().moved == 1


def test_strided_layers_move() -> None:
    pair = Pair(strict=True)
    for seed in range(3):
        pair.feed(*other_strides(), inputs(2, seed))
    assert pair.numbers() == (1, 2)


def test_views_move_with_the_memory_that_they_lie_in() -> None:
    def views() -> Cache:
        whole = torch.zeros(2, 8, 4)
        return Cache(whole[0], whole[1])

    pair = Pair(strict=True)
    for seed in range(3):
        pair.feed(views(), views(), inputs(2, seed))
    assert pair.numbers() == (1, 2)


def test_one_layer_moves_while_the_other_stays() -> None:
    pair, cache, reference = Pair(), fresh(), fresh()
    pair.feed(cache, reference, inputs(2))
    for turn in range(3):
        old = weakref.ref(cache.layers[1].keys)
        cache.layers[1].keys = cache.layers[1].keys.clone()
        reference.layers[1].keys = reference.layers[1].keys.clone()
        pair.feed(cache, reference, inputs(2, turn))
        gc.collect()
        assert old() is None
    assert pair.numbers() == (1, 3)


def load_assigned(model: Decoder, scale: float) -> None:
    model.load_state_dict({name: value * scale for name, value in model.state_dict().items()}, assign=True)


def data_exchanged(model: Decoder, scale: float) -> None:
    model.first.weight.data = model.first.weight.data * scale


def buffer_exchanged(model: Decoder, scale: float) -> None:
    model.scale = model.scale * scale


def parameter_exchanged(model: Decoder, scale: float) -> None:
    model.second.bias = nn.Parameter(model.second.bias.detach() * scale)


def converted_and_back(model: Decoder, scale: float) -> None:
    model.double()
    data_exchanged(model, scale)
    model.float()


@pytest.mark.parametrize("exchange", [load_assigned, data_exchanged, buffer_exchanged, parameter_exchanged, converted_and_back])
def test_other_weights_are_used_by_the_next_call_of_the_same_recording(exchange: Callable[[Decoder, float], None]) -> None:
    pair, cache, reference = Pair(), fresh(), fresh()
    other, other_reference = fresh(), fresh()
    pair.feed(cache, reference, inputs(2))
    pair.feed(other, other_reference, inputs(1))
    for turn, scale in enumerate((1.5, 0.5, 1.0)):
        gone = weakref.ref(pair.model.first.weight)
        for model in (pair.model, pair.twin):
            exchange(model, scale)
        pair.feed(cache, reference, inputs(1, turn))
        pair.feed(other, other_reference, inputs(1, turn + 5))
        pair.feed(cache, reference, inputs(1, turn + 7))
        gc.collect()
        assert gone() is None or gone() is pair.model.first.weight, "the weight that was exchanged is kept"
    assert pair.step.report().recordings == 1 and pair.step.report().moved >= 4


def test_a_weight_of_another_dtype_is_recorded_anew_and_the_first_recording_found_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    twin, step = copy.deepcopy(model), graphs.capture(model)
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.float32, torch.float64, torch.float32):
            for one in (model, twin):
                one.to(dtype)
            for x in inputs(3):
                assert_same([twin(x.to(dtype))], [step(x.to(dtype))], "output")
    assert step.report().recordings == 2


def test_a_static_argument_that_moved_is_read_and_written_where_it_is_now() -> None:
    def write(x: Tensor, cache: Tensor, table: Tensor) -> Tensor:
        cache.add_(x)
        return cache * table

    step = graphs.capture(write, static=("table",), strict=True)
    for turn in range(5):
        cache, table = torch.full((3,), float(turn)), torch.full((3,), 2.0 + turn)
        for value in (1.0, 2.0):
            x, wanted = torch.full((3,), value), cache + value
            assert torch.equal(step(x, cache, table), wanted * table) and torch.equal(cache, wanted)
    assert (step.report().recordings, step.report().moved) == (1, 4)


def test_a_padded_step_is_pointed_for_every_batch_of_its_bucket() -> None:
    def look_up(x: Tensor, cache: Cache) -> Tensor:
        return x @ cache.layers[0].keys.t() + cache.layers[1].keys.sum()

    step = graphs.capture(look_up, buckets=[4], batch_dims={"x": 0})
    for seed in range(3):
        torch.manual_seed(seed)
        cache = Cache(torch.randn(8, 4), torch.randn(8, 4))
        for rows in (3, 2, 4):
            x = torch.randn(rows, 4)
            assert_same([look_up(x, cache)], [step(x, cache)], "output")
    assert (step.report().recordings, step.report().moved) == (1, 2) and step.report().refusals == ()


def test_one_cache_given_twice_is_another_call_than_two() -> None:
    def both(x: Tensor, a: Cache, b: Cache) -> Tensor:
        a.layers[0].keys.add_(x)
        return a.layers[0].keys + b.layers[0].keys

    step = graphs.capture(both)

    def call(a: Cache, b: Cache) -> None:
        x, before = torch.ones(1, 4), (a.layers[0].keys.clone(), b.layers[0].keys.clone())
        wanted = before[0] + 1 + (before[1] + 1 if a is b else before[1])
        assert torch.equal(step(x, a, b), wanted)

    for _ in range(2):
        call(fresh(), fresh())
        one = fresh()
        call(one, one)
    assert (step.report().recordings, step.report().moved) == (2, 2)


def test_a_replay_that_differs_once_it_is_pointed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a library that keeps an address which no parameter shows: one instruction is left behind."""
    point = TapeRecording.point

    def addresses(self: TapeRecording) -> list[list[int]]:
        return [[tensor.data_ptr() for tensor in tensors_in(list(i.keep[:2])) if tensor.data_ptr()] for i in self._program]

    def forget_a_layer(self: TapeRecording, recorded: Any, storages: Any) -> None:
        calls, before = list(self._calls), addresses(self)
        point(self, recorded, storages)
        index = max(i for i, (old, new) in enumerate(zip(before, addresses(self), strict=True)) if old != new)
        self._calls[index] = calls[index]

    monkeypatch.setattr(TapeRecording, "point", forget_a_layer)
    pair, cache = Pair(), fresh()
    pair.feed(cache, fresh(), inputs(3))
    pair.feed(fresh(), fresh(), inputs(3, 2))
    report = pair.step.report()
    assert (report.recordings, report.moved) == (1, 0)
    assert [refusal.reason for refusal in report.refusals] == ["moved-static-tensor"]
    assert "once it is pointed at the tensors of this call" in report.refusals[0].detail


def test_a_recording_that_refuses_is_recorded_anew_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: TapeRecording, recorded: Any, storages: Any) -> None:
        raise CannotPoint("the driver refused")

    monkeypatch.setattr(TapeRecording, "point", refuse)
    pair = Pair()
    for seed in range(3):
        pair.feed(fresh(), fresh(), inputs(3, seed))
    report = pair.step.report()
    assert (report.recordings, report.moved, report.replays) == (1, 0, 9)
    assert [(refusal.reason, refusal.count, refusal.recorded) for refusal in report.refusals] == [("moved-static-tensor", 0, 2)]


def test_a_recording_that_refuses_to_go_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, first, reference, second, other = Pair(), fresh(), fresh(), fresh(), fresh()
    pair.feed(first, reference, inputs(2))
    pair.feed(second, other, inputs(2))
    point = TapeRecording.point

    def once(self: TapeRecording, recorded: Any, storages: Any) -> None:
        monkeypatch.setattr(TapeRecording, "point", point)
        raise CannotPoint("the driver refused")

    monkeypatch.setattr(TapeRecording, "point", once)
    pair.feed(first, reference, inputs(3))
    pair.feed(second, other, inputs(3))
    assert pair.step.report().eager_calls == 0


def test_a_cache_with_a_function_of_its_own_is_another_cache() -> None:
    step = graphs.capture(lambda x, cache: cache.change(cache.layers[0].keys.add_(x)))
    for factor in (1.0, 2.0, 3.0):
        cache = fresh()
        cache.change = lambda y, factor=factor: y * factor  # type: ignore[attr-defined]
        for count in (1, 2):
            assert torch.equal(step(torch.ones(1, 4), cache), torch.full((8, 4), factor * count))


def test_a_value_that_a_step_reads_of_the_new_cache_is_guarded() -> None:
    pair = Pair()
    pair.feed(fresh(), fresh(), inputs(3))
    cache, reference = fresh(), fresh()
    pair.feed(cache, reference, inputs(2))
    for one in (cache, reference):
        one.layers[1].limit = 3
    pair.feed(cache, reference, inputs(2))
    assert pair.step.report().moved == 1


def test_what_was_computed_from_a_weight_is_noticed_when_the_weight_is_another() -> None:
    class Prepared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.made = nn.Parameter(torch.ones(3)), (None, None)

        def forward(self, x: Tensor) -> Tensor:
            if self.made[0] is not self.weight:
                self.made = self.weight, self.weight * 2
            return x * self.made[1] + self.weight

    model = Prepared()
    step = graphs.capture(model)
    with torch.no_grad():
        for value in (1.0, 1.0, 3.0, 4.0):
            model.weight = nn.Parameter(torch.full((3,), value))
            for _ in range(3):
                assert torch.equal(step(torch.ones(3)), torch.full((3,), 3 * value))


def test_adapters_take_turns() -> None:
    pair, cache, reference = Pair(), fresh(), fresh()
    adapters = [torch.randn(4, 4) for _ in range(2)]
    pair.feed(cache, reference, inputs(2))
    for turn in range(6):
        for model in (pair.model, pair.twin):
            model.second.weight.data = adapters[turn % 2]
        for _ in range(2):
            cache.layers[0].length.zero_(), cache.layers[1].length.zero_()
            reference.layers[0].length.zero_(), reference.layers[1].length.zero_()
            pair.feed(cache, reference, inputs(1, turn))
    assert pair.step.report().recordings == 1 and pair.step.report().moved == 6


def test_a_weight_that_moves_at_every_call_is_refused_by_name() -> None:
    model = nn.Linear(3, 3)
    step = graphs.capture(model)
    with torch.no_grad():
        for _ in range(8):
            model.weight.data = torch.randn(3, 3)
            x = torch.ones(1, 3)
            assert_same([nn.functional.linear(x, model.weight, model.bias)], [step(x)], "output")
    refusals = step.report().refusals
    assert {refusal.reason for refusal in refusals} == {"moved-static-tensor"} and step.report().eager_calls >= 4
