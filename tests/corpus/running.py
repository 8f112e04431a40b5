"""Running a case eagerly and captured, and seeing what makes the host wait."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
from graphs.dispatch.call_log import NotReplayed
from tests.corpus.case import RECORDED, STEPS, Case
from tests.parity import assert_same, copied, state_of

Tensor = torch.Tensor
Device = torch.device | str
Instruction = tuple[CodeType, int]
Way = tuple[Instruction, ...]
Context = Callable[[], contextlib.AbstractContextManager[Any]]
aten = torch.ops.aten
_WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount),
    *(aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive),
}
_TO_HOST = {getattr(Tensor, name) for name in ("tolist", "numpy", "cpu", "item", "__array__", "__repr__", "__bool__")}


def capture(case: Case, step: Callable[..., Any]) -> Any:
    return graphs.capture(step, bounds=case.bounds)


class _Operators(TorchDispatchMode):
    """Lists operators with the shapes of their results and the values that leave the device."""

    graphs_observer = True

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = _pytree.tree_leaves(result)
        self.seen.append(f"{func} {[tuple(v.shape) if isinstance(v, Tensor) else v for v in leaves]} {_constants(args)}")
        if func is aten.lift_fresh.default:
            with torch._C.DisableTorchFunction():
                self.seen.append(str(result.tolist()))
        if func.overloadpacket in _WAITING or _unsized(func, args, kwargs or {}):
            self.waits.append(str(func))
        return result


def _constants(args: Any) -> list[Any]:
    return [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, (bool, int, float))]


def _unsized(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Operators that wait with some arguments only: a boolean index, ``repeat_interleave`` without its size."""
    if func.overloadpacket is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False


class _Conversions(TorchFunctionMode):
    """Lists conversions that never reach the dispatcher on CPU tensors, with the values they gave."""

    graphs_observer = True

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self.operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _TO_HOST:
            self.operators.waits.append(f"Tensor.{func.__name__}")
            self.operators.seen.append(f"{func.__name__} {result}")
        return result


@contextlib.contextmanager
def watching() -> Iterator[_Operators]:
    """What the host waits for in the body: the modes see it on any device, the driver's own check only on a GPU."""
    operators = _Operators()
    mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    gc.disable()  # recordings of other cases wait for their replays when they are freed
    with contextlib.ExitStack() as stack:
        stack.callback(gc.enable)
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, mode)
        stack.enter_context(_Conversions(operators))
        stack.enter_context(operators)
        yield operators
    operators.waits += [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]


def arguments(case: Case, index: int, device: Device) -> tuple[Any, ...]:
    """The arguments of one step, tensors on ``device``."""
    return _pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, case.inputs(index))


def check(case: Case, device: Device, context: Context = torch.no_grad, *, again: bool = True) -> None:
    """Run a case eagerly and captured, then once more over the same data with everything that waits being listed.

    Args:
        context: entered to make the arguments of a step and to run it.
        again: whether there is a second time.

    Raises:
        AssertionError: an output, an argument or the final state differs, the step is recorded or refused other than
            expected, or a replay waits for the device.
    """
    reference = case.build(device)
    model = copy.deepcopy(reference)
    step = capture(case, model)
    replays = STEPS - case.eager_calls - (0 if case.merged else len(set(ways(case))) - 1)
    for index in range(STEPS):
        _compare(case, device, index, reference, step, context=context)
    _expected(case, replays, step.report())
    if case.expect == RECORDED and again:
        _watched_again(case, device, replays, reference, step)
    _same(case, _state(reference), _state(model), "state")


def _state(model: Any) -> dict[str, Any]:
    """Buffers and plain attributes, lists and dictionaries among them."""
    plain = vars(model).items() if isinstance(model, torch.nn.Module) else ()
    return {**state_of(model), **{n: v for n, v in plain if isinstance(v, (list, dict)) and not n.startswith("_")}}


