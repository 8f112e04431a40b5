"""Finding the Python values that a step can have read, and a guard for each.

The walk starts at the model, its opaque arguments and the globals that the functions of the observed run look up. From an
object it follows only attributes whose names stand in the code that ran (`code_reads`): what no code names, no code has read.
Containers are followed whole. Looking runs no code of the user's: attributes are taken from the dictionaries and slots they
lie in, entries of dictionaries by the methods of ``dict``.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from graphs.errors import Refusal
from graphs.guards.container_guards import MappingGuard, NamesGuard, SequenceGuard
from graphs.guards.guard import Guard
from graphs.guards.namespace_guards import guard_environment, guard_module, guard_namespaces
from graphs.guards.object_guards import guard_object, guard_weakly_held, memory_of, version_of
from graphs.guards.portrait import portrait
from graphs.guards.python_guards import About, Guards
from graphs.guards.traversal import LEAVES, Scope, Traversal
from graphs.guards.value_guards import ValueGuard
from graphs.objects.c_objects import variable_content
from graphs.objects.cells import ABSENT, Difference
from graphs.objects.kinds import NOT_ENTERED
from graphs.objects.raw_access import of_type
from graphs.python_reads.code_reads import CodeReads
from graphs.state.counters import Counter
from graphs.state.inventory import Link

Tensor = torch.Tensor
_LIMIT = 200_000  # objects


def guards_of(
    reads: CodeReads,
    roots: Iterable[tuple[str, Any]],
    advanced: Sequence[Counter] = (),
    links: Sequence[Link] = (),
    uploaded: Sequence[Tensor] = (),
    placed: Iterable[int] = (),
    opaques: Sequence[tuple[str, Any]] = (),
    asked: Sequence[Tensor] = (),
) -> Guards:
    """The guards of a recording.

    Args:
        reads: what the observed run asked for.
        roots: where values can hang, with the names to call them by.
        advanced: numbers that the recording advances itself.
        links: links to the tensors that the recording reads in place.
        uploaded: host tensors that it holds copies of, whose versions tell of writes.
        asked: tensors of which the step asked where they lie.
        placed, opaques: see `GuardWalk`.
    """
    walk = GuardWalk(reads, roots, [(counter.container, counter.key) for counter in advanced], placed, opaques)
    versions = [
        ValueGuard("a host tensor's version", functools.partial(version_of, tensor), by_value=True) for tensor in uploaded
    ]
    kinds = [ValueGuard(f"the type of {counter.path}", counter.kind) for counter in advanced]
    lying = [ValueGuard("where a tensor lies", functools.partial(memory_of, tensor), by_value=True) for tensor in asked]
    return walk.guards([*versions, *kinds, *lying], walk.of_links(links))


class GuardWalk:
    """One walk; `guards` is what came of it.

    Args:
        reads: what the observed run asked for.
        roots: where values can hang, with the names to call them by.
        advanced: container and key of the numbers that the recording advances itself.
        placed: identities of tensors whose place and layout are checked elsewhere.
        opaques: those of the roots that are looked at last, so that what they alone lead to is known.

    Attributes:
        complete: False when more hangs on the step than is worth comparing.
    """

    def __init__(
        self,
        reads: CodeReads,
        roots: Iterable[tuple[str, Any]],
        advanced: Iterable[tuple[Any, Any]] = (),
        placed: Iterable[int] = (),
        opaques: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self._last = list(opaques)
        last = {id(value) for _, value in opaques}
        self._roots = [root for root in roots if id(root[1]) not in last]
        keys: dict[int, set[Any]] = {}
        for container, key in advanced:
            keys.setdefault(id(container), set()).add(key)
        scope = Scope(reads, keys, frozenset(placed))
        self._own: set[int] = set()
        self._reached: frozenset[int] = frozenset()
        self.complete = True
        while True:  # functions that were found and did not run in the observed run may run in others
            size = scope.size
            self._traversal = Traversal(scope)
            self._look()
            if scope.size == size or not self.complete:
                break

    @property
    def incomparable(self) -> list[Refusal]:
        """What was found that no later call can be compared with."""
        return self._traversal.incomparable

    def guards(self, more: Iterable[Guard] = (), behind: Sequence[Guard] = ()) -> Guards:
        """All guards, with ``more`` of the caller's, and those for what lies ``behind`` objects that no function names.

        What opaque arguments alone lead to is told apart, unless something lies behind them: then nobody knows what.
        """
        into = self._traversal
        view = portrait(self._last, into.scope, reached=self._reached) if self._last and not behind else None
        own = frozenset(self._own & view.visited) if view is not None else frozenset[int]()
        about = About(into.subjects, into.scope.kept(), view, own, self._reached)
        return Guards(into.watched, [*into.polled, *more, *behind], about)

    def changed(self) -> Difference | None:
        """The first value that is not what it was when the walk saw it."""
        return next((found for guard in self._all() if (found := guard.difference()) is not None), None)

    def of_links(self, links: Sequence[Link]) -> list[Guard]:
        """Guards for links to tensors that the walk did not find: behind objects that no observed function names."""
        guarded = {id(guard.mapping) for guard in self._all() if isinstance(guard, (MappingGuard, NamesGuard))}
        guarded |= {id(guard.sequence) for guard in self._all() if isinstance(guard, SequenceGuard)}
        left = [link for link in links if id(link.container) not in guarded and not isinstance(link.container, tuple)]
        dicts = {id(link.container): link.container for link in left if isinstance(link.container, dict)}
        for identity, container in dicts.items():
            keys = {link.key: link.path for link in left if id(link.container) == identity}
            form = next(iter(keys.values())).rpartition(".")[0] + ".{}"
            self._traversal.mapping(form, container, keys.__contains__, enter=False)
        return [
            ValueGuard(link.path, functools.partial(_item, link.container, link.key))
            for link in left
            if id(link.container) not in dicts
        ]

    def _all(self) -> list[Guard]:
        return [*self._traversal.watched, *self._traversal.polled]

    def _look(self) -> None:
        """Look at everything once, with what is in scope by now."""
        into = self._traversal
        into.pending += [*self._roots, ("Tensor", Tensor)]
        guard_namespaces(into)
        self._guard_observed()
        last = list(self._last)
        root_ids = {id(root) for _, root in [*self._roots, *last]}
        before: set[int] | None = None
        weak: set[int] = set()
        while into.pending or into.weakly or last:
            into.subject = None
            if not into.pending and last:
                if before is None:
                    before, weak = set(into.seen), {id(weakref.ref.__call__(reference)) for _, reference in into.weakly}
                into.pending.append(last.pop())
            elif not into.pending:
                guard_weakly_held(into, *into.weakly.pop())
                continue
            path, value = into.pending.pop()
            if type(value) is types.ModuleType:  # that an object holds, or an argument is
                guard_module(into, path, value, into.names, id(value))
            if type(value) in LEAVES or of_type(value, NOT_ENTERED) or id(value) in into.seen:
                continue
            if len(into.seen) > _LIMIT:
                self.complete, self._own, self._reached = False, set(), frozenset()
                return
            into.seen.add(id(value))
            if id(value) not in root_ids:
                into.keep.append(value)
            into.subject = id(value), path
            guard_object(into, path, value)
        into.subject = None
        self._own = into.seen - before if before is not None else set()
        self._reached = frozenset((into.seen - self._own) | weak)

    def _guard_observed(self) -> None:
        """Guard what the run asked the process for: the environment, settings, context variables."""
        into, reads = self._traversal, self._traversal.scope.reads
        if reads.environment:
            guard_environment(into)
        for name, setting in reads.settings.items():
            into.add_value(f"{name}()", setting, by_value=True)
        for variable in reads.variables:
            path = f"ContextVar({variable.name!r})"
            into.enter(path, into.add_value(path, functools.partial(variable_content, variable)))


def _item(container: Any, key: Any) -> Any:
    """An entry of a container; `ABSENT` where there is none."""
    try:
        return container[key]
    except (KeyError, IndexError):
        return ABSENT
