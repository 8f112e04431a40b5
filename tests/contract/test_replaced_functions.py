"""Functions put in the place of torch's and Python's, and hooks for all modules: what they read is guarded, and kept is right."""

from __future__ import annotations

import builtins
import collections
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.explain import explain
from graphs.python_reads.replaced import Replaced, is_foreign

Tensor = torch.Tensor
Step = Callable[[Tensor], Any]
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")


def _imports(x: Tensor) -> Tensor:
    import torch.special as functions

    return functions.expit(x)


def _called(x: Tensor) -> Any:
    return x * added(2.0)  # type: ignore[name-defined]  # noqa: F821


def _layers(kind: Callable[..., nn.Module], *sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), kind(*sizes))


PLACES: dict[str, tuple[Any, str, Callable[[], Step]]] = {
    "F.gelu": (F, "gelu", lambda: lambda x: F.gelu(x)),
    "F.gelu of a layer": (F, "gelu", lambda: nn.GELU()),
    "F.linear": (F, "linear", lambda: _layers(nn.Linear, 4, 4)),
    "attention": (F, "scaled_dot_product_attention", lambda: lambda x: F.scaled_dot_product_attention(x, x, x)),
    "torch.relu": (torch, "relu", lambda: lambda x: torch.relu(x)),
    "torch.matmul": (torch, "matmul", lambda: lambda x: torch.matmul(x, x.mT)),
    "through a function of torch's": (torch._VF, "einsum", lambda: lambda x: torch.einsum("ij,kj->ik", x, x)),
    "torch.special": (torch.special, "expit", lambda: _imports),
    "Tensor.relu": (Tensor, "relu", lambda: lambda x: x.relu()),
    "Tensor.__matmul__": (Tensor, "__matmul__", lambda: lambda x: x @ x.mT),
    "Linear.forward": (nn.Linear, "forward", lambda: _layers(nn.Linear, 4, 4)),
    "LayerNorm.forward": (nn.LayerNorm, "forward", lambda: _layers(nn.LayerNorm, 4)),
    "Module._call_impl": (nn.Module, "_call_impl", lambda: _layers(nn.Linear, 4, 4)),
    "Module.__call__": (nn.Module, "__call__", lambda: _layers(nn.Linear, 4, 4)),
    "math.sqrt": (math, "sqrt", lambda: lambda x: x * math.sqrt(4.0)),
    "new in builtins": (builtins, "added", lambda: _called),
    "new in torch": (torch, "added", lambda: lambda x: x * torch.added(2.0)),  # type: ignore[attr-defined]
}
"""A namespace, a name in it, and a step that calls what stands there."""


