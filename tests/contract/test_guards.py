"""A Python value that the step reads, exchanged between two calls, is used by the very next one."""

from __future__ import annotations

import array
import builtins
import collections
import contextlib
import contextvars
import ctypes
import dataclasses
import enum
import functools
import logging
import operator
import os
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.guards.container_guards import MappingGuard, SequenceGuard
from graphs.guards.python_guards import Guards
from graphs.objects.dict_watch import shared_watch

Tensor = torch.Tensor
Step = Callable[[Tensor], Any]
Change = Callable[[], object]
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed", "ignore::DeprecationWarning")


class Value(NamedTuple):
    """A step that reads a value, and what exchanges it."""

    step: Step
    change: Change


class Holder:
    """Something with attributes."""

    scale: Any = 1.0

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def factor(self) -> float:
        return 1.0


class Other(Holder):
    def factor(self) -> float:
        return 3.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Meta(type):
    unit = 1.0


class OfMeta(metaclass=Meta):
    pass


class Factor(float):
    unit: float


class Mode(enum.Enum):
    LOW = (1.0,)

    def __init__(self, value: float) -> None:
        self.weight = value


@dataclasses.dataclass(slots=True)
class Point:
    scale: float = 1.0


class Answers:
    """An object that computes what is asked for."""

    def __init__(self) -> None:
        self.held = {"scale": 1.0}

    def __getattr__(self, name: str) -> float:
        return self.held[name]


settings = types.ModuleType("settings_of_a_test")
settings.__dict__.update(scale=1.0, nested=types.SimpleNamespace(scale=1.0), table={"scale": 1.0})
variable: contextvars.ContextVar[float] = contextvars.ContextVar("variable", default=1.0)
logger = logging.getLogger("graphs.tests.guards")
factor_of_the_module = 1.0
local = threading.local()


def attribute() -> Value:
    held = Holder()
    return Value(lambda x: x * held.scale, lambda: setattr(held, "scale", 2.0))


def attribute_that_hides_the_class() -> Value:
    held = Holder()
    assert "scale" not in vars(held)
    return Value(lambda x: x * held.scale, lambda: vars(held).update(scale=2.0))


def class_attribute() -> Value:
    kind = type("Kind", (), {"scale": 1.0, "__module__": __name__})
    return Value(lambda x: x * kind.scale, lambda: setattr(kind, "scale", 2.0))  # type: ignore[attr-defined]


def method_of_the_class() -> Value:
    kind: Any = type("Kind", (Holder,), {"__module__": __name__})
    held = kind()
    return Value(lambda x: x * held.factor(), lambda: setattr(kind, "factor", lambda self: 2.0))


def the_class_itself() -> Value:
    held = Holder()
    return Value(lambda x: x * held.factor(), lambda: setattr(held, "__class__", Other))


def metaclass() -> Value:
    return Value(lambda x: x * OfMeta.unit, lambda: setattr(Meta, "unit", Meta.unit + 1))


def slot() -> Value:
    held = Slotted()
    return Value(lambda x: x * held.scale, lambda: setattr(held, "scale", 2.0))


def slot_of_a_dataclass() -> Value:
    held = Point()
    return Value(lambda x: x * held.scale, lambda: setattr(held, "scale", 2.0))


def computed_attribute() -> Value:
    held = Holder(scale_0=1.0)
    return Value(lambda x: x * getattr(held, f"scale_{0}"), lambda: setattr(held, "scale_0", 2.0))


def attribute_by_getter() -> Value:
    held, get = Holder(), operator.attrgetter("scale")
    return Value(lambda x: x * get(held), lambda: setattr(held, "scale", 2.0))


def attribute_by_partial() -> Value:
    held = Holder()
    get = functools.partial(getattr, held, "scale")
    return Value(lambda x: x * get(), lambda: setattr(held, "scale", 2.0))


def attribute_in_a_format() -> Value:
    held = Holder()
    return Value(lambda x: x * float("{0.scale}".format(held)), lambda: setattr(held, "scale", 2.0))  # noqa: UP030, UP032


def attribute_by_getattr_of_the_class() -> Value:
    held = Answers()
    return Value(lambda x: x * held.scale, lambda: held.held.update(scale=2.0))


