"""C functions that ask for what lies outside of the process, or act there, by the names that Python gives them.

A profiling hook sees C functions that Python calls. Those that C calls it does not see: ``map(print, ...)``,
``functools.partial(print)``. So a function is also looked at for the values that it loads without calling them itself.
"""

from __future__ import annotations

import dis
import functools
import io
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from graphs.errors import Refusal, SideEffect, UnguardedRead
from graphs.objects.raw_access import attributes_of

_CLOCKS = frozenset(
    (
        *("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns"),
        *("process_time", "process_time_ns", "thread_time", "localtime", "gmtime", "ctime"),
        *("clock_gettime", "strftime", "asctime"),
    )
)
_DATES = frozenset(("now", "utcnow", "today"))
_FILES = frozenset(
    (
        *("open", "stat", "lstat", "fstat", "access", "readlink", "listdir", "scandir", "getcwd", "fromfile", "input"),
        *("read", "readline", "readlines", "readinto", "urandom", "getrandom", "load", "fetchone", "fetchmany", "fetchall"),
        *("recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg", "accept", "_accept"),
        *("getpid", "getppid", "getloadavg", "cpu_count", "times", "get_ident", "get_native_id"),
    )
)
_WRITES = frozenset(
    (
        *(
            "print",
            "write",
            "writelines",
            "send",
            "sendall",
            "system",
            "fork_exec",
            "tofile",
            "put",
            "pwrite",
            "writev",
            "pwritev",
        ),
        *("unlink", "remove", "rename", "replace", "mkdir", "rmdir", "link", "symlink", "truncate", "ftruncate", "utime"),
        *("mkfifo", "mknod", "chdir", "fchdir", "chroot", "chmod", "fchmod", "lchmod", "chown", "fchown", "lchown", "umask"),
        *("kill", "killpg", "abort", "_exit", "fork", "forkpty", "posix_spawn", "posix_spawnp", "execv", "execve", "nice"),
        *("dup", "dup2", "close", "closerange", "pipe", "fsync", "fdatasync", "sync", "lockf", "sendfile", "copy_file_range"),
        *("connect", "connect_ex", "bind", "listen", "shutdown", "sendto", "sendmsg", "setsockopt"),
        *("putenv", "unsetenv", "setpriority", "sched_setaffinity", "setrlimit"),
        *("writerow", "writerows", "dump", "execute", "executemany", "executescript", "commit", "rollback"),
    )
)
_SEEDS = frozenset(("manual_seed", "seed", "set_state", "set_offset"))
_THREADS = frozenset(("start_new_thread", "start_joinable_thread"))
_PROCESS = {
    "sys": frozenset(
        ("setrecursionlimit", "setswitchinterval", "setprofile", "settrace", "set_int_max_str_digits", "addaudithook")
    ),
    "gc": frozenset(("enable", "disable", "freeze", "unfreeze", "set_threshold", "set_debug")),
    "_signal": frozenset(
        (
            *("signal", "alarm", "setitimer", "set_wakeup_fd", "siginterrupt"),
            *("pthread_sigmask", "pthread_kill", "raise_signal"),
        )
    ),
    "_socket": frozenset(("setdefaulttimeout", "sethostname")),
    "_locale": frozenset(("setlocale",)),
    "atexit": frozenset(("register", "unregister")),
    "faulthandler": frozenset(("enable", "disable", "register", "unregister", "dump_traceback_later")),
    "time": frozenset(("sleep", "tzset")),
    "torch": frozenset(("set_num_threads", "set_num_interop_threads", "set_flush_denormal")),
}
"""Functions that set what holds for the whole process, by module; a replay would not set it again."""
NAMES = frozenset().union(_CLOCKS, _DATES, _FILES, _WRITES, _SEEDS, _THREADS, *_PROCESS.values())
"""Names of all C functions that may be refused."""
SEEDS = _SEEDS
_OUTSIDE = ("posix", "nt", "_io", "io", "builtins", "_posixsubprocess", "_thread", "_socket", "_pickle", "numpy", "resource")
_OF_FILES = ("_io", "_socket", "socket", "_queue", "_csv", "sqlite3", "_pickle")
"""Modules of the types whose instances stand for files and connections."""


