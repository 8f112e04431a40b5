"""Keys of constants: equal only where no code could tell two values apart."""

from __future__ import annotations

import enum
import struct
import types
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.utils._pytree as pytree

import graphs
from graphs.contract.arguments import flatten_call
from graphs.objects.keys import NOT_CONSTANT, constant_key


class Rounded(float):
    def __repr__(self) -> str:
        return f"{float(self):.1f}"

    __str__ = __repr__


class Agreeable(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Text(str):
    def __str__(self) -> str:
        return "text"


class Tagged(float):
    scale: float


class Slotted(str):
    __slots__ = ("scale",)


class Flags(enum.IntFlag):
    A = 1
    B = 2


class OtherFlags(enum.IntFlag):
    A = 1
    B = 2


def colour(value: int) -> Any:
    return enum.Enum("Colour", {"RED": value}).RED  # type: ignore[attr-defined]


def tagged(scale: float) -> Tagged:
    value = Tagged(1.0)
    value.scale = scale
    return value


NAN = struct.unpack("d", struct.pack("Q", 0x7FF8000000000000))[0]
OTHER_NAN = struct.unpack("d", struct.pack("Q", 0x7FF8000000000001))[0]
DIFFERENT = {
    "bool and int": (True, 1),
    "int and float": (1, 1.0),
    "signs of zero": (0.0, -0.0),
    "signs of zero in complex": (complex(0.0, -0.0), complex(0.0, 0.0)),
    "payloads of nan": (NAN, OTHER_NAN),
    "float subclass that prints alike": (Rounded(1.01), Rounded(1.02)),
    "int subclass that is equal to all": (Agreeable(1), Agreeable(2)),
    "str subclass that prints alike": (Text("a"), Text("b")),
    "str and its subclass": ("a", Text("a")),
    "an attribute on a number": (tagged(1.0), tagged(2.0)),
    "unnamed flags": (Flags(4), Flags(8)),
    "flags of two classes": (Flags.A | Flags.B, OtherFlags.A | OtherFlags.B),
    "members of two classes of one name": (colour(1), colour(1)),
    "member and number": (Flags.A, 1),
    "widths of numpy": (numpy.float32(1), numpy.float64(1)),
    "numpy and Python": (numpy.float64(1), 1.0),
    "zeros of numpy": (numpy.float32(0.0), numpy.float32(-0.0)),
    "units of numpy": (numpy.datetime64(1, "s"), numpy.datetime64(1, "ms")),
    "slices": (slice(0, 1), slice(0, True)),
    "slices of rounded numbers": (slice(Rounded(1.01)), slice(Rounded(1.02))),
    "ranges": (range(0), range(1, 0)),
    "keys of a dict": ({1: 2}, {True: 2}),
    "number keys of a dict": ({1: 2}, {1.0: 2}),
    "text keys of a dict": ({"a": 2}, {Text("a"): 2}),
    "keys within keys": ({(1,): 2}, {(True,): 2}),
    "keys of an ordered dict": (OrderedDict({1: 2}), OrderedDict({True: 2})),
    "rounded keys of an ordered dict": (OrderedDict({Rounded(1.01): 2}), OrderedDict({Rounded(1.02): 2})),
    "factories": (defaultdict(list, a=1), defaultdict(dict, a=1)),
    "nesting": ([1, [2]], [[1], 2]),
    "dict and its values": ({"a": 1}, ["a", 1]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_values_that_code_can_tell_apart_have_two_signatures(name: str) -> None:
    first, second = DIFFERENT[name]
    assert flatten_call((first,), {}).signature != flatten_call((second,), {}).signature


SAME = {
    "float": lambda: float("1.5"),
    "nan": lambda: float("nan"),
    "text": lambda: "".join(["a", "b"]),
    "float subclass": lambda: Rounded(1.01),
    "unnamed flag": lambda: Flags(4),
    "numpy": lambda: numpy.float32(1.5),
    "range": lambda: range(2),
    "dict": lambda: {1: {"a": 1.0}},
    "default dict": lambda: defaultdict(list, a=1),
    "attribute": lambda: tagged(2.0),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_values_made_anew_share_a_signature(name: str) -> None:
    first, second = SAME[name](), SAME[name]()
    a, b = flatten_call((first,), {}), flatten_call((second,), {})
    assert a.signature == b.signature and hash(a.signature) == hash(b.signature) and not a.opaques


def test_a_number_that_hides_a_mutable_thing_is_no_constant() -> None:
    value = tagged(1.0)
    value.items = [object()]  # type: ignore[attr-defined]
    assert constant_key(value) is NOT_CONSTANT and constant_key(Slotted("a")) is NOT_CONSTANT


@pytest.mark.parametrize(
    "name", ["float subclass that prints alike", "unnamed flags", "keys of a dict", "an attribute on a number"]
)
def test_a_replay_is_not_taken_for_a_call_with_another_constant(name: str) -> None:
    def step(x: torch.Tensor, c: Any) -> torch.Tensor:
        c = next(iter(c)) if isinstance(c, dict) else c
        return x * getattr(c, "scale", 1.0) + (float(c) if type(c) is not bool else 7.0)

    captured, x = graphs.capture(step), torch.randn(3)
    for _ in range(2):
        for value in DIFFERENT[name]:
            assert torch.equal(captured(x, value), step(x, value))


def test_an_attribute_set_on_a_number_between_calls_is_seen() -> None:
    captured, x, value = graphs.capture(lambda x, c: x * c.scale), torch.ones(3), tagged(1.0)
    for scale in (1.0, 1.0, 2.0, 2.0, 3.0):
        value.scale = scale
        assert captured(x, value).tolist() == [scale] * 3


class Settings:
    """What a registered container keeps beside its tensors; it says of itself that it equals all others."""

    def __init__(self, scale: Any) -> None:
        self.scale = scale

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class InSlots:
    __slots__ = ("scale",)

    def __init__(self, scale: Any) -> None:
        self.scale = scale


class Listed(list[Any]):
    """A list of a class of its own."""

    @property
    def scale(self) -> Any:
        return self[0]


class Box:
    """A container that is registered with its settings as context."""

    def __init__(self, tensor: torch.Tensor, settings: Any) -> None:
        self.tensor, self.settings = tensor, settings


class Wide(enum.Enum):
    """Members with an attribute that can be set."""

    A = 1
    B = 2

    @property
    def scale(self) -> Any:
        return getattr(self, "_scale", 1.0)

    @scale.setter
    def scale(self, value: Any) -> None:
        self._scale = value


pytree.register_pytree_node(
    Box, lambda box: ([box.tensor], {"settings": box.settings}), lambda children, context: Box(children[0], context["settings"])
)
CONTEXTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any] | None]] = {
    "changed": (Settings, lambda kept, value: setattr(kept, "scale", value)),
    "made anew": (Settings, None),
    "slots": (InSlots, lambda kept, value: setattr(kept, "scale", value)),
    "slots, made anew": (InSlots, None),
    "list": (lambda value: Listed([value]), lambda kept, value: kept.__setitem__(0, value)),
    "list, made anew": (lambda value: Listed([value]), None),
    "named tuple": (namedtuple("Pair", "scale"), None),
    "module": (lambda value: _module(value), lambda kept, value: setattr(kept, "scale", value)),
    "enum member": (lambda value: _member(value), lambda kept, value: setattr(kept, "scale", value)),
}


def _module(scale: Any) -> types.ModuleType:
    made = types.ModuleType("settings_of_a_test")
    made.scale = scale  # type: ignore[attr-defined]
    return made


def _member(scale: Any) -> Wide:
    Wide.A.scale = scale
    return Wide.A


@pytest.mark.parametrize("where", ["context", "argument"])
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_what_is_given_beside_tensors_is_seen_as_it_is(name: str, where: str) -> None:
    make, change = CONTEXTS[name]
    in_context = graphs.capture(lambda box: box.tensor * box.settings.scale)
    as_argument = graphs.capture(lambda x, settings: x * settings.scale)
    kept = make(1.0)
    for call, scale in enumerate([1.0, 1.0, 2.0, 2.0, 1.0, 3.0]):
        if change is None:
            kept = make(scale)
        else:
            change(kept, scale)
        x = torch.full((2,), call + 1.0)
        with torch.no_grad():
            made = in_context(Box(x, kept)) if where == "context" else as_argument(x, kept)
        assert torch.equal(made, x * scale), f"call {call}"
