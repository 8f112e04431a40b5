"""What hangs on arguments beside tensors: changed by a step, read by it, looked up in their classes, and returned."""

from __future__ import annotations

import enum
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils import _pytree

import graphs
from graphs.contract.arguments import flatten_call, map_children
from graphs.dispatch.call_log import NotReplayed
from graphs.errors import UnsupportedOutput

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings(f"ignore::{NotReplayed.__module__}.{NotReplayed.__name__}")
CONTEXTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(params=CONTEXTS)
def context(request: pytest.FixtureRequest) -> Any:
    """A mode that a step is called in."""
    return CONTEXTS[request.param]


class Plain:
    """An object with one attribute."""

    def __init__(self) -> None:
        self.n = 0


class Box:
    """A container of a registered kind: one child, and attributes that are none."""

    scale = 2.0

    def __init__(self, child: Any) -> None:
        self.child, self.n, self.log = child, 0, []

    def method(self) -> float:
        return 2.0


class Slotted:
    """The same, with slots."""

    __slots__ = ("child", "n")

    def __init__(self, child: Any) -> None:
        self.child, self.n = child, 0


class Beside:
    """A container with an object as its context."""

    def __init__(self, child: Any, beside: Any) -> None:
        self.child, self.beside = child, beside


@dataclass
class Given:
    """A dataclass for which torch.export makes a kind."""

    child: Any
    n: int = 0


_pytree.register_pytree_node(Box, lambda box: ([box.child], None), lambda children, _: Box(*children))
_pytree.register_pytree_node(Slotted, lambda box: ([box.child], None), lambda children, _: Slotted(*children))
_pytree.register_pytree_node(Beside, lambda box: ([box.child], box.beside), lambda children, beside: Beside(*children, beside))
_pytree.register_pytree_node(Given, lambda given: ([given.child], given.n), lambda children, n: Given(*children, n))
Pair = namedtuple("Pair", "a b")


class PairWithScale(Pair):
    scale = 2.0

    @property
    def factor(self) -> float:
        return 2.0


