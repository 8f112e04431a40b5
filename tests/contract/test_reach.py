"""Places that a step reaches by name or by ways other than attributes: written once in each call, read anew by the next."""

from __future__ import annotations

import contextvars
import functools
import gc
import importlib.util
import math
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import nn

import graphs
from graphs.objects.libraries import origin_of_module
from graphs.python_reads.code_reads import _computes_names
from graphs.state.python_state import PythonState

Tensor = torch.Tensor
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
LIBRARY = """
COUNT, SCALE, STATE, ITEMS, LAST = 0, 1.0, {"n": 0}, [], None

class Thing:
    total, __count__, scale = 0, 0, 1.0
    def by_name(self, x): Thing.total += 1; return x * 2
    def by_type(self, x): type(self).total += 1; return x * 2
    @classmethod
    def by_class(cls, x): cls.__count__ += 1; return x * 2

class Derived(Thing):
    pass

def of_module(x):
    global COUNT
    COUNT += 1
    return x * 2
def of_dict(x): STATE["n"] += 1; return x * 2
def of_list(x): ITEMS.append(1); return x * 2
def replaced(x):
    global LAST
    LAST = [len(LAST or ()) + 1] * (len(LAST or ()) + 1)
    return x * 2
def of_function(x):
    of_function.n = getattr(of_function, "n", 0) + 1
    return x * 2
def counting():
    n = 0
    def of_cell(x):
        nonlocal n
        n += 1
        return x * 2
    return of_cell, lambda: n
of_cell, cell = counting()
def computed(held, i): return getattr(held, f"w{i}")
def scaled():
    scale = 1.0
    def read(x): return x * scale
    def write(value):
        nonlocal scale
        scale = value
    return read, write
read_cell, write_cell = scaled()
"""


class Holder:
    """Something with attributes."""

    n: int = 0

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Meta(type):
    n = 0


class OfMeta(metaclass=Meta):
    __count__ = 0
    __items__: list[int] = []  # noqa: RUF012
    __table__ = {"n": 0, "k": 1.0}  # noqa: RUF012


class Written(NamedTuple):
    """What a step does, and how to read what came of it."""

    write: Callable[[], Any]
    read: Callable[[], Any]


class Read(NamedTuple):
    """What a step reads, and what exchanges it."""

    value: Callable[[], Any]
    change: Callable[[], Any]


def python_module(name: str, **content: Any) -> Any:
    module: Any = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    return module


package = python_module(
    "package_of_a_test", inner=python_module("package_of_a_test.inner", n=0, D={"n": 0}, k=1.0, __scale__=1.0)
)
imported = python_module("imported_of_a_test", n=0, D={"n": 0}, __version__=1.0)
variable: contextvars.ContextVar[Any] = contextvars.ContextVar("reach")
lib: Any = None


@pytest.fixture(autouse=True)
def library(tmp_path: Path) -> Iterator[None]:
    """A library, installed where libraries are."""
    global lib
    path = tmp_path / "site-packages" / "library_of_reach.py"
    path.parent.mkdir()
    path.write_text(LIBRARY)
    spec = importlib.util.spec_from_file_location("library_of_reach", path)
    assert spec is not None and spec.loader is not None
    lib = importlib.util.module_from_spec(spec)
    sys.modules["library_of_reach"] = lib
    spec.loader.exec_module(lib)
    yield
    del sys.modules["library_of_reach"]


def plus(held: Any, name: str = "n") -> None:
    setattr(held, name, getattr(held, name, 0) + 1)


