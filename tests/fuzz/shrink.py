"""Making a failing program smaller while it still fails in the same way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

from tests.fuzz.program import Block, Program, Statement

Body = tuple[Statement, ...]
_SIMPLER = ("a", "b", "v", "w", "q", "x", "y", "0.5", "1", "True")


def shrink(program: Program, fails: Callable[[Program], bool], limit: int = 300) -> Program:
    """The smallest program found with at most ``limit`` runs: each step takes the first smaller one that ``fails``."""
    runs = 0
    while True:
        for smaller in _smaller(program):
            runs += 1
            if runs > limit:
                return program
            if fails(smaller):
                program = smaller
                break
        else:
            return program


def _smaller(program: Program) -> Iterator[Program]:
    change = dataclasses.replace
    for index in range(len(program.changes)):
        yield change(program, changes=_without(program.changes, index))
    for index in range(len(program.arguments)):
        yield change(program, arguments=_without(program.arguments, index))
    for context in dict.fromkeys(("no_grad", *program.contexts)):
        if program.contexts != (context,) and (len(program.contexts) > 1 or context == "no_grad"):
            yield change(program, contexts=(context,))
    yield from (change(program, body=body) for body in _bodies(program.body))
    for result in ("a", "a, v", *_parts(program.result)):
        if len(result) < len(program.result):
            yield change(program, result=result)
    if program.calls > 2:
        yield change(program, calls=program.calls - 1)


def _without(items: tuple, index: int) -> tuple:
    return items[:index] + items[index + 1 :]


def _bodies(body: Body) -> Iterator[Body]:
    """Bodies with a statement less, a compound statement replaced by what it holds, or a shorter expression."""
    for index in range(len(body)):
        yield _without(body, index)
    for index, statement in enumerate(body):
        if isinstance(statement, Block):
            yield from (body[:index] + inner + body[index + 1 :] for _, inner in statement.parts)
            if len(statement.parts) > 1:
                yield (*body[:index], Block(statement.parts[:-1]), *body[index + 1 :])
            yield from ((*body[:index], one, *body[index + 1 :]) for one in _blocks(statement))
        else:
            yield from ((*body[:index], one, *body[index + 1 :]) for one in _parts(statement))


def _blocks(block: Block) -> Iterator[Block]:
    for index, (header, inner) in enumerate(block.parts):
        made = [(header, smaller) for smaller in _bodies(inner)]
        made += [(smaller, inner) for smaller in _parts(header) if smaller.split(" ")[0] == header.split(" ")[0]]
        yield from (Block((*block.parts[:index], part, *block.parts[index + 1 :])) for part in made)


def _parts(text: str) -> Iterator[str]:
    """``text`` with one bracket's content, or the method call after it, replaced by a name; most of these are no programs."""
    for found in re.finditer(r"\(([^()]*)\)|\[([^\[\]]*)\]", text):
        for simple in _SIMPLER:
            if len(simple) < len(found[0]) and not re.match(r"\w", text[found.start() - 1 : found.start()] or " "):
                yield text[: found.start()] + simple + text[found.end() :]
        yield text[: found.start()] + text[found.end() :]
    for found in re.finditer(r"\.\w+\([^()]*\)|\w+(\.\w+)*\([^()]*\)|[\w.]+\[[^\[\]]*\]|(self|cache)\.\w+", text):
        yield text[: found.start()] + text[found.end() :]
        if not text[found.start()].startswith("."):
            yield from (text[: found.start()] + simple + text[found.end() :] for simple in _SIMPLER[:6])
    for found in re.finditer(r" [-+*@&|<>]=? [\w.]+| (and|or) [\w.]+|[\w.]+ [-+*@&|] |, [\w.]+(?=[,)])", text):
        yield text[: found.start()] + text[found.end() :]