def attribute_of_a_number() -> Value:
    held = Factor(2)
    held.unit = 1.0
    return Value(lambda x: x * held.unit, lambda: setattr(held, "unit", 2.0))


def member_of_an_enumeration() -> Value:
    Mode.LOW.weight = 1.0
    return Value(lambda x: x * Mode.LOW.weight, lambda: setattr(Mode.LOW, "weight", 2.0))


def number_for_a_number_of_another_type() -> Value:
    held = Holder(scale=2)
    return Value(lambda x: x.int() * held.scale, lambda: setattr(held, "scale", 2.0))


def negative_zero() -> Value:
    held = Holder(scale=0.0)
    return Value(lambda x: 1 / (x.abs() * held.scale), lambda: setattr(held, "scale", -0.0))


def dict_entry() -> Value:
    held = {"scale": 1.0}
    return Value(lambda x: x * held["scale"], lambda: held.update(scale=2.0))


def dict_key_of_another_type() -> Value:
    held: dict[Any, float] = {1: 2.0}
    return Value(lambda x: x.int() * next(iter(held)), lambda: (held.clear(), held.update({1.0: 2.0})))


def dict_order() -> Value:
    held = {"a": 2.0, "b": 3.0}
    return Value(lambda x: x * next(iter(held.values())), lambda: held.update(a=held.pop("a")))


def ordered_dict_order() -> Value:
    held = collections.OrderedDict(a=2.0, b=3.0)
    return Value(lambda x: x * next(iter(held.values())), lambda: held.move_to_end("a"))


def special_method_bound_to_a_list() -> Value:
    held = [1.0]
    count = held.__len__
    return Value(lambda x: x * count(), lambda: held.append(2.0))


def dict_by_bound_method() -> Value:
    held = {"scale": 1.0}
    get = held.get
    return Value(lambda x: x * get("scale"), lambda: held.update(scale=2.0))  # type: ignore[operator]


def dict_by_view() -> Value:
    held = {"scale": 1.0}
    values = held.values()
    return Value(lambda x: x * sum(values), lambda: held.update(scale=2.0))


def chained_dict() -> Value:
    held = {"scale": 1.0}
    chain = collections.ChainMap({}, held)
    return Value(lambda x: x * chain["scale"], lambda: held.update(scale=2.0))


def factory_of_a_default_dict() -> Value:
    held: Any = collections.defaultdict(lambda: 1.0)
    return Value(lambda x: x * held.default_factory(), lambda: setattr(held, "default_factory", lambda: 2.0))


def list_item() -> Value:
    held = [1.0]
    return Value(lambda x: x * held[0], lambda: held.__setitem__(0, 2.0))


def list_length() -> Value:
    held = [1.0]
    return Value(lambda x: x * len(held), lambda: held.append(1.0))


def list_in_a_tuple() -> Value:
    held = ([1.0],)
    return Value(lambda x: x * held[0][0], lambda: held[0].__setitem__(0, 2.0))


def long_list() -> Value:
    held = [1.0] * 5000
    return Value(lambda x: x * sum(held), lambda: held.__setitem__(4000, 2.0))


def deque_item() -> Value:
    held = collections.deque([1.0])
    return Value(lambda x: x * held[0], lambda: held.appendleft(2.0))


def set_item() -> Value:
    held = set(range(40))
    return Value(lambda x: x * (2 if 1 in held else 3), lambda: (held.discard(1), held.add(100)))


def set_of_equal_numbers() -> Value:
    held: set[Any] = {1}
    return Value(lambda x: x.int() * next(iter(held)), lambda: (held.clear(), held.add(1.0)))