def _watched_again(case: Case, device: Device, replays: int, reference: Callable[..., Any], step: Any) -> None:
    """The modes are not there while something is recorded: frames of theirs would hide the user's line."""
    plain = 0
    gc.collect()
    for index in range(STEPS):
        before = step.report()
        waits = _compare(case, device, index, reference, step, watching)
        after = step.report()
        if (after.recordings, after.eager_calls) == (before.recordings, before.eager_calls):
            assert waits == [], f"the replay of step {index} waits for the device: {waits}"
            plain += 1
    assert plain >= replays, f"the second time, {plain} plain replays instead of {replays}: {step.report()}"


def _compare(
    case: Case,
    device: Device,
    index: int,
    reference: Callable[..., Any],
    step: Any,
    watch: Any = contextlib.nullcontext,
    context: Context = torch.no_grad,
) -> list[str]:
    with context():
        given, kept = arguments(case, index, device), arguments(case, index, device)
    with watch() as seen:
        got = _seeded(index, step, given, context)
    wanted = _seeded(index, reference, kept, context)
    assert _inference(got) == _inference(wanted), "what is returned can be used where eager's can"
    _same(case, copied(wanted), copied(got), f"output of step {index}")
    _same(case, kept, given, f"arguments of step {index}")
    return seen.waits if seen is not None else []


def _inference(value: Any) -> list[bool]:
    return [leaf.is_inference() for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _seeded(index: int, step: Callable[..., Any], given: tuple[Any, ...], context: Context = torch.no_grad) -> Any:
    torch.manual_seed(index)
    random.seed(index)
    np.random.seed(index)
    with context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        try:
            return step(*given)
        except AssertionError as error:  # the step's own: what it says is its result
            return f"AssertionError: {error}"


def _same(case: Case, wanted: Any, got: Any, what: str) -> None:
    assert_same(wanted, got, what)
    if case.tolerance:
        return
    for a, b in zip(_pytree.tree_leaves(wanted), _pytree.tree_leaves(got), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def _expected(case: Case, replays: int, report: graphs.CaptureReport) -> None:
    if case.expect == RECORDED:
        assert report.replays >= replays, f"{replays} replays expected: {report}"
        assert not case.merged or report.recordings == 1, f"one recording expected: {report}"
        return
    file, lines = case.lines()
    named = [refusal for refusal in report.refusals if refusal.file == file and refusal.line in lines]
    said = [refusal.remedy for refusal in named if refusal.reason == case.expect]
    assert said, f"no refusal {case.expect!r} at {file}:{lines.start}-{lines.stop - 1}; {report}"
    assert any(case.remedy in remedy for remedy in said), f"the remedy should name {case.remedy!r}: {report}"


def outcomes(case: Case) -> list[str]:
    """For each step, run eagerly, everything the host gets to know: operators, shapes, constants, values read."""
    step, found = case.build(), []
    for index in range(STEPS):
        given = arguments(case, index, "cpu")
        with watching() as seen:
            _seeded(index, step, given)
        found.append("\n".join(seen.seen))
    return found


@functools.cache
def ways(case: Case) -> list[Way]:
    """For each step, run eagerly, the instructions of the step's own code in the order they ran."""
    body = case.step.forward if isinstance(case.step, type) else case.step
    codes, step, found = set(_nested(body.__code__)), case.build(), list[Way]()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            way.append((frame.f_code, frame.f_lasti))
        return trace

    previous = sys.gettrace()
    for index in range(STEPS):
        way, given = list[Instruction](), arguments(case, index, "cpu")
        sys.settrace(trace)
        try:
            _seeded(index, step, given)
        finally:
            sys.settrace(previous)
        found.append(tuple(way))
    return found


def unexecuted_lines(case: Case) -> list[str]:
    """Source lines of the step that no step of the run reaches."""
    reached, every = set[tuple[CodeType, int]](), set[tuple[CodeType, int]]()
    taken = {instruction for way in ways(case) for instruction in way}
    for code in {code for code, _ in taken}:
        for start, end, line in code.co_lines():
            if line is not None and line > code.co_firstlineno:
                every.add((code, line))
                reached |= {(code, line) for offset in range(start, end, 2) if (code, offset) in taken}
    return sorted(f"{code.co_name}:{line}" for code, line in every - reached)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
