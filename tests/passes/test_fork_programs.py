"""Random small programs of branches and writes: merged, rewritten, and compared with eager bit for bit over many outcomes."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from passes.errors import Unremovable
from tests.passes.steps import check, rewritten

SIMPLE = [
    "x = x * 2 + y",
    "y = cache[1] - x",
    "y = cache[n % 4] + k",
    "x += y",
    "y.mul_(0.5)",
    "y[1:] -= 1",
    "x, y = y, x",
    "z = x + 1",
    "x = z * y",
    "k = k + n",
    "k = 3",
    "n = int(t[1])",
    "n = min(n, 2)",
    "cache[2] += x",
    "cache[n % 4] = y",
    "cache[1:3].mul_(0.5)",
    "cache[:, n % 3] = 1.5",
    "cache[: n % 4] += 1",
    "cache.index_add_(0, rows, torch.stack([x, y]))",
    "cache[n % 4].zero_()",
    "x = cache[: n % 4 + 1].sum(0)",
    "x = [-0.0, x][0] * y",
    "x = x if t[2] > 0 else y",
    "k = n if n > 1 else -k",
    "y = (x if t[0] > 0 else y) + (y if t[1] > 1 else x)",
    "k = k + t[t > 0].numel() * t[t > 1].numel()",
    "cache.index_add_(0, rows[t[:2] > 0], torch.stack([x, y])[t[:2] > 0])",
    "y = cache[rows[t[:2].clamp(0, 1)]][int(t[0]) % 2]",
    "y = cache[n + 1] if n < 3 else y",
    "x = x.index_select(0, t) if t.min() >= 0 and t.max() < 3 else x",
]
CONDITIONS = [
    *("t[0] > 0", "t[1] == 2", "n > 1", "not t[2] > 0", "k > 2 and t[0] > 1", "n == 0 or t[2] < 0", "x.sum() > 0"),
    *("n % 2", "(cache[n % 4] > 0).any()"),
]


def indented(lines: list[str]) -> str:
    return textwrap.indent("\n".join(lines), "    ")


def branch(block: SearchStrategy[list[str]]) -> SearchStrategy[str]:
    with_other = st.tuples(st.sampled_from(CONDITIONS), block, block)
    plain = st.tuples(st.sampled_from(CONDITIONS), block)
    return st.one_of(
        with_other.map(lambda p: f"if {p[0]}:\n{indented(p[1])}\nelse:\n{indented(p[2])}"),
        plain.map(lambda p: f"if {p[0]}:\n{indented(p[1])}"),
    )


def loop(block: SearchStrategy[list[str]]) -> SearchStrategy[str]:
    skipped = st.sampled_from(["", *(f"if {condition}:\n    k = k + 1\n    continue" for condition in CONDITIONS)])
    return st.tuples(skipped, block).map(lambda p: f"for _ in range(2):\n{indented([line for line in (p[0], *p[1]) if line])}")


def blocks(depth: int) -> SearchStrategy[list[str]]:
    simple = st.sampled_from(SIMPLE)
    if not depth:
        return st.lists(simple, min_size=1, max_size=3)
    inner = blocks(depth - 1)
    return st.lists(st.one_of(simple, branch(inner), loop(inner)), min_size=1, max_size=4)


RETURNS = st.tuples(st.sampled_from(CONDITIONS), blocks(0)).map(lambda p: f"if {p[0]}:\n{indented(p[1])}\n    return x - k, y, z")
PROGRAMS = st.tuples(blocks(2), st.one_of(st.just(""), RETURNS), blocks(0)).map(
    lambda p: [line for line in (*p[0], p[1], *p[2]) if line]
)
NUMBERS = itertools.count()


def compiled(lines: list[str], folder: Path) -> Any:
    """A program as the function of a module of its own, whose source can be read."""
    name = f"fork_program_{next(NUMBERS)}"
    body = ["n, k, z, rows = 1, 2, x, torch.tensor([3, 0])", *lines, "return x * k, y + n, z"]
    path = folder / f"{name}.py"
    path.write_text(f"import torch\n\n\ndef step(cache, x, y, t):\n{indented(body)}\n")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(PROGRAMS, st.lists(st.tuples(*[st.integers(-1, 3)] * 3), min_size=4, max_size=4))
def test_a_program_of_branches_is_eager_for_every_outcome(
    folder: Path, lines: list[str], outcomes: list[tuple[int, ...]]
) -> None:
    step = compiled(lines, folder)
    torch.manual_seed(0)
    try:
        arguments = torch.randn(4, 3), torch.randn(3), torch.randn(3), torch.tensor(outcomes[0])
        try:
            graph = rewritten(step, *arguments, merge=True)
        except Unremovable:  # it stays eager, by name
            reject()
        for outcome in outcomes:
            check(graph, step, torch.randn(4, 3), torch.randn(3), torch.randn(3), torch.tensor(outcome), may_break=True)
    finally:
        del sys.modules[step.__module__]
