"""Runs that must not act outside of the step: sides of branches that are not taken, and outcomes that did not occur.

What an ordinary run asks for is told by a list of what a replay cannot stand for (`effects`). Here that is not
enough: whatever is missing in such a list would be done for real. So the lines of the step may only call C functions that
are known to do nothing but compute, or change objects of Python, which is looked at elsewhere.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from graphs.errors import Refusal
from graphs.objects.libraries import origin_of_frame
from graphs.python_reads.code_reads import BETWEEN_THREADS, CodeReads, Observer, is_by_itself, is_collecting, who_logs
from passes import Stopping
from passes.core.source_location import first_frame
from passes.forked_process import put_back_by

_BUILTINS = frozenset(
    (
        *("abs", "all", "any", "ascii", "bin", "callable", "chr", "delattr", "dir", "divmod", "format", "getattr", "globals"),
        *("hasattr", "hash", "hex", "id", "isinstance", "issubclass", "iter", "len", "locals", "max", "min", "next", "oct"),
        *("ord", "pow", "repr", "round", "setattr", "sorted", "sum", "vars", "__build_class__"),
    )
)
_ALL = None
_FUNCTIONS: dict[str, frozenset[str] | None] = {
    **{"builtins": _BUILTINS, "sys": frozenset(("_getframe", "exc_info", "exception", "getrefcount", "getsizeof", "intern"))},
    **{"gc": frozenset(("isenabled",)), "posix": frozenset(("fspath",)), "_thread": frozenset(("allocate_lock", "RLock"))},
    **dict.fromkeys(("math", "cmath", "_operator", "_bisect", "_heapq", "_struct", "_abc", "_weakref", "_json", "_sre"), _ALL),
    **dict.fromkeys(("_functools", "_collections", "itertools", "_typing", "binascii", "zlib", "unicodedata", "_string"), _ALL),
    **dict.fromkeys(("torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special"), _ALL),
    **dict.fromkeys(("torch._C._sparse", "torch._C._nested"), _ALL),
}
"""C functions that act nowhere, by the module that they belong to."""
_TYPES = frozenset(
    (
        *("builtins", "collections", "re", "types", "datetime", "itertools", "_struct", "_thread", "_weakref", "weakref"),
        *("numpy", "torch", "torch._C"),
    )
)
"""Modules of types written in C whose methods act on their objects only."""
_ACTING = frozenset(
    (
        *("tofile", "dump", "from_file", "_write_file", "_shared_decref", "_share_fd_cpu_", "_share_filename_cpu_"),
        *("_share_cuda_", "record_stream", "manual_seed", "seed", "set_state", "set_offset", "resize_", "backward"),
        *("now", "utcnow", "today", "interrupt_main", "exit"),
    )
)
"""Their methods that do more."""
_IN_C = (
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType, types.WrapperDescriptorType),
    *(types.BuiltinMethodType, types.GetSetDescriptorType, staticmethod, classmethod),
)
_QUESTIONS = ("is_", "get_", "has_", "are_", "_is_", "_get_", "_has_", "_are_")
_MACHINERY = frozenset(("torch", "triton", "sympy", "mpmath", "gmpy2", "graphs", "passes"))
"""Packages that trace, and all that they call for it."""
_SETTERS = (
    *("set_default_", "set_float32_", "set_printoptions", "set_rng_state", "set_warn_always", "set_deterministic", "set_num_"),
    *("use_deterministic", "manual_seed", "seed", "fork_rng", "set_stance", "set_device", "set_stream", "set_multithreading"),
)
"""What functions of torch's that are written in Python, and set something for good, begin with."""


_AGAIN = frozenset(("__setitem__", "__delitem__", "save", "load")).union(*BETWEEN_THREADS.values())
"""Functions in Python that are looked at whenever they are called."""


class EffectFoundError(BaseException):
    """A run that must not act outside of the step was about to. No `except Exception` of the step's may take it for its own."""


