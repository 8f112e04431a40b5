"""What a random program is, and its source text: a module with a step, its arguments and what changes between calls."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

ROWS, WIDTH, SLOTS = 3, 4, 8
ARGUMENTS = {
    "x": f"noise(i, {ROWS}, {WIDTH})",
    "y": f"noise(i + 50, {ROWS}, {WIDTH})",
    "t": "torch.tensor((i * 5 + 2) % 4).to(DEVICE)",
    "n": "2",
    "m": f"noise(i + 70, {ROWS}) > 0",
    "idx": f"whole(i, {ROWS}, {WIDTH})",
    "pair": f'[noise(i + 20, {ROWS}, {WIDTH}), {{"b": noise(i + 30, {WIDTH})}}]',
    "cache": "CACHE",
    "keep": "False",
}
"""Arguments that a step may take, as expressions of the call's number ``i``."""

FIELDS = {
    "buf": f'self.register_buffer("buf", torch.ones({ROWS}, {WIDTH}))',
    "kv": f'self.register_buffer("kv", torch.zeros({SLOTS}, {WIDTH}))',
    "step": 'self.register_buffer("step", torch.tensor(0))',
    "weight": f"self.weight = nn.Parameter(noise(90, {ROWS}, {WIDTH}))",
    "bias": f"self.bias = nn.Parameter(noise(91, {WIDTH}))",
    "lin": f"self.lin = nn.Linear({WIDTH}, {WIDTH})",
    "norm": f"self.norm = nn.LayerNorm({WIDTH})",
    "drop": "self.drop = nn.Dropout(0.5)",
    "blocks": f"self.blocks = nn.ModuleList([nn.Linear({WIDTH}, {WIDTH}), nn.Tanh()])",
    "count": "self.count = 0",
    "scale": "self.scale = 1.5",
    "flag": "self.flag = True",
    "items": "self.items = [0.5, 2.0]",
    "table": 'self.table = {"s": 0.75, "on": True}',
    "box": "self.box = Box()",
    "last": f"self.last = torch.zeros({ROWS}, {WIDTH}).to(DEVICE)",
    "seen": "self.seen = []",
    "gen": "self.gen = torch.Generator(DEVICE).manual_seed(3)",
}
"""Attributes of a step, and the line that makes each."""

GLOBALS = {
    "SCALE": "SCALE = 1.25",
    "LIMITS": 'LIMITS = {"n": 2, "low": -0.5}',
    "ORDER": "ORDER = [1, 0, 2]",
    "weigh": "def weigh(v, by=0.5, *, plus=0.0):\n    return v * by + plus",
    "make": "def make(k):\n    def inner(v):\n        return v * k + 1\n    return inner",
    "inner": "inner = make(1.5)",
}
LOCALS = {
    "a": "a = x * 1.0",
    "b": f"b = torch.ones({ROWS}, {WIDTH}, device=x.device)",
    "v": "v = x.sum(0)",
    "w": "w = 1.0",
    "q": "q = 1",
    "turn": "turn = 0",
}
"""Variables that statements read and assign, and what each is at first, so that any statement can be left out."""

CONTEXTS = {
    "no_grad": "torch.no_grad()",
    "inference_mode": "torch.inference_mode()",
    "autocast": "both(torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16))",
    "autocast inference": "both(torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16))",
    "grad": "contextlib.nullcontext()",
}

_HEAD = """\
import contextlib
import random

import torch
import torch.nn.functional as F
from torch import nn

DEVICE = "cpu"


def noise(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def whole(seed, high, size):
    return torch.randint(high, (size,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def both(first, second):
    stack = contextlib.ExitStack()
    stack.enter_context(first)
    stack.enter_context(second)
    return stack


class Box:
    pass

"""


@dataclass(frozen=True)
class Block:
    """A compound statement: headers (``if ...:``, ``elif ...:``, ``else:``), each with its body."""

    parts: tuple[tuple[str, tuple[Statement, ...]], ...]


Statement = str | Block


