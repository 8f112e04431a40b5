"""What the Python of a step asks for: the functions that run, the names they mention, and calls that nobody can guard.

A profiling hook sees every function that starts and every C function that is called. The names that the code of those
functions mentions are all that it can look up, so the values which have to be guarded are the ones that stand under these
names. What depends on something outside the process (a clock, a file) cannot be compared at a later call, and what is
written outside of it would not be written again: both make the step eager.
"""

from __future__ import annotations

import builtins
import dis
import functools
import gc
import os
import re
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from graphs.errors import Refusal, SideEffect, Site, UnguardedRead
from graphs.objects.libraries import in_torchs_models, origin_of
from graphs.python_reads.call_hook import calls_seen_by, is_profiled
from graphs.python_reads.effects import NAMES, SEEDS, refused_call, refused_loads
from passes.core.source_location import first_frame, is_user, line_of

BETWEEN_THREADS = {
    "queue": frozenset(("put", "get", "join", "task_done")),
    "threading": frozenset(("wait", "notify", "set", "clear", "start", "join", "acquire", "release")),
    "concurrent.futures._base": frozenset(("result", "exception", "wait", "as_completed")),
    "concurrent.futures.thread": frozenset(("submit",)),
    "concurrent.futures.process": frozenset(("submit",)),
    "multiprocessing.queues": frozenset(("put", "get")),
    "multiprocessing.connection": frozenset(("send", "recv", "send_bytes", "recv_bytes", "poll")),
    "asyncio.runners": frozenset(("run",)),
    "asyncio.base_events": frozenset(("run_until_complete", "call_soon", "call_soon_threadsafe")),
}
"""Functions by which threads and processes speak to each other, by Python module; a lock alone says nothing."""
_OF_THE_KEY = ("grad", "inference", "autocast", "stack")  # modes, which belong to the key of a call
_SETTINGS = ("get", "_get_", "are_deterministic_", "is_deterministic_", "isenabled")
_CONTEXT = frozenset(("get", "set"))
_HANDS = {"acquire": 1, "release": -1}
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_NAMES = NAMES | _CONTEXT | _HANDS.keys()
_COUNT_ANYWHERE = _NAMES | {"initial_seed"}
_OF_REPR = ("dataclasses", "reprlib")
_CALLERS_OF_THEIR_OWN = frozenset(("torch", "triton", "importlib", "linecache", "inspect", "tokenize"))
"""Packages that read files and clocks for themselves: to load code, to compile kernels, to show lines."""
_ON_BEHALF = ("torch.serialization", "torch.storage", "torch.hub", "torch.package", "torch.utils.data", "torch.utils.tensorboard")
"""Parts of torch that read and write what the step tells them to."""
_ENVIRONMENT = frozenset(getattr(type(os.environ), name).__code__ for name in ("__getitem__", "__iter__", "__len__"))
_LONGEST = 80  # characters of a text that may name an attribute
_COMPUTED = frozenset(
    ("getattr", "vars", "__dict__", "attrgetter", "hasattr", "setattr", "__getattribute__", "__getattr__", "globals")
)
_GETS = frozenset(("getattr", "hasattr"))
_CALLS = frozenset(("PRECALL",) if "PRECALL" in dis.opmap else ("CALL_FUNCTION", "CALL"))  # of 3.11; of those before and after
_PUSHES = frozenset(
    f"LOAD_{what}" for what in ("CONST", "FAST", "FAST_BORROW", "FAST_CHECK", "SMALL_INT", "DEREF", "GLOBAL", "NAME", "CLOSURE")
)
_WORDS = re.compile(r"[A-Za-z_]\w*")


