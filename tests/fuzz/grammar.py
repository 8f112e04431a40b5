"""Random programs from a seed: expressions of known form, statements made of them, changes between calls."""

from __future__ import annotations

import random
import re

from tests.fuzz.forms import ATOMS, CHANGES, HEADERS, INNER, PYTHON, RESULTS, STATEMENTS, VARIANTS
from tests.fuzz.program import CONTEXTS, LOCALS, Block, Program, Statement


class Grammar:
    """Programs out of one random generator."""

    def __init__(self, draws: random.Random) -> None:
        self.draws = draws

    def program(self) -> Program:
        """A program of up to some ten statements."""
        draws = self.draws
        body = self.body(draws.choice((1, 2, 2, 3, 3, 4, 5)), 0)
        result = self.text(draws.choice(RESULTS), 2)
        written = [name for name in LOCALS if re.search(rf"\b{name}\b", str(body))]
        if draws.random() < 0.75:  # else some of what the body computes would be of no use to anyone
            result = ", ".join([f"({result})", *written])
        calls = draws.randint(6, 12)
        changes = [(draws.randint(2, calls - 1), draws.choice(CHANGES)) for _ in range(draws.choice((0, 0, 1, 2)))]
        told = " ".join(map(repr, (body, result)))
        related = [line for line in CHANGES if (name := re.search(r"(?:step\.|space\[['\"])(\w+)", line)) and name[1] in told]
        changes += [(draws.randint(2, calls - 1), draws.choice(related)) for _ in range(draws.choice((0, 1, 2))) if related]
        names = [name for name in VARIANTS if draws.random() < 0.35]
        arguments = [(name, draws.choice(VARIANTS[name])) for name in names]
        return Program(body, result, tuple(arguments), tuple(sorted(changes)), self.contexts(), calls)

    def contexts(self) -> tuple[str, ...]:
        """Mostly one; at times they take turns."""
        if self.draws.random() < 0.1:
            return tuple(self.draws.choice(list(CONTEXTS)) for _ in range(self.draws.randint(2, 3)))
        return (self.draws.choices(list(CONTEXTS), weights=(5, 5, 1, 1, 2))[0],)

    def body(self, size: int, depth: int) -> tuple[Statement, ...]:
        """Statements, a third of them compound."""
        return tuple(self.block(depth) if depth < 2 and self.draws.random() < 0.35 else self.simple() for _ in range(size))

    def simple(self) -> str:
        """A statement of one line."""
        return self.text(self.draws.choice(PYTHON if self.draws.random() < 0.1 else STATEMENTS), 2)

    def block(self, depth: int) -> Block:
        """A compound statement; loops hold one statement about what they go over."""
        header = self.draws.choice(HEADERS)
        if header == "try:":
            handler = ("except (RuntimeError, ValueError, IndexError):", (self.simple(),))
            raising = self.text("if {C}: raise ValueError('refused')", 1)
            return Block((("try:", (*self.body(1, depth + 1), raising)), handler))
        parts = []
        for number, part in enumerate(header.replace(": el", ":\nel").split("\n")):
            inner = list(self.body(self.draws.randint(1, 2), depth + 1))
            for start, lines in INNER.items():
                if part.startswith(start):
                    inner.append(self.text(self.draws.choice(lines), 1))
            if part.startswith("while"):
                inner.append("turn += 1")
            parts.append((self.text(part if part.endswith(":") else part + ":", 1), tuple(inner)))
            assert number < 3
        return Block(tuple(parts))

    def text(self, form: str, depth: int) -> str:
        """``form`` with its placeholders filled; atoms without placeholders once ``depth`` is used up."""

        def fill(found: re.Match[str]) -> str:
            kind = found[1]
            choices = ATOMS["A" if kind == "B" else kind]
            plain = [atom for atom in choices if "{" not in atom.replace("{{", "")]
            made = self.text(self.draws.choice(choices if depth > 0 and self.draws.random() < 0.6 else plain), depth - 1)
            return f"({made})" if re.search(r"[ ~]", _without_brackets(made)) else made

        return re.sub(r"(?<!\{)\{([A-Z])\}", fill, form).replace("{{", "{").replace("}}", "}")


def _without_brackets(text: str) -> str:
    """``text`` without what stands in brackets, which binds tightest."""
    before = ""
    while before != text:
        before, text = text, re.sub(r"\([^()\[\]{}]*\)|\[[^()\[\]{}]*\]|\{[^()\[\]{}]*\}", "", text)
    return text


def generate(seed: int) -> Program:
    """The program of a seed."""
    return Grammar(random.Random(seed)).program()