def default_of_a_function() -> Value:
    def step(x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale

    return Value(step, lambda: setattr(step, "__defaults__", (2.0,)))


def keyword_default() -> Value:
    def inner(x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x * scale

    return Value(lambda x: inner(x), lambda: inner.__kwdefaults__.update(scale=2.0))


def code_of_a_function() -> Value:
    def inner(x: Tensor) -> Tensor:
        return x * 1.0

    return Value(lambda x: inner(x), lambda: setattr(inner, "__code__", (lambda x: x * 2.0).__code__))


def attribute_of_a_function() -> Value:
    def inner(x: Tensor) -> Tensor:
        return x * inner.scale  # type: ignore[attr-defined, no-any-return]

    inner.scale = 1.0  # type: ignore[attr-defined]
    return Value(lambda x: inner(x), lambda: setattr(inner, "scale", 2.0))


def closure_below_a_decorator() -> Value:
    scale = 1.0

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        return x * scale

    def change() -> None:
        nonlocal scale
        scale = 2.0

    return Value(step, change)


def closure_of_a_context_manager() -> Value:
    scale = 1.0

    @contextlib.contextmanager
    def scaled() -> Any:
        yield scale

    def step(x: Tensor) -> Tensor:
        with scaled() as factor:
            return x * factor

    def change() -> None:
        nonlocal scale
        scale = 2.0

    return Value(step, change)


def function_that_is_dispatched() -> Value:
    @functools.singledispatch
    def scaled(x: Any) -> Any:
        return x * 1.0

    return Value(lambda x: scaled(x), lambda: scaled.register(Tensor, lambda x: x * 2.0))


def global_of_the_module() -> Value:
    return Value(lambda x: x * factor_of_the_module, lambda: globals().update(factor_of_the_module=factor_of_the_module + 1))


def name_that_hides_a_builtin() -> Value:
    return Value(lambda x: x * len((1, 2)), lambda: globals().update(len=lambda _: 5))


def builtin() -> Value:
    vars(builtins)["scale_of_a_test"] = 1.0
    return Value(lambda x: x * scale_of_a_test, lambda: vars(builtins).update(scale_of_a_test=2.0))  # type: ignore[name-defined]  # noqa: F821


def attribute_of_another_module() -> Value:
    return Value(lambda x: x * settings.scale, lambda: setattr(settings, "scale", settings.scale + 1))


def object_of_another_module() -> Value:
    return Value(lambda x: x * settings.nested.scale, lambda: setattr(settings.nested, "scale", settings.nested.scale + 1))


def module_imported_by_the_step() -> Value:
    sys.modules["settings_of_a_test"] = settings

    def step(x: Tensor) -> Tensor:
        from settings_of_a_test import scale

        return x * scale

    return Value(step, lambda: setattr(settings, "scale", settings.scale + 1))


def environment() -> Value:
    os.environ["SCALE_OF_A_TEST"] = "1"
    return Value(lambda x: x * int(os.environ["SCALE_OF_A_TEST"]), lambda: os.environ.update(SCALE_OF_A_TEST="2"))


def context_variable() -> Value:
    return Value(lambda x: x * variable.get(), lambda: variable.set(variable.get() + 1))


def thread_local() -> Value:
    local.scale = 1.0
    return Value(lambda x: x * local.scale, lambda: setattr(local, "scale", 2.0))


def level_of_a_logger() -> Value:
    logger.setLevel(logging.INFO)
    return Value(lambda x: x * (2 if logger.isEnabledFor(logging.DEBUG) else 3), lambda: logger.setLevel(logging.DEBUG))


def setting_of_torch() -> Value:
    before = torch.get_num_threads()
    return Value(lambda x: x * torch.get_num_threads(), lambda: torch.set_num_threads(before + 1))


def numpy_item() -> Value:
    held = numpy.array([1.0])
    return Value(lambda x: x * float(held[0]), lambda: held.__setitem__(0, 2.0))


def numpy_shape() -> Value:
    held = numpy.arange(6.0)
    return Value(lambda x: x * held.shape[0], lambda: setattr(held, "shape", (2, 3)))


def numpy_objects() -> Value:
    held = numpy.array([1.0, None], dtype=object)
    return Value(lambda x: x * held[0], lambda: held.__setitem__(0, 2.0))


def array_item() -> Value:
    held = array.array("f", [1.0])
    return Value(lambda x: x * held[0], lambda: held.__setitem__(0, 2.0))


def bytes_in_a_view() -> Value:
    held = bytearray([1, 1])
    view = memoryview(held)[::2]
    return Value(lambda x: x * view[0], lambda: held.__setitem__(0, 2))


def number_of_ctypes() -> Value:
    held = ctypes.c_double(1.0)
    return Value(lambda x: x * held.value, lambda: setattr(held, "value", 2.0))


def hook_of_a_submodule() -> Value:
    model = nn.Sequential(nn.ReLU())
    return Value(model, lambda: model[0].register_forward_hook(lambda module, args, output: output * 2))


def training_flag_of_a_submodule() -> Value:
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    return Value(model, lambda: model[0].train())


def attribute_of_a_library_module() -> Value:
    model = nn.Sequential(nn.LayerNorm(3))
    return Value(model, lambda: setattr(model[0], "eps", 1.0))


def submodule() -> Value:
    model = nn.Sequential(nn.ReLU())
    return Value(model, lambda: model.__setitem__(0, nn.Tanh()))


def appended_submodule() -> Value:
    model = nn.Sequential(nn.ReLU())
    return Value(model, lambda: model.append(nn.Tanh()))


def forward_of_a_submodule() -> Value:
    model = nn.Sequential(nn.ReLU())
    return Value(model, lambda: setattr(model[0], "forward", lambda x: x * 5))


def data_of_one_parameter_of_many() -> Value:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)])
    return Value(model, lambda: setattr(model[37].weight, "data", torch.eye(3)))