class _Forbidding(Observer):
    """Stops a run before it acts outside of the step, or reads what lies there.

    Args:
        apart: whether context variables are set in a context that ends with the run.
    """

    def __init__(self, reads: CodeReads, *, apart: bool = False) -> None:
        super().__init__(reads)
        self._apart = apart

    def __call__(self, frame: types.FrameType, event: str, argument: Any) -> None:
        """See `sys.setprofile`."""
        if event == "call":
            if frame.f_code.co_name in _AGAIN:  # of who calls them, not of the code
                self._seen.discard(id(frame.f_code))
            if _sets(frame) and not _is_machinery(frame.f_back):
                raise EffectFoundError(f"it sets what holds for the whole process [torch.{frame.f_code.co_name}]")
        super().__call__(frame, event, argument)
        if event == "c_call" and not is_pure(argument) and not self._is_apart(argument) and not _is_machinery(frame):
            raise EffectFoundError(f"it calls a function of which is not known that it does nothing outside [{_name(argument)}]")

    def _is_apart(self, function: Any) -> bool:
        return self._apart and isinstance(function.__self__, contextvars.ContextVar)

    def _refuse(self, kind: type[Refusal], detail: str, operator: str, frame: types.FrameType) -> None:
        if not is_collecting(frame):
            self._seen.clear()  # a handler of the step's may come by again
            raise EffectFoundError(f"{detail} [{operator}]")


def forbidding() -> Callable[[types.FrameType, str, Any], None]:
    """A profiling hook that raises `EffectFoundError` before what runs acts outside of the step, or reads what lies there."""
    return _Forbidding(CodeReads())


def without_effects(run: Callable[[], Any]) -> Any:
    """The result of ``run``, for outcomes that did not occur: it is stopped where it would act outside of the step.

    Raises:
        EffectFoundError: it was about to, or nobody could see whether it was.
    """
    if not Stopping.is_possible():
        raise EffectFoundError("a profiler or a tracer is active, so nobody can see what it does")
    watch, context = Stopping(_Forbidding(CodeReads(), apart=True)), contextvars.copy_context()
    with _unwarned():
        watch.start()
        try:
            result = context.run(run)
        finally:
            watch.stop()
    if watch.count:
        raise EffectFoundError("it was about to act outside of the step, and caught the exception that stopped it")
    return result


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """`warnings.warn` does nothing in this thread: a run that did not occur says nothing, and no place is warned of by it."""
    warn, thread = warnings.warn, threading.get_ident()

    @functools.wraps(warn)
    def silent(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != thread:
            warn(*args, **kwargs)

    with put_back_by(lambda: setattr(warnings, "warn", warn)):
        warnings.warn = silent
        yield


def is_pure(function: Any) -> bool:
    """Whether a C function, or a method written in C, is known to do nothing outside of its arguments."""
    name, owner, module = function.__name__, function.__self__, function.__module__
    if owner is None:
        return getattr(torch._C._VariableFunctions, name, None) is function and name not in _ACTING
    if owner is torch._C:
        return bool(name.startswith(_QUESTIONS))
    if type(owner) is types.ModuleType:
        allowed = _FUNCTIONS.get(str(module), frozenset())
        return allowed is _ALL or name in allowed or (module == "numpy" and name not in _ACTING)
    if isinstance(owner, contextvars.ContextVar):
        return name == "get"
    if name in _ACTING:
        return False
    kinds = (*type.mro(owner), *type.mro(type)) if isinstance(owner, type) else type(owner).__mro__
    definer = next((kind for kind in kinds if isinstance(vars(kind).get(name), _IN_C)), object)  # a method in Python called it
    return definer.__module__ in _TYPES


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", function))


def _sets(frame: types.FrameType) -> bool:
    """Whether a function of torch's begins that sets something for good."""
    name, module = frame.f_code.co_name, str(frame.f_globals.get("__name__", ""))
    if name == "__set__":
        return module.startswith("torch.backends")
    return name.startswith(_SETTERS) and module.partition(".")[0] == "torch"


def _is_machinery(frame: types.FrameType | None) -> bool:
    """Whether a call comes from what traces or runs the step, not from its own lines or those of libraries that they call."""
    if is_by_itself(frame) or is_collecting(frame):
        return True
    caller = first_frame(who_logs(frame), lambda frame: origin_of_frame(frame) != "python")
    if caller is None or origin_of_frame(caller) in ("own", "torch"):
        return True
    return str(caller.f_globals.get("__name__", "")).partition(".")[0] in _MACHINERY