def content(value: Any) -> Any:
    """A value as data that can be compared."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return [(key, content(item)) for held in (value, getattr(value, "__dict__", {})) for key, item in held.items()]
    if isinstance(value, (list, tuple, deque)):
        return [content(item) for item in value]
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    return {name: content(getattr(value, name)) for name in names} or repr(value)


def attribute_counted(box: Any) -> Tensor:
    box.n += 1
    return box.child * 2


def attribute_filled(box: Any) -> Tensor:
    box.log.append(1)
    return box.child * 2


def attribute_appears(box: Any) -> Tensor:
    box.extra = 1
    return box.child * 2


def child_replaced(box: Any) -> Tensor:
    box.child = box.child * 2
    return box.child + 1


def child_filled(box: Any) -> Tensor:
    box.child.append(box.child[0] * 2)
    return box.child[0] * 2


def item_replaced(box: Any) -> Tensor:
    box.child[0] = box.child[0] * 2
    return box.child[0] * 2


def context_counted(box: Any) -> Tensor:
    box.beside.n += 1
    return box.child * 2


def context_filled(box: Any) -> Tensor:
    box.beside.append(1)
    return box.child * 2


def appended(items: Any) -> Tensor:
    items.append(1)
    return items[0] * 2


def ordered_set(items: Any) -> Tensor:
    items.tag = 1
    return items["a"] * 2


def with_tag(items: Any) -> Tensor:
    items.n = getattr(items, "n", 0) + 1
    return items[0] * 2


def child() -> Tensor:
    return torch.arange(3.0)


CHANGES: dict[str, tuple[Callable[[Any], Tensor], Callable[[], Any]]] = {
    "an attribute": (attribute_counted, lambda: Box(child())),
    "a slot": (attribute_counted, lambda: Slotted(child())),
    "a list that is an attribute": (attribute_filled, lambda: Box(child())),
    "a new attribute": (attribute_appears, lambda: Box(child())),
    "the child": (child_replaced, lambda: Box(child())),
    "a list that is a child": (child_filled, lambda: Box([child()])),
    "an item of that": (item_replaced, lambda: Box([child()])),
    "an object that is the context": (context_counted, lambda: Beside(child(), Plain())),
    "a list that is the context": (context_filled, lambda: Beside(child(), [])),
    "a field of a dataclass": (attribute_counted, lambda: Given(child())),
    "a deque": (appended, lambda: deque([child()])),
    "a bounded deque": (appended, lambda: deque([child()], maxlen=8)),
    "an attribute of an ordered dict": (ordered_set, lambda: OrderedDict(a=child())),
    "an attribute of a named tuple": (with_tag, lambda: PairWithScale(child(), 1)),
    "deep inside": (lambda items: attribute_counted(items["a"][0]), lambda: {"a": [Box(child())]}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_step_changes_of_its_arguments_is_changed_once(name: str, context: Any) -> None:
    model, make = CHANGES[name]
    step = graphs.capture(model)
    with context():
        for _ in range(4):
            mine, other = make(), make()
            assert torch.equal(step(mine), model(other))
            assert content(mine) == content(other)


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_step_changes_of_one_argument_adds_up(name: str, context: Any) -> None:
    model, make = CHANGES[name]
    step, mine, other = graphs.capture(model), make(), make()
    with context():
        for _ in range(4):
            assert torch.equal(step(mine), model(other))
            assert content(mine) == content(other)


class Text(str):
    scale = 2.0


class Number(int):
    def factor(self) -> float:
        return 2.0


class Level(enum.Enum):
    LOW = 1

    def factor(self) -> float:
        return 2.0


def three(self: Any) -> float:
    return 3.0


def settable(kind: Any, name: str, value: Any) -> Callable[[], Iterator[None]]:
    def change() -> Iterator[None]:
        before = kind.__dict__.get(name)
        setattr(kind, name, value)
        yield
        if before is None:
            delattr(kind, name)
        else:
            setattr(kind, name, before)

    return change


IN_CLASSES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any, Any, str, Any]] = {
    "attribute of a text": (lambda x, value: x * value.scale, lambda: Text("a"), Text, "scale", 3.0),
    "method of a number": (lambda x, value: x * value.factor(), lambda: Number(1), Number, "factor", three),
    "method of a member": (lambda x, value: x * value.factor(), lambda: Level.LOW, Level, "factor", three),
    "attribute of a named tuple": (
        lambda x, v: x * v.scale + v.a,
        lambda: PairWithScale(child(), 1),
        PairWithScale,
        "scale",
        3.0,
    ),
    "property": (lambda x, v: x * v.factor, lambda: PairWithScale(1, 1), PairWithScale, "factor", property(three)),
    "attribute of a registered kind": (lambda x, value: x * value.scale, lambda: Box(child()), Box, "scale", 3.0),
    "method of a registered kind": (lambda x, value: x * value.method(), lambda: Box(child()), Box, "method", three),
    "class of a context": (
        lambda x, value: x * getattr(value.beside, "scale", 2.0),
        lambda: Beside(child(), Plain()),
        Plain,
        "scale",
        3.0,
    ),
    "class of a key": (lambda x, value: x * next(iter(value)).scale, lambda: {Text("a"): child()}, Text, "scale", 3.0),
    "class of an attribute of a text": (lambda x, v: x * v.inner.scale, lambda: _tagged(), Text, "scale", 3.0),
    "inside a slice": (lambda x, value: x * value.stop.factor(), lambda: slice(0, Number(2)), Number, "factor", three),
}


def _tagged() -> Any:
    tagged: Any = Number(1)
    tagged.inner = Text("b")
    return tagged


@pytest.mark.parametrize("name", IN_CLASSES)
def test_what_is_looked_up_in_the_class_of_an_argument_is_guarded(name: str, context: Any) -> None:
    model, make, kind, attribute, value = IN_CLASSES[name]
    step, x = graphs.capture(model), torch.ones(3)
    with context():
        for _ in range(3):
            assert torch.equal(step(x, make()), model(x, make()))
        replays = step.report().replays
        for _ in settable(kind, attribute, value)():
            expected = model(x, make())
            assert not torch.equal(expected, x * 2)
            assert torch.equal(step(x, make()), expected)
        assert torch.equal(step(x, make()), model(x, make()))
    assert replays == 3


def scaled(box: Any) -> Tensor:
    tensor = box.child if hasattr(box, "child") else next(iter(box.values() if isinstance(box, dict) else box))
    return tensor * getattr(box, "scale", 2.0) * (1 + getattr(box, "n", 0))


@pytest.mark.parametrize("make", [lambda: Box(child()), lambda: OrderedDict(a=child()), lambda: PairWithScale(child(), 1)])
def test_an_attribute_of_an_argument_is_part_of_the_key(make: Callable[[], Any], context: Any) -> None:
    step = graphs.capture(scaled)
    with context():
        for scale in (None, None, 5.0, 5.0, None, 6.0, 5.0):
            argument = make()
            if scale is not None:
                argument.scale = scale
            assert torch.equal(step(argument), scaled(argument))
    assert step.report().replays == 7


def test_a_slot_of_an_argument_is_part_of_the_key(context: Any) -> None:
    step = graphs.capture(scaled)
    with context():
        for n in (0, 0, 3, 0, 3):
            argument = Slotted(child())
            argument.n = n
            assert torch.equal(step(argument), scaled(argument))
    assert step.report().replays == 5


def test_a_tensor_that_hangs_on_an_argument_is_read_where_it_is(context: Any) -> None:
    def model(box: Any) -> Tensor:
        return box.child * box.mask

    step, mask = graphs.capture(model), torch.ones(3)
    with context():
        for index in range(8):
            argument: Any = Box(child())
            argument.mask = mask if index < 4 else torch.full((3,), float(index))
            mask.fill_(index)
            assert torch.equal(step(argument), model(argument))


def test_a_rebuilt_container_carries_attributes() -> None:
    box: Any = Slotted([child()])
    box.n = 4
    assert map_children(box, lambda item: item).n == 4
    kept: Any = Box(child())
    kept.n, kept.also = 4, (kept.child, 1)
    rebuilt = map_children(kept, lambda item: item + 1)
    assert rebuilt.n == 4 and rebuilt.also[0] is rebuilt.child and rebuilt.log is kept.log
    assert flatten_call((kept,), {}).signature == flatten_call((rebuilt,), {}).signature


RETURNED: dict[str, tuple[Callable[[Tensor, Any], Any], Callable[[], Any]]] = {
    "dict": (lambda x, value: value, lambda: {"a": child()}),
    "list": (lambda x, value: (x * 2, value), lambda: [child()]),
    "tuple": (lambda x, value: (x * 2, value), lambda: (child(), 1)),
    "deque": (lambda x, value: (x * 2, value), lambda: deque([child()])),
    "registered kind": (lambda x, value: (x * 2, value), lambda: Box(child())),
    "inner list": (lambda x, value: (x * 2, value["a"]), lambda: {"a": [child()]}),
    "list that is an attribute": (lambda x, value: (x * 2, value.log), lambda: _logged()),
    "empty tuple": (lambda x, value: (x * 2, value), lambda: ()),
    "empty list": (lambda x, value: (x * 2, value), lambda: []),
}


def _logged() -> Box:
    box = Box(child())
    box.log.append(1)
    return box


@pytest.mark.parametrize("name", RETURNED)
def test_a_container_of_the_callers_that_is_returned_is_his_own(name: str, context: Any) -> None:
    model, make = RETURNED[name]
    step, x = graphs.capture(model), torch.ones(3)
    with context():
        for _ in range(3):
            given = make()
            expected, found = model(x, given), step(x, given)
            pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
            assert all(a is b or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in pairs)
    reasons = {refusal.reason for refusal in step.report().refusals}
    assert reasons == (set() if name == "empty tuple" else {UnsupportedOutput.reason})


def test_a_returned_container_that_has_attributes_is_not_made_without_them(context: Any) -> None:
    def model(x: Tensor) -> Any:
        made = OrderedDict(a=x * 2)
        made.scale = 3  # type: ignore[attr-defined]
        return made

    step = graphs.capture(model)
    with context():
        for _ in range(3):
            assert step(torch.ones(2)).scale == 3
    assert step.report().refusals[0].reason == UnsupportedOutput.reason


ASKED: list[str] = []


class Watchful:
    v = 2.0

    def __getattribute__(self, name: str) -> Any:
        ASKED.append(name)
        return object.__getattribute__(self, name)


class Claiming:
    v = 2.0

    @property
    def __class__(self) -> Any:
        ASKED.append("class")
        return Claiming


class WatchfulText(str):
    def __getattribute__(self, name: str) -> Any:
        ASKED.append(name)
        return str.__getattribute__(self, name)


class WatchfulBox(Box):
    def __getattribute__(self, name: str) -> Any:
        ASKED.append(name)
        return object.__getattribute__(self, name)


class WatchfulPair(Pair):
    def __getattribute__(self, name: str) -> Any:
        ASKED.append(name)
        return tuple.__getattribute__(self, name)


class WatchfulMember(enum.Enum):
    A = 1

    def __getattribute__(self, name: str) -> Any:
        ASKED.append(name)
        return enum.Enum.__getattribute__(self, name)


_pytree.register_pytree_node(
    WatchfulBox,
    lambda box: ([object.__getattribute__(box, "child")], None),
    lambda children, _: WatchfulBox(*children),
)
WATCHED: dict[str, Any] = {
    "object": Watchful(),
    "claims a class": Claiming(),
    "text": WatchfulText("a"),
    "registered kind": WatchfulBox(child()),
    "named tuple": WatchfulPair(child(), 1),
    "in a dict": {"a": Watchful(), "b": [WatchfulText("b")]},
    "as a context": Beside(child(), Watchful()),
    "as an attribute": _logged(),
}
WATCHED["as an attribute"].log.append(Watchful())


@pytest.mark.parametrize("name", WATCHED)
def test_looking_at_arguments_asks_them_nothing(name: str, context: Any) -> None:
    step, value = graphs.capture(lambda x, value: x * 2), WATCHED[name]
    with context():
        for _ in range(3):
            ASKED.clear()
            step(torch.ones(3), value)
            assert not ASKED
    assert step.report().replays == 3


def test_a_key_asks_a_member_of_an_enumeration_nothing() -> None:
    ASKED.clear()
    flatten_call((WatchfulMember.A,), {})
    assert not ASKED


@pytest.mark.parametrize("name", ["object", "claims a class", "text"])
def test_looking_at_outputs_asks_them_nothing(name: str, context: Any) -> None:
    value = WATCHED[name]
    step = graphs.capture(lambda x, value: (x * 2, value))
    with context():
        for _ in range(3):
            ASKED.clear()
            assert step(torch.ones(3), value)[1] is value
            assert not ASKED
    assert step.report().replays == 3