def call(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: function(torch.ones(2))


def import_attribute() -> None:
    import imported_of_a_test as other

    other.n += 1


def import_item() -> None:
    from imported_of_a_test import D

    D["n"] += 1


def inner_attribute() -> None:
    package.inner.n += 1


def inner_item() -> None:
    package.inner.D["n"] += 1


def dunder_attribute() -> None:
    OfMeta.__count__ += 1


def new_class_attribute() -> None:
    OfMeta.fresh = getattr(OfMeta, "fresh", 0) + 1  # type: ignore[attr-defined]


def of_metaclass() -> None:
    type(OfMeta).n += 1


def of_torch() -> None:
    torch.reach = getattr(torch, "reach", 0) + 1  # type: ignore[attr-defined]


def of_relu() -> None:
    nn.functional.relu.reach = getattr(nn.functional.relu, "reach", 0) + 1  # type: ignore[attr-defined]


def of_tensors() -> None:
    torch.Tensor.reach = getattr(torch.Tensor, "reach", 0) + 1  # type: ignore[attr-defined]


def of_math() -> None:
    math.reach = getattr(math, "reach", 0) + 1  # type: ignore[attr-defined]


def new_global() -> None:
    global made_by_the_step
    made_by_the_step = globals().get("made_by_the_step", 0) + 1


def library_module_attribute() -> None:
    lib.COUNT += 1


def library_class_attribute() -> None:
    lib.Derived.total += 1


def reached(name: str) -> Callable[[], Any]:
    return lambda: getattr(torch, name, 0)


def weakly(held: Any, dictionary: Any) -> Any:
    dictionary["a"] = held
    return dictionary


def written_tensor(kind: Callable[[Tensor], Tensor], n: bool) -> Written:
    model = nn.Module()
    tensor = kind(torch.ones(2))
    model.held = tensor
    if n:
        tensor.n = 0  # type: ignore[attr-defined]
    return Written(lambda: (plus(model.held), model.held * 2), lambda: getattr(tensor, "n", 0))


def first_of(held: Any) -> Any:
    return next(iter(held))


def keyed(key: Any, make: Callable[[Any], Any] = lambda key: {key: 1}) -> Written:
    table = make(key)
    return Written(lambda: [plus(k[0] if isinstance(k, tuple) else k) for k in table], lambda: key.n)


def set_variable() -> Written:
    held = {"n": 0}
    variable.set(held)
    return Written(lambda: variable.get().update(n=variable.get()["n"] + 1), lambda: held["n"])


def of_partial() -> Written:
    held: Any = functools.partial(int)
    return Written(lambda: plus(held), lambda: getattr(held, "n", 0))


def state_of_a_partial() -> Written:
    held: Any = functools.partial(int, 0)
    return Written(lambda: held.__setstate__((int, (held.args[0] + 1,), {}, {})), lambda: held.args[0])


def by_reference() -> Written:
    parent = Holder(n=0)
    child = Holder(parent=weakref.ref(parent))
    return Written(lambda: plus(child.parent()), lambda: parent.n)  # type: ignore[attr-defined]


def by_weak_values() -> Written:
    held = Holder(n=0)
    table = weakly(held, weakref.WeakValueDictionary())
    return Written(lambda: plus(table["a"]), lambda: held.n)


def by_weak_set() -> Written:
    held = Holder(n=0)
    items = weakref.WeakSet([held])
    return Written(lambda: [plus(item) for item in items], lambda: held.n)


def in_an_array() -> Written:
    held = Holder(n=0)
    array = numpy.array([held, None], dtype=object)
    return Written(lambda: plus(array[0]), lambda: held.n)


def arguments_of_an_exception() -> Written:
    error = ValueError(0)
    return Written(lambda: setattr(error, "args", (error.args[0] + 1,)), lambda: error.args[0])


def list_in_an_exception() -> Written:
    error = ValueError([])
    return Written(lambda: error.args[0].append(1), lambda: len(error.args[0]))


def list_in_a_slice() -> Written:
    part = slice([], None)
    return Written(lambda: part.start.append(1), lambda: len(part.start))


WRITTEN: dict[str, Callable[[], Written]] = {
    "attribute of a buffer": lambda: written_tensor(nn.Buffer, True),
    "attribute of a parameter": lambda: written_tensor(nn.Parameter, True),
    "first attribute of a parameter": lambda: written_tensor(nn.Parameter, False),
    "first attribute of a tensor": lambda: written_tensor(lambda tensor: tensor, False),
    "attribute of an imported module": lambda: Written(import_attribute, lambda: imported.n),
    "item of an imported name": lambda: Written(import_item, lambda: imported.D["n"]),
    "attribute of a module in a package": lambda: Written(inner_attribute, lambda: package.inner.n),
    "item in a module in a package": lambda: Written(inner_item, lambda: package.inner.D["n"]),
    "class attribute with underscores": lambda: Written(dunder_attribute, lambda: OfMeta.__count__),
    "list in a class": lambda: Written(lambda: OfMeta.__items__.append(1), lambda: len(OfMeta.__items__)),
    "new class attribute": lambda: Written(new_class_attribute, lambda: getattr(OfMeta, "fresh", 0)),
    "attribute of a metaclass": lambda: Written(of_metaclass, lambda: Meta.n),
    "attribute of torch": lambda: Written(of_torch, lambda: getattr(torch, "reach", 0)),
    "attribute of a function of torch": lambda: Written(of_relu, lambda: getattr(nn.functional.relu, "reach", 0)),
    "attribute of a class of torch": lambda: Written(of_tensors, lambda: getattr(torch.Tensor, "reach", 0)),
    "attribute of a module of Python's": lambda: Written(of_math, lambda: getattr(math, "reach", 0)),
    "new global": lambda: Written(new_global, lambda: globals().get("made_by_the_step", 0)),
    "attribute of a partial": of_partial,
    "state of a partial": state_of_a_partial,
    "behind a weak reference": by_reference,
    "value of a weak dictionary": by_weak_values,
    "item of a weak set": by_weak_set,
    "key of a weak dictionary": lambda: keyed(Holder(n=0), lambda key: weakref.WeakKeyDictionary({key: 1})),
    "key": lambda: keyed(Holder(n=0)),
    "key in a tuple": lambda: keyed(Holder(n=0), lambda key: {(key, 1): 1}),
    "content of a context variable": set_variable,
    "object in an array": in_an_array,
    "arguments of an exception": arguments_of_an_exception,
    "list in an exception": list_in_an_exception,
    "list in a slice": list_in_a_slice,
    "global of a library": lambda: Written(call(lib.of_module), lambda: lib.COUNT),
    "item in a library": lambda: Written(call(lib.of_dict), lambda: lib.STATE["n"]),
    "list in a library": lambda: Written(call(lib.of_list), lambda: len(lib.ITEMS)),
    "object of a library": lambda: Written(call(lib.replaced), lambda: len(lib.LAST or ())),
    "function of a library": lambda: Written(call(lib.of_function), lambda: getattr(lib.of_function, "n", 0)),
    "closure of a library": lambda: Written(call(lambda x: lib.of_cell(x)), lambda: lib.cell()),
    "class of a library": lambda: Written(call(lib.Thing().by_name), lambda: lib.Thing.total),
    "derived class of a library": lambda: Written(call(lib.Derived().by_type), lambda: lib.Derived.total),
    "class method of a library": lambda: Written(call(lambda x: lib.Derived.by_class(x)), lambda: lib.Derived.__count__),
    "attribute of a library, from outside": lambda: Written(library_module_attribute, lambda: lib.COUNT),
    "class of a library, from outside": lambda: Written(library_class_attribute, lambda: lib.Derived.total),
}


@contexts
@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_step_writes_is_written_once_in_each_call(name: str, context: Any) -> None:
    written = WRITTEN[name]()
    before = written.read()
    captured = graphs.capture(lambda x: (written.write(), x * 2)[1])
    with context():
        for calls in range(1, 6):
            assert captured(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
            assert written.read() == before + calls, captured.report()


def of_keys() -> Read:
    table = {Holder(v=1.0): 1}
    return Read(lambda: sum(key.v for key in table), lambda: setattr(first_of(table), "v", 3.0))


def attribute_of_a_partial() -> Read:
    held: Any = functools.partial(int)
    held.v = 1.0
    return Read(lambda: held.v, lambda: setattr(held, "v", 3.0))


def parts_of_a_partial() -> Read:
    held: Any = functools.partial(float, 1.0)
    return Read(lambda: held(), lambda: held.__setstate__((float, (3.0,), {}, {})))


def held_variable() -> Read:
    held = {"k": 1.0}
    variable.set(held)
    return Read(lambda: variable.get()["k"], lambda: held.update(k=3.0))


def variable_default() -> Read:
    default = {"k": 1.0}
    unset: contextvars.ContextVar[Any] = contextvars.ContextVar("unset", default=default)
    return Read(lambda: unset.get()["k"], lambda: default.update(k=3.0))


def name_of_a_class() -> Read:
    kind = type("First", (), {})
    held = kind()
    return Read(lambda: len(type(held).__name__), lambda: setattr(kind, "__name__", "Another"))


def computed_in_a_library() -> Read:
    held = Holder(w0=1.0)
    return Read(lambda: lib.computed(held, 0), lambda: setattr(held, "w0", 3.0))


def closure_of_a_library() -> Read:
    return Read(lambda: lib.read_cell(1.0), lambda: lib.write_cell(3.0))


def computed_name_of_a_module() -> Read:
    package.inner.w0 = 1.0
    return Read(lambda: sum(getattr(package.inner, f"w{i}") for i in range(1)), lambda: setattr(package.inner, "w0", 3.0))


def first_attribute_of_a_tensor() -> Read:
    held = torch.ones(2)
    return Read(lambda: getattr(held, "v", 1.0), lambda: setattr(held, "v", 3.0))


def version_of_a_tensor() -> Read:
    with torch.inference_mode(False):
        held = torch.ones(2)
    return Read(lambda: held._version, lambda: held.__setitem__(0, 3.0))


READ: dict[str, Callable[[], Read]] = {
    "table in a class": lambda: Read(lambda: OfMeta.__table__["k"], lambda: OfMeta.__table__.update(k=OfMeta.__table__["k"] + 2)),
    "name with underscores": lambda: Read(
        lambda: package.inner.__scale__, lambda: setattr(package.inner, "__scale__", package.inner.__scale__ + 2)
    ),
    "version of a module": lambda: Read(
        lambda: imported.__version__, lambda: setattr(imported, "__version__", imported.__version__ + 2)
    ),
    "attribute of a key": of_keys,
    "attribute of a partial": attribute_of_a_partial,
    "parts of a partial": parts_of_a_partial,
    "content of a context variable": held_variable,
    "default of a context variable": variable_default,
    "name of a class": name_of_a_class,
    "a name that a library computes": computed_in_a_library,
    "a computed name of a module": computed_name_of_a_module,
    "closure of a library": closure_of_a_library,
    "first attribute of a tensor": first_attribute_of_a_tensor,
    "version of a tensor": version_of_a_tensor,
}


@contexts
@pytest.mark.parametrize("name", READ)
def test_what_changes_between_calls_is_used_by_the_next(name: str, context: Any) -> None:
    value, change = READ[name]()
    captured = graphs.capture(lambda x: x * value())
    with context():
        for _ in range(3):
            assert captured(torch.ones(1)).item() == value()
        assert captured.report().replays >= 2, captured.report()
        before = value()
        change()
        assert value() != before
        assert captured(torch.ones(1)).item() == value()


class Slotted:
    __slots__ = ("__weakref__", "n")


class Table(dict[str, Any]):
    pass


def referring(held: Any) -> Callable[[], Any]:
    reference = weakref.ref(held)
    return lambda: getattr(reference(), "n", 100)


def in_weak_values(held: Any) -> Callable[[], Any]:
    table = weakly(held, weakref.WeakValueDictionary())
    return lambda: table["a"].n if "a" in table else 100


def counted_in_weak_values(held: Any) -> Callable[[], Any]:
    table = weakly(held, weakref.WeakValueDictionary())
    return lambda: 2 if len(table) else 100


def in_a_weak_set(held: Any) -> Callable[[], Any]:
    items = weakref.WeakSet([held])
    return lambda: sum(item.n for item in items) or 100


@contexts
@pytest.mark.parametrize("also_in_a_list", [False, True])
@pytest.mark.parametrize("kind", [Holder, Slotted, nn.Identity, Table])
@pytest.mark.parametrize("lead", [referring, in_weak_values, counted_in_weak_values, in_a_weak_set])
def test_what_is_held_weakly_dies(lead: Any, kind: Any, also_in_a_list: bool, context: Any) -> None:
    if kind is Table and lead is in_a_weak_set:
        pytest.skip("a dictionary has no hash")
    held = kind()
    held.n = 2
    value, known = lead(held), [held] if also_in_a_list else []
    captured = graphs.capture(lambda x: x * (value() + len(known)))
    with context():
        for _ in range(3):
            assert captured(torch.ones(1)).item() == 2 + len(known)
        gc.collect()  # what the first run of torch in a process left behind
        del held
        known.clear()
        assert captured(torch.ones(1)).item() == 100
        assert value() == 100


def test_a_tensor_that_is_held_weakly_is_not_replayed() -> None:
    held = torch.ones(2)
    reference = weakref.ref(held)
    captured = graphs.capture(lambda x: x if reference() is None else x * reference())
    with torch.no_grad():
        for _ in range(3):
            assert captured(torch.full((2,), 3.0)).tolist() == [3.0, 3.0]
        assert captured.report().replays == 0
        gc.collect()
        del held
        assert reference() is None


def test_what_is_read_and_cannot_be_put_back_refuses_the_step() -> None:
    held = Holder(module=types.ModuleType("held_by_an_object"))
    held.module.n = 0  # type: ignore[attr-defined]
    captured = graphs.capture(lambda x: (plus(held.module), x * 2)[1])  # type: ignore[attr-defined]
    with torch.no_grad():
        for _ in range(3):
            captured(torch.ones(3))
        before = held.module.n  # type: ignore[attr-defined]
        captured(torch.ones(3))
    report = captured.report()
    assert held.module.n == before + 1 and report.replays == 0  # type: ignore[attr-defined]
    assert [refusal.reason for refusal in report.refusals] == ["changing-value"]


def test_a_library_is_not_gone_through_as_a_whole() -> None:
    lib.UNNAMED = [Holder()]
    state = PythonState([("step", lambda: lib.STATE)])
    assert state.holds(lib.STATE) and not state.holds(lib.UNNAMED) and not state.holds(lib.ITEMS)


@pytest.mark.parametrize(
    "function, computes",
    [
        (lambda o: getattr(o, "a", None), False),
        (lambda o: hasattr(o.b.c, "a"), False),
        (lambda o: getattr(getattr(o, "a"), "b"), False),  # noqa: B009
        (lambda o: getattr(o.f(1, 2), "b", None), False),
        (lambda o: getattr(o[0], "x", o.y or 3), False),
        (lambda o: [getattr(x, "n", 1) for x in o], False),
        (lambda o, i: getattr(o, f"w{i}"), True),
        (lambda o, n: getattr(o, "a" + n), True),
        (lambda o, n: getattr(o, n.x), True),
        (lambda o, n: map(getattr, o, n), True),
        (lambda o: [getattr(x, n) for x, n in o], True),
    ],
)
def test_names_that_are_no_constants_are_told_apart(function: Any, computes: bool) -> None:
    assert _computes_names(function.__code__) is computes


def test_a_module_without_a_file_belongs_to_the_package_in_whose_name_it_lies() -> None:
    assert origin_of_module(torch._C._nn) == origin_of_module(torch._C) == "torch"  # type: ignore[attr-defined]
    assert origin_of_module(types.ModuleType("made_by_hand")) == "user"
    assert origin_of_module(types.ModuleType("made.by_hand")) == "user"