def refused_call(name: str, owner: Any, module: str | None) -> tuple[type[Refusal], str, str] | None:
    """What is wrong with a call of a C function of this name, if anything: the refusal's kind, detail and operator."""
    if name in _PROCESS.get(module or "", ()):
        return (
            SideEffect,
            "the step sets what holds for the whole process, which a replay would not",
            f"{module}.{name}".lstrip("_"),
        )
    if name in _CLOCKS and module == "time":
        return UnguardedRead, "the step reads a clock", f"time.{name}"
    if name == "put" and type(owner).__module__ != "_queue":
        return None
    if name in _DATES and isinstance(owner, type) and owner.__module__ == "datetime":
        return UnguardedRead, "the step reads a clock", f"{owner.__name__}.{name}"
    if name in _SEEDS and isinstance(owner, torch.Generator):
        return UnguardedRead, "the step sets the state of a random generator", f"Generator.{name}"
    if name in _THREADS:
        return SideEffect, "the step starts a thread", f"threading.{name}"
    outside = _is_outside(owner) or module in _OUTSIDE
    if name in _WRITES and outside:
        return SideEffect, "the step writes to a file, a terminal or a connection, which a replay would not", name
    if name in _FILES and outside:
        return UnguardedRead, "the step reads what lies outside of this process", name
    return None


def _is_outside(owner: Any) -> bool:
    """Whether an object stands for a file or a connection; text and bytes in memory do not."""
    if isinstance(owner, (io.StringIO, io.BytesIO)):
        return False
    return isinstance(owner, io.IOBase) or type(owner).__module__ in _OF_FILES


def refused_value(value: Any, *, called: bool) -> tuple[type[Refusal], str, str] | None:
    """What is wrong with a value that a function loads, if that may be called where no hook sees it.

    Args:
        called: whether the function does nothing with it but call it, which a hook sees.
    """
    depth = 0
    while issubclass(type(value), functools.partial) and depth < 16:
        held = (*value.args, *value.keywords.values())
        found = next((found for part in held if (found := refused_value(part, called=False)) is not None), None)
        if found is not None:
            return found
        value, called, depth = value.func, False, depth + 1
    if value is io.FileIO:
        return UnguardedRead, "the step reads what lies outside of this process", "FileIO"
    if called or not issubclass(type(value), types.BuiltinFunctionType) or value.__name__ not in NAMES:
        return None
    return refused_call(value.__name__, value.__self__, value.__module__)


_LOADS = frozenset(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CLASSDEREF"))
_ATTRIBUTES = frozenset(("LOAD_ATTR", "LOAD_METHOD"))
_NOTHING = object()


def refused_loads(code: types.CodeType, frame: types.FrameType) -> Iterator[tuple[type[Refusal], str, str]]:
    """What is wrong with the values that a function loads as it begins in ``frame``: of names, and of attributes of those.

    Looks up without running anything of the user's. What a name is bound to later, or what a container holds, is not seen.
    """
    local = frame.f_locals
    of_function = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}  # no globals, though they are not bound yet
    spaces = (local, frame.f_globals, frame.f_builtins)
    for path, called in _loads(code):
        value = _named(path[0], spaces[:1] if path[0] in of_function else spaces)
        for name in path[1:]:
            value = _attribute(value, name)
        found = refused_value(value, called=called) if value is not _NOTHING else None
        if found is not None:
            yield found


@functools.lru_cache(maxsize=4096)
def _loads(code: types.CodeType) -> tuple[tuple[tuple[str, ...], bool], ...]:
    """Names with the attributes looked up in them, and whether what is found is called at once."""
    found: dict[tuple[tuple[str, ...], bool], None] = {}
    path: tuple[str, ...] = ()
    pushed = called = False  # what marks a callee comes before it up to Python 3.12, and behind it from 3.13 on
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in _ATTRIBUTES and path:
            path = (*path, instruction.argval)
            called = pushed or _pushes_self(instruction)
            continue
        if path:
            found[path, called or (name == "PUSH_NULL" and sys.version_info >= (3, 13))] = None
            pushed = False
        path = (instruction.argval,) if name in _LOADS else ()
        called = pushed = name == "PUSH_NULL" or (pushed and bool(path)) or _pushes_null(instruction)
    return tuple(found)


def _pushes_null(instruction: dis.Instruction) -> bool:
    """Whether a global is loaded to be called. Python 3.10 does not tell, so there it is taken to be."""
    if instruction.opname != "LOAD_GLOBAL":
        return False
    return sys.version_info < (3, 11) or bool((instruction.arg or 0) & 1)


def _pushes_self(instruction: dis.Instruction) -> bool:
    """Whether an attribute is loaded to be called."""
    return instruction.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and bool((instruction.arg or 0) & 1))


def _named(name: str, spaces: tuple[Any, ...]) -> Any:
    for space in spaces:
        if name in space:
            return space[name]
    return _NOTHING


def _attribute(value: Any, name: str) -> Any:
    """An attribute as it lies in a dictionary: no property is asked, no ``__getattr__`` runs."""
    if value is _NOTHING:
        return value
    own = attributes_of(value)
    if own and name in own:
        return own[name]
    if issubclass(type(value), types.ModuleType):
        return _NOTHING
    kinds = value.__mro__ if type(value) is type else type(value).__mro__
    held = next((vars(kind)[name] for kind in kinds if name in vars(kind)), _NOTHING)
    return held.__func__ if type(held) is staticmethod else held