class Holder:
    """Keeps what is called and its settings in attributes."""

    def __init__(self, own: Any, settings: dict[str, float], tick: Callable[[], object]) -> None:
        self.own, self.settings, self.tick = own, settings, tick

    def scaled(self, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        return self.own(*args, **kwargs) * self.settings["scale"]


class Called(Holder):
    __call__ = Holder.scaled

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else functools.partial(self, owner)


def closure(own: Any, settings: dict[str, float], tick: Callable[[], object]) -> Any:
    def scaled(*args: Any, **kwargs: Any) -> Any:
        tick()
        return own(*args, **kwargs) * settings["scale"]

    return scaled


def default(own: Any, settings: dict[str, float], tick: Callable[[], object]) -> Any:
    def scaled(*args: Any, own: Any = own, settings: Any = settings, tick: Any = tick, **kwargs: Any) -> Any:
        tick()
        return own(*args, **kwargs) * settings["scale"]

    return scaled


def bound(own: Any, settings: dict[str, float], tick: Callable[[], object]) -> Any:
    return Holder(own, settings, tick).scaled


def partial(own: Any, settings: dict[str, float], tick: Callable[[], object]) -> Any:
    def scaled(own: Any, settings: Any, tick: Any, *args: Any, **kwargs: Any) -> Any:
        tick()
        return own(*args, **kwargs) * settings["scale"]

    return functools.partial(scaled, own, settings, tick)


def decorated(own: Any, settings: dict[str, float], tick: Callable[[], object]) -> Any:
    return torch.no_grad()(closure(own, settings, tick))


FORMS = {
    "closure": closure,
    "default": default,
    "bound method": bound,
    "partial": partial,
    "object": Called,
    "decorated": decorated,
}


@pytest.fixture
def patch() -> Iterator[Callable[..., None]]:
    undo = []

    def put(owner: Any, name: str, value: Any) -> None:
        had = name in vars(owner)
        before = vars(owner).get(name)
        undo.append(lambda: setattr(owner, name, before) if had else delattr(owner, name))
        setattr(owner, name, value)

    yield put
    for one in reversed(undo):
        one()


def _wrapped(patch: Callable[..., None], place: str, form: str, settings: dict[str, float], tick: Callable[[], object]) -> Step:
    owner, name, make = PLACES[place]
    own = getattr(owner, name, lambda value: value)
    if isinstance(owner, type) and form in ("bound method", "partial", "decorated", "default"):
        inner = FORMS[form](own, settings, tick)
        patch(owner, name, lambda *args, **kwargs: inner(*args, **kwargs))
    else:
        patch(owner, name, FORMS[form](own, settings, tick))
    return make()


def _x() -> Tensor:
    return torch.arange(8.0).reshape(2, 4) / 4


PAIRS = [(place, form) for place in PLACES for form in FORMS if form == "closure" or place in ("F.gelu", "Linear.forward")]


@contexts
@pytest.mark.parametrize(("place", "form"), PAIRS)
def test_a_setting_behind_a_function_in_torchs_place_is_guarded(
    place: str, form: str, context: Any, patch: Callable[..., None]
) -> None:
    settings = {"scale": 1.0}
    step = _wrapped(patch, place, form, settings, lambda: None)
    captured = graphs.capture(step)
    with context():
        for scale in (1.0, 1.0, 5.0, 5.0, 5.0):
            settings["scale"] = scale
            torch.testing.assert_close(captured(_x()), step(_x()), rtol=0, atol=0)
    assert captured.report().replays == 5


class _State:
    n = 0


def _keeping(kind: str) -> tuple[Callable[[], object], Callable[[], Any]]:
    """What keeps something of each call, and what shows it."""
    state, items, table, n = _State(), list[int](), {"n": 0}, 0

    def count() -> None:
        nonlocal n
        n += 1

    def of_object() -> None:
        state.n += 1

    return {
        "append": (lambda: items.append(1), lambda: len(items)),
        "dict": (lambda: table.update(n=table["n"] + 1), lambda: table["n"]),
        "object": (of_object, lambda: state.n),
        "nonlocal": (count, lambda: n),
    }[kind]


KEPT = ("append", "dict", "object", "nonlocal")


@contexts
@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("place", PLACES)
def test_what_a_function_in_torchs_place_keeps_is_kept_once_a_call(
    place: str, kind: str, context: Any, patch: Callable[..., None]
) -> None:
    tick, shown = _keeping(kind)
    step = _wrapped(patch, place, "closure", {"scale": 1.0}, tick)
    with context():
        step(_x())
        each = shown()
        captured, seen = graphs.capture(step), []
        for _ in range(4):
            captured(_x())
            seen.append(shown())
    assert seen == [each * call for call in range(2, 6)]


@pytest.mark.parametrize("form", FORMS)
def test_what_any_form_of_it_keeps_is_kept_once_a_call(form: str, patch: Callable[..., None]) -> None:
    tick, shown = _keeping("append")
    captured = graphs.capture(_wrapped(patch, "F.gelu", form, {"scale": 1.0}, tick))
    with torch.no_grad():
        for call in range(4):
            captured(_x())
            assert shown() == call + 1


HOOKS = {
    "forward": (torch_module.register_module_forward_hook, {}),
    "forward, always called": (torch_module.register_module_forward_hook, {"always_call": True}),
    "forward pre": (torch_module.register_module_forward_pre_hook, {}),
}


@contexts
@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_hook_for_all_modules_keeps_is_kept_once_a_call(hook: str, kind: str, context: Any) -> None:
    (register, options), (tick, shown) = HOOKS[hook], _keeping(kind)

    def hooked(*_: Any) -> None:
        tick()

    captured, seen = graphs.capture(nn.Linear(4, 4)), []
    handle = register(hooked, **options)  # type: ignore[operator]
    try:
        with context():
            for _ in range(4):
                captured(_x())
                seen.append(shown())
    finally:
        handle.remove()
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["counter", "bound method", "object", "partial"])
def test_any_form_of_hook_keeps_what_it_keeps_once_a_call(kind: str) -> None:
    counts = collections.Counter[str]()

    class Hook:
        def count(self, *_: Any) -> None:
            counts.update(["n"])

        __call__ = count

    def counted(held: Any, *_: Any) -> None:
        held.update(["n"])

    forms = {
        "counter": lambda *_: counts.update(["n"]),
        "bound method": Hook().count,
        "object": Hook(),
        "partial": functools.partial(counted, counts),
    }
    captured = graphs.capture(nn.Linear(4, 4))
    handle = torch_module.register_module_forward_hook(forms[kind])
    try:
        with torch.no_grad():
            for call in range(4):
                captured(_x())
                assert counts["n"] == call + 1
    finally:
        handle.remove()


def test_a_hook_that_registers_of_buffers_calls_keeps_what_it_keeps_once_a_call() -> None:
    seen: list[str] = []

    def step(x: Tensor) -> Tensor:
        layer = nn.Module()
        layer.register_buffer("kept", x)
        return layer.kept * 2  # type: ignore[operator]

    captured = graphs.capture(step)
    handle = torch_module.register_module_buffer_registration_hook(lambda layer, name, buffer: seen.append(name))
    try:
        with torch.no_grad():
            for call in range(3):
                captured(_x())
                assert len(seen) == call + 1
    finally:
        handle.remove()


