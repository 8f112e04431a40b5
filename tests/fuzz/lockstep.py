"""Driving a program captured and eager, each in a module of its own, and the first difference between them."""

from __future__ import annotations

import copy
import linecache
import random
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import graphs
from graphs.numerics.tolerance import tolerance
from tests.fuzz.program import Program

Tensor = torch.Tensor
INVALID = (NameError, SyntaxError, getattr(torch, "AcceleratorError", SyntaxError))
"""What a program that is none raises, eagerly: a statement is gone that it needs, or a device ends over a value."""


FORM = ("type", "requires_grad", "strides")
"""What a tensor is besides its data; data is compared first."""
SEVERITY = ("same", "rounded", "form", "wrong", "crashed")


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        kind: ``"same"``, ``"rounded"`` (other last bits), ``"form"`` (equal data in tensors of other strides, type or
            ``requires_grad``), ``"wrong"`` (another output, state or random numbers), ``"crashed"`` (raises where eager does
            not), or ``"invalid"``.
        detail: what differs first, and in which call; the message of the exception.
        calls, replays: how many there were.
        refusals: reasons why calls were not replayed.
    """

    kind: str
    detail: str = ""
    calls: int = 0
    replays: int = 0
    refusals: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.kind in ("wrong", "crashed")


def run(program: Program, device: str = "cpu") -> Outcome:
    """Both twins, call by call, from the same seed. Random states and default settings are put back."""
    states = torch.get_rng_state(), random.getstate()
    try:
        return _run(program, device)
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        for name in [name for name in sys.modules if name.startswith("fuzz_")]:
            del sys.modules[name]


def _run(program: Program, device: str) -> Outcome:
    source = program.source().replace('DEVICE = "cpu"', f"DEVICE = {device!r}")
    try:
        expected = list(_calls(source, "eager", captured=False))
    except INVALID as error:
        return Outcome("invalid", repr(error))
    if any(isinstance(call["raised"], INVALID) for call in expected):
        return Outcome("invalid", repr(expected[-1]["raised"]))
    calls = 0
    step: Any = None
    worst = ("same", "")
    for calls, (wanted, got) in enumerate(zip(expected, _calls(source, "captured", captured=True), strict=True), 1):
        step = got["step"]
        kind, detail = _compared(wanted, got)
        worst = max(worst, (kind, f"call {calls - 1}: {detail}"), key=lambda one: SEVERITY.index(one[0]))
        if kind in ("wrong", "crashed"):
            break
    report = step.report()
    refusals = tuple(sorted({f"{one.reason}" for one in report.refusals}))
    return Outcome(*worst, calls, report.replays, refusals)


def _module(source: str, name: str) -> types.ModuleType:
    """The source as a module whose lines can be looked up."""
    file = f"/fuzz/{name}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    module = types.ModuleType(f"fuzz_{name}")
    module.__file__ = file
    module.__dict__["FIXED"] = None
    sys.modules[module.__name__] = module  # or its classes would be taken for a library's
    exec(compile(source, file, "exec"), module.__dict__)
    module.__dict__["FIXED"] = module.__dict__["noise"](99, 3, 4)
    return module


def _calls(source: str, name: str, *, captured: bool) -> Iterator[dict[str, Any]]:
    module = _module(source, name)
    space = vars(module)
    _seed(0)
    model = space["Step"]().eval().to(space["DEVICE"])
    step = graphs.capture(model, **space["SETTINGS"]) if captured else model
    for call in range(space["CALLS"]):
        output, raised, arguments = None, None, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                space["change"](call, model, space)
                arguments = space["arguments"](call)
                with space["context"](call):
                    output = step(*arguments)
            except Exception as error:
                raised = error
        called = {
            "raised": raised,
            "output": _frozen(output, {}),
            "arguments": _frozen(arguments, {}),
            "state": _frozen(_state(model, space), {}),
            "random": _random(space["DEVICE"]),
            "step": step,
        }
        del arguments, output  # so that containers of the next call may take the addresses of these
        yield called


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


def _random(device: str) -> Any:
    states: list[Any] = [torch.get_rng_state(), hash(random.getstate())]
    return [*states, torch.cuda.get_rng_state()] if device == "cuda" else states


def _state(model: nn.Module, space: dict[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in space.items() if name.isupper()}
    return {**vars(model), **plain, "offset": type(model).__dict__["offset"]}


def _frozen(value: Any, memo: dict[int, Any]) -> Any:
    """A copy that later calls leave alone: tensors with layout, containers, the program's own objects and modules."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        memo[id(value)] = frozen = {
            "type": type(value).__name__,
            "requires_grad": value.requires_grad,
            "strides": value.stride(),
            "data": value.detach().clone(),
        }
        return frozen
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, dict):
        return type(value).__name__, [(key, _frozen(item, memo)) for key, item in value.items() if "hook" not in str(key)]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_frozen(item, memo) for item in value]
    if isinstance(value, nn.Module) or type(value).__module__.startswith("fuzz_"):
        return type(value).__name__, _frozen({k: v for k, v in vars(value).items() if not callable(v)}, memo)
    return copy.copy(value) if isinstance(value, (int, float, str, bytes, type(None), torch.dtype)) else type(value).__name__