@dataclass(frozen=True)
class Program:
    """A step and how it is driven.

    Attributes:
        body: of ``forward``.
        result: the expression it returns.
        arguments: name and expression of the arguments that are not those of `ARGUMENTS`; ``i`` is the call.
        changes: call before which a statement runs, and the statement, about ``step`` and ``space`` (the module's names).
        contexts: of each call, in turn.
        calls: how many.
        settings: keyword arguments of `graphs.capture`, as text.
    """

    body: tuple[Statement, ...]
    result: str
    arguments: tuple[tuple[str, str], ...] = ()
    changes: tuple[tuple[int, str], ...] = ()
    contexts: tuple[str, ...] = ("no_grad",)
    calls: int = 8
    settings: str = ""

    def source(self) -> str:
        """The module: only the names that something mentions are made."""
        body = list(_lines(self.body, 2))
        text = "\n".join([*body, self.result, *(line for _, line in self.changes), *(line for _, line in self.arguments)])
        local = [f"        {line}" for name, line in LOCALS.items() if _names(name, "\n".join([*body, self.result]))]
        told = "\n".join([text, *local])
        arguments = {**{name: line for name, line in ARGUMENTS.items() if name == "x" or _names(name, told)}}
        arguments.update((name, line) for name, line in self.arguments if name in arguments)
        fields = [f"        {line}" for name, line in FIELDS.items() if re.search(rf"\b(self|step)\.{name}\b", told)]
        needed = {name for name in GLOBALS if _names(name, told)}
        needed |= {"make"} if "inner" in needed else set()
        parts = [_HEAD, *(f"{line}\n" for name, line in GLOBALS.items() if name in needed)]
        if "cache" in arguments or "CACHE" in told:
            parts.append(f"CACHE = Box()\nCACHE.keys = torch.zeros({SLOTS}, {WIDTH}).to(DEVICE)\nCACHE.position = 0\n")
        parts += ["", "class Step(nn.Module):", "    offset = 0.25", "", "    def __init__(self):", "        super().__init__()"]
        parts += [*fields, "", f"    def forward(self, {', '.join(arguments)}):"]
        parts += [*local, *body, f"        return {self.result}", "", ""]
        parts += ["def arguments(i):", *_arguments(arguments), "", ""]
        parts += ["def change(i, step, space):", *_changes(self.changes), "", ""]
        return "\n".join(
            [*parts, *_contexts(self.contexts), "", f"CALLS = {self.calls}", f"SETTINGS = dict({self.settings})", ""]
        )

    def script(self) -> str:
        """The program as a file that runs by itself and prints the first difference."""
        return self.source() + _TAIL


_TAIL = """

def drive(captured):
    torch.manual_seed(0)
    step = Step().eval().to(DEVICE)
    called = __import__("graphs").capture(step, **SETTINGS) if captured else step
    for i in range(CALLS):
        change(i, step, globals())
        with context(i):
            try:
                yield called(*arguments(i))
            except Exception as error:
                yield repr(error)


if __name__ == "__main__":  # twins share the names of this module here: run each in a process of its own where that matters
    import sys

    for i, output in enumerate(drive("eager" not in sys.argv)):
        print(i, output)
"""


def _names(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w.]){name}\b", text) is not None


def _lines(body: tuple[Statement, ...], depth: int) -> Iterator[str]:
    indent = "    " * depth
    for statement in body:
        if isinstance(statement, str):
            yield from (indent + line for line in statement.split("\n"))
            continue
        for header, inner in statement.parts:
            yield indent + header
            yield from _lines(inner, depth + 1) if inner else [indent + "    pass"]


def _arguments(arguments: dict[str, str]) -> list[str]:
    lines = [f"    {name} = {line}" for name, line in arguments.items()]
    return [*lines, f"    return ({', '.join(arguments)},)"]


def _changes(changes: tuple[tuple[int, str], ...]) -> list[str]:
    lines = []
    for call, line in changes:
        lines.append(f"    if i == {call}:")
        lines += [f"        {part}" for part in line.split("\n")]
    return lines or ["    pass"]


def _contexts(contexts: tuple[str, ...]) -> list[str]:
    if len(set(contexts)) == 1:
        return ["def context(i):", f"    return {CONTEXTS[contexts[0]]}", ""]
    lines = [f"    if i % {len(contexts)} == {turn}:\n        return {CONTEXTS[name]}" for turn, name in enumerate(contexts)]
    return ["def context(i):", *lines, ""]