@dataclass
class CodeReads:
    """What one observed run asked for.

    Attributes:
        codes: the functions that ran and the globals they ran in, by identity of the code; neither Python's own nor, but for
            its layers and the like, torch's.
        refusals: calls that no replay can stand for.
        variables: context variables that were read or set, with what they held before.
        settings: functions of torch and of Python that told the step a setting, by name.
        locks: how much more often each lock was taken than given back by the step's own lines.
        environment: whether environment variables were read.
        complete: False where another profiler was active and nothing could be observed.
        before: called with the frame of each function that starts, neither Python's own nor this package's, before its first
            line runs.
    """

    codes: dict[int, tuple[types.CodeType, dict[str, Any]]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    variables: dict[ContextVar[Any], Any] = field(default_factory=dict)
    settings: dict[str, Callable[[], Any]] = field(default_factory=dict)
    locks: Counter[Any] = field(default_factory=Counter)
    environment: bool = False
    complete: bool = True
    before: Callable[[types.FrameType], None] | None = None

    def names(self) -> frozenset[str]:
        """Every name that the functions mention, and every text in them that may be one."""
        found: set[str] = set()
        for code, _ in self.codes.values():
            found.update(names_in(code))
        return frozenset(found)

    def kept(self) -> CodeReads:
        """What guards are made of; nothing of the run is held."""
        variables = dict.fromkeys(self.variables)
        return CodeReads(
            dict(self.codes), [], variables, dict(self.settings), environment=self.environment, complete=self.complete
        )

    def covers(self, other: CodeReads) -> bool:
        """Whether another run asked for nothing that this one did not ask for."""
        return (
            self.complete == other.complete
            and self.environment >= other.environment
            and self.variables.keys() >= other.variables.keys()
            and all(self.settings.get(name) is setting for name, setting in other.settings.items())
            and all(key in self.codes and self.codes[key][1] is names for key, (_, names) in other.codes.items())
        )

    def left_set(self) -> Iterator[Refusal]:
        """Context variables that hold something else after the run than before, and locks, by which others are told something."""
        if any(self.locks.values()):
            yield SideEffect("the step takes or gives back a lock for another thread", operator="threading.Lock")
        for variable, before in self.variables.items():
            if variable.get(None) is not before:
                yield SideEffect("the step leaves a context variable set", operator=f"ContextVar({variable.name!r})")

    def computed(self) -> bool:
        """Whether a function looks attributes of the user's objects up by names that do not stand in its code."""
        return any(
            _computes_names(code) if origin_of(code.co_filename) != "user" else not _COMPUTED.isdisjoint(code.co_names)
            for code, _ in self.codes.values()
        )


def names_in(code: types.CodeType) -> frozenset[str]:
    """Attributes that a function looks up, with the comprehensions and functions inside of it, and texts that may name one."""
    return _names(code)[0]


def global_names(code: types.CodeType) -> frozenset[str]:
    """Globals and builtins that a function looks up or sets, with the comprehensions and functions inside of it."""
    return _names(code)[1]


def imported_names(code: types.CodeType) -> frozenset[str]:
    """Python modules that a function imports when it runs, as it writes them."""
    return _names(code)[2]


def stored_names(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes that a function sets or deletes, with the comprehensions and functions inside of it."""
    return _names(code)[3]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str], frozenset[str]]:
    attributes, names, modules, stored = set[str](), set[str](), set[str](), set[str]()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("STORE_GLOBAL", "STORE_ATTR", "DELETE_GLOBAL", "DELETE_ATTR")):
            stored.add(instruction.argval)
        if instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")):
            names.add(instruction.argval)
        elif instruction.opname.startswith(
            ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "STORE_ATTR", "DELETE_ATTR", "IMPORT_FROM")
        ):
            attributes.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            modules.add(instruction.argval)
            attributes.update(instruction.argval.split("."))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            attributes |= inner[0]
            names |= inner[1]
            modules |= inner[2]
            stored |= inner[3]
        for text in constant if isinstance(constant, (tuple, frozenset)) else (constant,):
            if isinstance(text, str) and len(text) < _LONGEST:
                attributes.update(words_in(text))
                stored.update(words_in(text) if {"setattr", "delattr"}.intersection(code.co_names) else ())
                names.update((text,) if "globals" in code.co_names and text.isidentifier() else ())
                modules.update((text,) if "modules" in code.co_names or "import_module" in code.co_names else ())
    return frozenset(attributes), frozenset(names), frozenset(modules), frozenset(stored)


@functools.lru_cache(maxsize=4096)
def _computes_names(code: types.CodeType) -> bool:
    """Whether ``getattr`` or ``hasattr`` is called with a name that is no constant."""
    if any(isinstance(constant, types.CodeType) and _computes_names(constant) for constant in code.co_consts):
        return True
    if _GETS.isdisjoint(code.co_names):
        return False
    instructions = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    looked_up = [index for index, step in enumerate(instructions) if step.argval in _GETS and step.opname.startswith("LOAD")]
    return any(not _is_constant_name(instructions[index + 1 :]) for index in looked_up)


def _is_constant_name(following: list[dis.Instruction]) -> bool:
    """Whether the second argument of a call is a constant text, by the instructions after the function was loaded.

    They are followed with a stack that tells of each value whether it is one; what is not understood counts as computed.
    """
    stack: list[bool] = []
    for step in following[following[0].opname == "PUSH_NULL" :]:
        jumps = step.opcode in dis.hasjrel or step.opcode in dis.hasjabs
        if jumps or (step.opname in _CALLS and step.arg == len(stack)):
            return len(stack) > 1 and stack[1]
        depth = len(stack) + dis.stack_effect(step.opcode, step.arg)
        if step.opname not in _PUSHES:  # its result stands in the place of what it takes
            stack = stack[: max(depth - 1, 0)]
        stack += [False] * (depth - len(stack))
        if depth < 1:
            return False
        stack[-1] = step.opname == "LOAD_CONST" and isinstance(step.argval, str)
    return False


def words_in(text: str) -> list[str]:
    """Whatever in a text may be the name of an attribute."""
    return _WORDS.findall(text)


class Observer:
    """The profiling hook of one run."""

    def __init__(self, reads: CodeReads) -> None:
        self.reads = reads
        self._seen: set[int] = set()
        self._keep: list[types.CodeType] = []

    def __call__(self, frame: types.FrameType, event: str, argument: Any) -> None:
        """See `sys.setprofile`."""
        if event == "call":
            code = frame.f_code
            if id(code) not in self._seen:
                self._seen.add(id(code))
                self._keep.append(code)
                self._started(code, frame)
        elif event == "c_call":
            name = getattr(argument, "__name__", "")
            if name in _NAMES:
                self._called(name, argument, frame)
            elif name.startswith(_SETTINGS) or (name.startswith("is_") and name.endswith("_enabled")):
                self._asked(name, argument, frame)
            elif name == "initial_seed" and isinstance(argument.__self__, torch.Generator) and not _is_our_own(frame):
                self.reads.settings[name] = argument

    def _started(self, code: types.CodeType, frame: types.FrameType) -> None:
        if is_collecting(frame):
            return
        if code in _ENVIRONMENT:
            self.reads.environment = True
        elif code in _ENVIRONMENT_WRITES and not is_by_itself(frame):
            self._refuse(SideEffect, "the step sets an environment variable", "os.environ", frame)
        origin = origin_of(code.co_filename)
        module = frame.f_globals.get("__name__", "")
        if origin not in ("python", "own") and self.reads.before is not None:
            self.reads.before(frame)
        if origin in ("user", "library") or (origin == "torch" and _is_layers_code(code, str(module))):
            self.reads.codes[id(code)] = (code, frame.f_globals)
            if origin != "torch":
                self._loads(code, frame)
        elif module == "torch.serialization" and code.co_name in ("save", "load"):
            kind = SideEffect if code.co_name == "save" else UnguardedRead
            self._refuse(kind, "the step writes or reads a file", f"torch.{code.co_name}", frame)
        elif code.co_name in BETWEEN_THREADS.get(str(module), ()) and not is_by_itself(frame):
            name = getattr(code, "co_qualname", code.co_name)
            self._refuse(SideEffect, "the step gives something to another thread, or waits for it", name, frame)

    def _loads(self, code: types.CodeType, frame: types.FrameType) -> None:
        """Refuse what a function gives to C to call, or calls by way of C, where no hook sees it."""
        for refusal in refused_loads(code, frame):
            if not is_by_itself(frame):
                self._refuse(*refusal, frame)

    def _called(self, name: str, function: Any, frame: types.FrameType) -> None:
        owner, module = getattr(function, "__self__", None), getattr(function, "__module__", None)
        if origin_of(frame.f_code.co_filename) == "own":  # a hook of this project's, or a captured module inside this one
            return
        if name in _CONTEXT and isinstance(owner, ContextVar):
            self.reads.variables.setdefault(owner, owner.get(None))
            return
        if name in _HANDS:
            if type(owner) in _LOCKS and origin_of(frame.f_code.co_filename) in ("user", "library"):
                self.reads.locks[owner] += _HANDS[name]
            return
        if name == "get_ident" and frame.f_globals.get("__name__") in _OF_REPR:  # to see whether it is called by itself
            return
        refusal = refused_call(name, owner, module)
        if refusal is not None and not (_is_our_own(frame) if name in SEEDS else is_by_itself(frame)):
            self._refuse(*refusal, frame)

    def _asked(self, name: str, function: Any, frame: types.FrameType) -> None:
        """Note a setting that the step asks for; what torch's own modules ask of torch belongs to the key of a call."""
        if any(word in name for word in _OF_THE_KEY):
            return
        module = str(getattr(function, "__module__", ""))
        of_process = module in ("sys", "gc") or module.startswith("torch") or getattr(function, "__self__", None) is torch._C
        asked = of_process and origin_of(frame.f_code.co_filename) in ("user", "library")
        if asked and name not in self.reads.settings:
            try:
                function()
            except TypeError:  # it takes arguments: no setting
                return
            self.reads.settings[name] = function

    def _refuse(self, kind: type[Refusal], detail: str, operator: str, frame: types.FrameType) -> None:
        if is_collecting(frame):
            return
        refusal = kind(detail, operator=operator, site=Site.at(_line(frame)))
        if all(known.signature != refusal.signature for known in self.reads.refusals):
            self.reads.refusals.append(refusal)


def _may_tell(code: types.CodeType) -> bool:
    """Whether it matters which functions of C a function calls: in torch, only those that count wherever they are called."""
    origin = origin_of(code.co_filename)
    return origin != "own" and (origin != "torch" or not _COUNT_ANYWHERE.isdisjoint(code.co_names))


def _is_layers_code(code: types.CodeType, module: str) -> bool:
    """Whether a function is one of torch's layers and the like, whose attributes count; not what registers attributes."""
    return in_torchs_models(module) and code.co_name not in ("__setattr__", "__delattr__", "__init__")


def is_collecting(frame: types.FrameType | None) -> bool:
    """Whether a frame belongs to what the garbage collector calls, which is no part of the step."""
    if not gc.callbacks:
        return False
    codes = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    return first_frame(frame, lambda frame: frame.f_code in codes) is not None


_ENVIRONMENT_WRITES = frozenset(getattr(type(os.environ), name).__code__ for name in ("__setitem__", "__delitem__"))


def _is_our_own(frame: types.FrameType | None) -> bool:
    """Whether a call comes from this package, by way of Python's own code and torch's."""
    caller = first_frame(frame, lambda frame: origin_of(frame.f_code.co_filename) not in ("python", "torch"))
    return caller is not None and origin_of(caller.f_code.co_filename) == "own"


_LOGGING = ("logging", "warnings")


def is_by_itself(frame: types.FrameType | None) -> bool:
    """Whether a call comes from a package that calls it for purposes of its own."""
    caller = first_frame(who_logs(frame), lambda frame: _purpose(frame) != "")
    return caller is None or _purpose(caller) == "its own"


def _purpose(frame: types.FrameType) -> str:
    """What a frame calls for: an empty string where that is its caller's to say, since it is Python's or this package's."""
    module = str(frame.f_globals.get("__name__", ""))
    if not module.startswith(_ON_BEHALF) and module.partition(".")[0] in _CALLERS_OF_THEIR_OWN:
        return "its own"
    passes_on = not module.startswith(_ON_BEHALF) and origin_of(frame.f_code.co_filename) in ("python", "own")
    return "" if passes_on else "the step"


def who_logs(frame: types.FrameType | None) -> types.FrameType | None:
    """The frame that logs or warns, where ``frame`` belongs to a handler of that: it acts for whoever logs. Else ``frame``."""
    emitter, above = frame, frame
    while above is not None and origin_of(above.f_code.co_filename) != "own":
        if above.f_globals.get("__name__") in _LOGGING:
            emitter = above.f_back
        above = above.f_back
    return emitter


def _line(frame: types.FrameType | None) -> tuple[str, int]:
    """File and line of the innermost frame of the user's program, or of a library above torch, that is not Python's own."""
    return line_of(first_frame(frame, lambda frame: is_user(frame) and origin_of(frame.f_code.co_filename) != "python"))


def observed(run: Callable[[], Any], reads: CodeReads) -> Callable[[], Any]:
    """``run`` with the hook installed: what it asks for is put into ``reads``.

    A profiler that is active already stays; then ``reads`` is marked as incomplete.
    """

    def observe() -> Any:
        if is_profiled():
            reads.complete = False
            return run()
        try:
            with calls_seen_by(Observer(reads), _may_tell):
                return run()
        finally:
            reads.refusals += reads.left_set()

    return observe


assert time.time.__module__ == "time" and builtins.print.__module__ == "builtins"  # what `refused_call` tells them by