def _compared(wanted: dict[str, Any], got: dict[str, Any]) -> tuple[str, str]:
    """How a call of the captured twin went, and what differs."""
    a, b = wanted["raised"], got["raised"]
    if type(a) is not type(b):
        if a is None:
            place = next((f"{t.tb_frame.f_code.co_filename}:{t.tb_lineno}" for t in _frames(b)), "")
            return "crashed", f"{type(b).__name__} {str(b)[:200]} [{place}]"
        return "wrong", f"eager raises {type(a).__name__} ({str(a)[:80]}), captured {type(b).__name__}"
    parts = [difference(wanted[part], got[part], part) for part in ("output", "arguments", "state", "random")]
    return max(parts, key=lambda one: SEVERITY.index(one[0]))


def _frames(error: BaseException) -> list[Any]:
    """Frames of an exception, the innermost of this project first."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    return [
        one
        for one in reversed(frames)
        if "/graphs/" in one.tb_frame.f_code.co_filename or "/passes/" in one.tb_frame.f_code.co_filename
    ]


def difference(a: Any, b: Any, where: str) -> tuple[str, str]:
    """``"same"``, ``"rounded"`` or ``"wrong"``, and what differs."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensors(a, b, where)
    if type(a) is not type(b):
        return "wrong", f"{where} is a {type(b).__name__}, eager a {type(a).__name__}"
    if isinstance(a, dict):
        a, b = list(a.items()), list(b.items())
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return "wrong", f"{where} has {len(b)} items, eager {len(a)}"
        worst = ("same", "")
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            named = isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)
            found = difference(*((x[1], y[1], f"{where}.{x[0]}") if named else (x, y, f"{where}[{index}]")))
            if found[0] == "wrong":
                return ("form", found[1]) if named and x[0] in FORM else found
            worst = max(worst, found, key=lambda one: SEVERITY.index(one[0]))
        return worst
    if isinstance(a, float) and isinstance(b, float) and a != b and (a == a or b == b):
        close = abs(a - b) <= 1e-5 * max(1.0, abs(a))
        return ("rounded", "") if close else ("wrong", f"{where} is {b!r}, eager {a!r}")
    return ("same", "") if a == b or a != a else ("wrong", f"{where} is {b!r}, eager {a!r}")


def _tensors(a: Tensor, b: Tensor, where: str) -> tuple[str, str]:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return "wrong", f"{where} is {b.dtype}{tuple(b.shape)} on {b.device}, eager {a.dtype}{tuple(a.shape)} on {a.device}"
    if torch.equal(a, b):
        return "same", ""
    if not a.dtype.is_floating_point:
        return "wrong", f"{where} is {b.flatten()[:6].tolist()}, eager {a.flatten()[:6].tolist()}"
    limit = tolerance(a.dtype)
    if torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()):
        return "same", ""
    if torch.allclose(a, b, rtol=limit, atol=limit, equal_nan=True):
        return "rounded", ""
    return "wrong", f"{where} is {b.flatten()[:6].tolist()}, eager {a.flatten()[:6].tolist()}"