def shape_of_a_buffer_that_is_not_read() -> Value:
    held = torch.ones(4, 4)
    return Value(lambda x: x * held.shape[0], lambda: held.resize_(8, 4))


def gradient_of_a_parameter() -> Value:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return Value(lambda x: x + weight.grad, lambda: setattr(weight, "grad", torch.full((3,), 2.0)))


VALUES = [value for value in list(globals().values()) if getattr(value, "__annotations__", {}).get("return") == "Value"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("make", VALUES, ids=lambda make: make.__name__)
def test_a_value_that_changes_is_used_by_the_next_call(make: Callable[[], Value], context: Any) -> None:
    value, threads, x = make(), torch.get_num_threads(), torch.tensor([[1.5, -2.0, 4.0], [2.5, 1.0, -8.0]])
    captured = graphs.capture(value.step)
    try:
        with context():
            for _ in range(4):
                torch.testing.assert_close(captured(x), value.step(x), rtol=0, atol=0)
            assert captured.report().replays >= 3, captured.report()  # a first call may fill a cache
            before = value.step(x)
            value.change()
            wanted = value.step(x)
            assert wanted.dtype != before.dtype or not torch.equal(before, wanted), "the change changes nothing"
            torch.testing.assert_close(captured(x), wanted, rtol=0, atol=0)
    finally:
        globals().pop("len", None)
        torch.set_num_threads(threads)


def test_an_attribute_that_is_only_stored_is_stored_by_the_next_call() -> None:
    held = Holder(seen=False)

    def step(x: Tensor) -> Tensor:
        held.seen = True  # type: ignore[attr-defined]
        return x * 2

    captured = graphs.capture(step)
    for _ in range(4):
        captured(torch.ones(2))
    held.seen = False  # type: ignore[attr-defined]
    captured(torch.ones(2))
    assert held.seen  # type: ignore[attr-defined]


def test_a_value_that_nothing_reads_may_change() -> None:
    held = Holder(steps=0)
    captured = graphs.capture(lambda x: x * held.scale)
    for step in range(6):
        held.steps = step  # type: ignore[attr-defined]
        captured(torch.ones(2))
    assert captured.report().replays == 6 and captured.report().refusals == ()


@pytest.mark.parametrize("iterate", [lambda: iter(map(float, range(99))), lambda: (float(i) for i in range(99))])
def test_a_step_that_moves_an_iterator_on_runs_eagerly(iterate: Callable[[], Any]) -> None:
    wanted, moved = iterate(), iterate()
    captured = graphs.capture(lambda x: x * next(moved))
    for _ in range(6):
        assert captured(torch.ones(1)).item() == next(wanted)
    assert captured.report().replays == 0
    assert {refusal.reason for refusal in captured.report().refusals} <= {"unguarded-read", "changing-value"}


class Loud:
    """Objects that tell when anything of theirs runs."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")

    def __len__(self) -> int:
        raise AssertionError("measured")

    def __iter__(self) -> Any:
        raise AssertionError("gone through")

    def __repr__(self) -> str:
        raise AssertionError("printed")

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise AssertionError("asked for its class")


def test_looking_at_objects_runs_none_of_their_code() -> None:
    held = Holder(loud=Loud(), table={"loud": Loud()}, items=[Loud()])
    captured = graphs.capture(lambda x: x * (held.scale if (held.loud, held.table, held.items) else 0))  # type: ignore[attr-defined]
    for _ in range(3):
        captured(torch.ones(2))
    held.items.append(Loud())  # type: ignore[attr-defined]
    captured(torch.ones(2))
    assert captured.report().replays == 4


class Expensive(collections.OrderedDict[str, Any]):
    """A table whose entries are made when somebody asks for them, as ``ACT2FN`` of transformers is."""

    made = 0

    def __getitem__(self, key: str) -> Any:
        Expensive.made += 1
        return super().__getitem__(key)()


def test_a_table_that_makes_its_entries_is_left_as_it_is() -> None:
    table = Expensive(relu=nn.ReLU, tanh=nn.Tanh)
    activation = table["relu"]
    Expensive.made = 0
    captured = graphs.capture(lambda x: activation(x) * len(table))
    for _ in range(3):
        captured(torch.ones(2))
    assert Expensive.made == 0 and list(dict.values(table)) == [nn.ReLU, nn.Tanh] and captured.report().replays == 3


def test_only_entries_under_names_that_are_read_count() -> None:
    guard = MappingGuard("self.{}", held := {"read": 1, "other": 2}, {"read"}.__contains__)
    held["other"] = 3
    held["new"] = 4
    assert guard.difference() is None
    held["read"] = 5
    found = guard.difference()
    assert found is not None and (found.path, found.before, found.after) == ("self.read", "1", "5")


def test_equal_objects_made_anew_are_no_change() -> None:
    held = [float("1e3")]
    guards = Guards([], [SequenceGuard("held[{!r}]", held, list(held))])
    for _ in range(20):
        held[0] = float("1e3")
        assert guards.changed() is None
    held[0] = 2.0
    assert guards.changed() is not None


@pytest.mark.skipif(shared_watch() is None, reason="dictionaries cannot be watched before Python 3.12")
def test_writes_to_watched_dictionaries_are_counted_and_nothing_else() -> None:
    watch = shared_watch()
    assert watch is not None
    watched, other = {"a": 1}, {"a": 1}
    holder = Holder()
    watch.watch([watched], holder)
    before = watch.changes()
    for _ in range(100):
        other["a"] = random.random()  # type: ignore[assignment]
        assert watch.changes() == before
    watched["a"] = 2
    assert watch.changes() != before


@pytest.mark.skipif(shared_watch() is None, reason="dictionaries cannot be watched before Python 3.12")
def test_to_watch_another_dictionary_is_no_write_and_to_write_one_is() -> None:
    watch = shared_watch()
    assert watch is not None
    first, second, holders = {"a": 1}, {"a": 1}, [Holder(), Holder(), Holder()]
    watch.watch([first], holders[0])
    before = watch.changes()
    watch.watch([second, first], holders[1])
    assert watch.changes() == before
    first["a"] = 2
    watch.watch([{}, {}], holders[2])
    assert watch.changes() != before
    before = watch.changes()

    class Writing(list[dict[Any, Any]]):
        """Writes a watched dictionary while others begin to be watched, as another thread might."""

        def __iter__(self) -> Iterator[dict[Any, Any]]:
            for dictionary in super().__iter__():
                second["a"] += 1
                yield dictionary

    watch.watch(Writing([second]), holders[2])
    assert watch.changes() != before


def test_a_warning_names_the_value() -> None:
    held = Holder()
    captured = graphs.capture(lambda x: x * held.scale)
    for _ in range(10):
        captured(torch.ones(2))
    held.scale = 2.0
    with pytest.warns(NotReplayed, match=r"held\.scale was 1\.0|scale"):
        captured(torch.ones(2))


@pytest.mark.parametrize("with_context", [True, False], ids=["ctx", "setup_context"])
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_the_forward_of_an_autograd_function_is_guarded(with_context: bool) -> None:
    class Scaled(torch.autograd.Function):
        if with_context:

            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
                return x * 2
        else:

            @staticmethod
            def forward(x: Tensor) -> Tensor:  # type: ignore[override]
                return x * 2

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                pass

    step = graphs.capture(lambda x: Scaled.apply(x))  # type: ignore[no-untyped-call]
    x = torch.ones(2)
    with torch.no_grad():
        assert torch.equal(step(x), x * 2) and torch.equal(step(x), x * 2)
        Scaled.forward = staticmethod(lambda *given: given[-1] * 3)  # type: ignore[method-assign]
        assert torch.equal(step(x), x * 3)
