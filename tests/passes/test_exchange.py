"""`code_patching` and `source_transform`: what a function does with other code, and that it gets its own back."""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from passes.control_flow.code_patching import ENTRY, branch_in, functions_of, patched, rewritten, written
from passes.core.source_location import Place


def branches_of(function: Callable[..., Any]) -> frozenset[tuple[int, int]]:
    """Line and column of all ``if`` statements and conditional expressions of a function."""
    source, first = inspect.getsourcelines(function)
    indent = len(source[0]) - len(source[0].lstrip())
    tree = ast.parse(textwrap.dedent("".join(source)))
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp))]
    return frozenset((node.lineno + first - 1, node.col_offset + indent) for node in found)


def chain(a: int, b: int, *rest: int, scale: int = 2, **named: int) -> Any:
    if a > b:
        return "above", a * scale
    elif a == b:
        for value in rest:
            if value < 0:
                continue
            if value > 3:
                a += value
                continue
            b -= value
    else:
        a, b = (b, a) if named else (a, -b)
    if not a or (b and a > 1 and not b == 2):  # noqa: SIM201
        return a, b
    total = [value if value else None for value in (a, b)]
    return total, (scale if a else "nothing")


def both_return(a: int) -> str:
    while a > 2:
        a -= 2
        if a % 2:
            a += 1
        else:
            return "even"
    if a:
        return "odd"
    else:
        return "none"


def annotated(a: Undefined, b: int = 3) -> Undefined:  # type: ignore[name-defined]  # noqa: F821
    """Annotations are not evaluated again."""
    c: int = a if a > b else b
    if c > 1:
        c = c + 1
    return c


class Base:
    def scaled(self, a: int) -> int:
        return a * 2


class Derived(Base):
    @staticmethod
    def plain(a: int) -> int:
        if a:
            a = 3
        return a

    def scaled(self, a: int) -> int:
        if a > 1:
            a = super().scaled(a)
        return a


FUNCTIONS = [chain, both_return, annotated, Derived.scaled, Derived.plain]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_outside_of_a_trace_other_code_does_what_the_function_does(function: Any) -> None:
    place = written(function.__code__)
    new = rewritten(function.__code__, branches_of(function))
    assert new is not None and new.co_freevars == function.__code__.co_freevars and new.co_firstlineno >= place[1].co_firstlineno
    own = function.__code__
    first = [Derived()] if function is Derived.scaled else []
    values = list(itertools.product(range(-1, 4), repeat=4 if function is chain else 1))
    calls = [((*first, *given), {"extra": 1} if function is chain and sum(given) % 2 else {}) for given in values]
    expected = [function(*args, **kwargs) for args, kwargs in calls]
    with patched({place: branches_of(function)}, None, functions_of([place])):
        assert function.__code__ is new
        assert [function(*args, **kwargs) for args, kwargs in calls] == expected
    assert function.__code__ is own


class Recorder:
    """Stands for the branches of a trace: has every branch go the first way."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int]] = []

    def if_stmt(self, test: Any, before: Any, assigned: Any, joined: Any, start: tuple[int, int]) -> Any:
        self.starts.append(start)
        return Always()

    def truth(self, test: Any, asked: Any) -> Any:
        return test


class Always:
    def enter(self, side: bool) -> bool:
        return side

    def leave(self, local: Any) -> None: ...

    def restarts(self, name: str) -> bool:
        return False

    joins = restarts


def simple(a: int) -> str:
    if a:
        return "taken"
    return "not taken"


PLACE = written(simple.__code__)
PLAN = {PLACE: branches_of(simple)}


def test_only_the_thread_that_traces_meets_its_branches() -> None:
    recorder, elsewhere = Recorder(), list[str]()
    with patched(PLAN, recorder, functions_of([PLACE])):
        assert simple(0) == "taken"
        thread = threading.Thread(target=lambda: elsewhere.append(simple(0)))
        thread.start()
        thread.join()
    assert elsewhere == ["not taken"] and recorder.starts == [*branches_of(simple)]
    assert simple(0) == "not taken"


def test_code_is_put_back_whatever_happens() -> None:
    own = simple.__code__
    with pytest.raises(ZeroDivisionError), patched(PLAN, Recorder(), functions_of([PLACE])):
        assert simple.__code__ is not own
        raise ZeroDivisionError
    assert simple.__code__ is own and ENTRY.if_stmt(0).enter(False)


def test_code_that_still_runs_when_its_function_has_its_own_again_asks_nobody() -> None:
    with patched(PLAN, Recorder(), functions_of([PLACE])):
        other = FunctionType(simple.__code__, {})  # as a frame that is running keeps it
        assert other(0) == "taken"
    assert other(0) == "not taken" and other(1) == "taken"


def test_every_function_with_the_code_is_found() -> None:
    def made() -> Callable[[int], int]:
        def inner(a: int) -> int:
            if a:
                a = 2
            return a

        return inner

    first, second = made(), made()
    place = written(first.__code__)
    found = functions_of([place])[place]
    assert {id(function) for function in found} == {id(first), id(second)}


@pytest.mark.parametrize(
    "text",
    [
        "def step(a):\n    global B\n    if a:\n        B = 1\n    return a\n",
        "def step(a):\n    for _ in range(2):\n        if a:\n            break\n    return a\n",
        "def step(a):\n    if a:\n        raise ValueError\n    return a\n",
        "def step(a):\n    if a:\n        yield a\n",
        "def step(a):\n    if a:\n        try:\n            a = 1\n        except ValueError:\n            pass\n    return a\n",
        "def step(a):\n    b = 1\n    if a:\n        del b\n    return a\n",
        "def step(a):\n    if a:\n        a.__hidden = 1\n    return a\n",
        "def step(a):\n    if a:\n        return a\n    a += 1\n",
        "def step(a):\n    if a:\n        import os\n    return a\n",
    ],
)
def test_sides_that_leave_in_other_ways_are_left_alone(tmp_path: Path, text: str) -> None:
    step = defined(tmp_path / "steps.py", text)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "if a" in line)
    assert branch_in(step.__code__, Place(step.__code__.co_filename, line)) is None


def defined(path: Path, text: str) -> Any:
    path.write_text(text)
    linecache.checkcache(str(path))
    space: dict[str, Any] = {}
    exec(compile(text, str(path), "exec", dont_inherit=True), space)
    return space["step"]


def test_a_file_that_changed_is_not_trusted(tmp_path: Path) -> None:
    text = "def step(a):\n    if a:\n        a = 1\n    return a\n"
    step = defined(tmp_path / "steps.py", text)
    place = Place(step.__code__.co_filename, 2)
    assert branch_in(step.__code__, place) == (2, 4)
    (tmp_path / "steps.py").write_text(text.replace("a = 1", "a = 12"))
    linecache.checkcache(str(tmp_path / "steps.py"))
    assert branch_in(step.__code__, place) is None


def test_equal_code_in_two_files_is_told_apart(tmp_path: Path) -> None:
    text = "def step(a):\n    if a:\n        a = 1\n    return a\n"
    first, second = defined(tmp_path / "one.py", text), defined(tmp_path / "two.py", text)
    assert first.__code__ == second.__code__
    for step, file in ((first, "one.py"), (second, "two.py")):
        new = rewritten(step.__code__, frozenset(((2, 4),)))
        assert new is not None and new.co_filename.endswith(file) and written(new) == written(step.__code__)
    assert functions_of([written(first.__code__)]) == {written(first.__code__): [first]}