@contexts
def test_a_setting_behind_a_hook_for_all_modules_is_guarded(context: Any) -> None:
    settings, layer = {"scale": 1.0}, nn.Linear(4, 4)
    captured = graphs.capture(layer)
    handle = torch_module.register_module_forward_hook(lambda module, args, output: output * settings["scale"])
    try:
        with context():
            for scale in (1.0, 1.0, 5.0, 5.0):
                settings["scale"] = scale
                assert torch.equal(captured(_x()), layer(_x()))
    finally:
        handle.remove()
    assert captured.report().replays == 4
    with context():
        assert torch.equal(captured(_x()), layer(_x()))


@pytest.mark.parametrize("owner", [torch, builtins], ids=["torch", "builtins"])
def test_a_container_put_among_torchs_names_is_guarded_and_put_back(owner: Any, patch: Callable[..., None]) -> None:
    patch(owner, "added", {"scale": 1.0})

    def step(x: Tensor) -> Tensor:
        return x * (torch.added if owner is torch else added)["scale"]  # type: ignore[name-defined, attr-defined]  # noqa: F821

    captured = graphs.capture(step)
    with torch.no_grad():
        for scale in (1.0, 1.0, 3.0, 3.0):
            owner.added["scale"] = scale
            assert torch.equal(captured(_x()), step(_x()))
    assert captured.report().replays == 4


@pytest.mark.parametrize("place", ["torch.relu", "Tensor.relu", "Linear.forward", "new in builtins"])
def test_what_the_step_does_not_call_makes_no_recording_out_of_date(place: str, patch: Callable[..., None]) -> None:
    settings = {"scale": 1.0}
    _wrapped(patch, place, "closure", settings, lambda: None)
    captured = graphs.capture(nn.Sequential(nn.GELU(), nn.LayerNorm(4)))
    with torch.no_grad():
        for scale in (1.0, 2.0, 3.0, 4.0):
            settings["scale"] = scale
            captured(_x())
    report = captured.report()
    assert (report.recordings, report.replays) == (1, 4)


def test_a_function_taken_out_of_torchs_place_is_called_no_more(patch: Callable[..., None]) -> None:
    own = F.gelu
    step = _wrapped(patch, "F.gelu", "closure", {"scale": 3.0}, lambda: None)
    captured = graphs.capture(step)
    with torch.no_grad():
        assert torch.equal(captured(_x()), own(_x()) * 3)
        patch(F, "gelu", own)
        assert torch.equal(captured(_x()), own(_x()))


@pytest.mark.parametrize("verify", ["capture", "always"])
def test_a_number_that_is_advanced_in_torchs_place_is_advanced_by_replays(verify: Any, patch: Callable[..., None]) -> None:
    count, own = [0], F.gelu

    def counted(x: Tensor) -> Tensor:
        count[0] += 1
        return own(x)

    patch(F, "gelu", counted)
    captured = graphs.capture(lambda x: F.gelu(x), verify=verify)
    with torch.no_grad():
        for call in range(5):
            captured(_x())
            assert count == [call + 1]


def test_an_audit_names_what_is_kept_in_torchs_place_and_puts_it_back(patch: Callable[..., None]) -> None:
    seen, own = list[int](), F.gelu
    patch(F, "gelu", lambda x: (seen.append(1), own(x))[1])
    found = graphs.audit(lambda x: F.gelu(x), _x())
    assert seen == [] and "seen[" in str(found)
    explain(lambda x: F.gelu(x), (_x(),), fuse=False)
    assert seen == []


def test_torchs_and_pythons_own_functions_are_their_own() -> None:
    owners = (torch, F, builtins, math, torch.linalg, Tensor, nn.Module, nn.Linear)
    functions = [item for owner in owners for item in vars(owner).values() if callable(item) and not isinstance(item, type)]
    modules = [str(getattr(item, "__module__", None)).partition(".")[0] for item in functions]
    own = [item for item, module in zip(functions, modules, strict=True) if module in ("torch", "builtins", "None")]
    foreign = [item for item in own if is_foreign(item)]  # functions that `typing_extensions` wrapped; libraries may add more
    assert len(own) > 1000 and len(foreign) < 10, foreign


def test_a_function_is_looked_up_by_those_alone_that_name_it(patch: Callable[..., None]) -> None:
    patch(F, "gelu", lambda x: x)
    found: list[tuple[str, Any]] = []
    replaced = Replaced(found, ())
    space = globals()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        assert replaced.looked_up_by((lambda x: F.relu(x)).__code__, space) == []
        assert replaced.looked_up_by((lambda x: F.gelu(x)).__code__, space) == [("F.gelu", F.gelu)]
        assert replaced.looked_up_by((lambda x: F.gelu(x) * 2).__code__, space) == []
    assert found == [("F.gelu", F.gelu)]
