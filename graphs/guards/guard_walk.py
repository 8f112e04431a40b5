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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from graphs.errors import Refusal
from graphs.guards.container_guards import MappingGuard, NamesGuard, SequenceGuard
from graphs.guards.guard import Guard
from graphs.guards.namespace_guards import guard_environment, guard_module, guard_namespaces
from graphs.guards.object_guards import guard_object, guard_weakly_held, memory_of, version_of
from graphs.guards.portrait import portrait
from graphs.guards.python_guards import About, Guards, Look
from graphs.guards.traversal import LEAVES, Scope, Traversal
from graphs.guards.value_guards import CellGuard, ValueGuard
from graphs.objects.c_objects import variable_content
from graphs.objects.cells import ABSENT, CellView, Difference, reference_to
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
    beside: Guards | None = None,
) -> Guards:
    """The guards of a recording.

    Args:
        reads: what the observed run asked for.
        roots: where values can hang, with the names to call them by.
        advanced: numbers that the recording advances itself.
        links: links to the tensors that the recording reads in place.
        uploaded: host tensors that it holds copies of, whose versions tell of writes.
        asked: tensors of which the step asked where they lie.
        placed, opaques, beside: see `GuardWalk`.
    """
    keys, at, named = [(counter.container, counter.key) for counter in advanced], frozenset(placed), list(roots)
    walk = GuardWalk(reads, named, keys, at, opaques, beside if beside is not None and beside.leaves_out_of(at) else None)
    if not walk.fits:
        walk = GuardWalk(reads, named, keys, at, opaques)
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
        beside: guards of another recording that answer for what they are about; see `Guards.serving`.

    Attributes:
        complete: False when more hangs on the step than is worth comparing.
        fits: False where those ``beside`` would have been others for this run: a look without them is needed.
    """

    def __init__(
        self,
        reads: CodeReads,
        roots: Iterable[tuple[str, Any]],
        advanced: Iterable[tuple[Any, Any]] = (),
        placed: Iterable[int] = (),
        opaques: Sequence[tuple[str, Any]] = (),
        beside: Guards | None = None,
    ) -> None:
        self._last = list(opaques)
        self._beside = beside
        last = {id(value) for _, value in opaques}
        self._roots = [root for root in roots if id(root[1]) not in last]
        keys: dict[int, set[Any]] = {}
        for container, key in advanced:
            keys.setdefault(id(container), set()).add(key)
        known = beside.about if beside is not None else None
        scope = Scope(reads, keys, frozenset(placed), *known.scope.found() if known is not None else ())
        self.complete = True
        while True:  # functions that were found and did not run in the observed run may run in others
            size = scope.size
            self._traversal = Traversal(scope)
            self._look(known.look if known is not None else None)
            self.fits = known is None or scope.size == size
            if scope.size == size or not self.complete or not self.fits:
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
        known = self._beside.about if self._beside is not None else None
        reached = self._reached | (known.reached if known is not None else frozenset())
        view = portrait(self._last, into.scope, reached=reached) if self._last and not behind else None
        own = frozenset(self._own & view.visited) if view is not None else frozenset[int]()
        about = About(into.subjects, into.scope.kept(), view, own, reached)
        if self._beside is not None:
            return Guards(into.watched, [*into.polled, *more, *behind], about, self._beside)
        (watched, others), (polled, rest) = self._parted(into.watched, self._found[0]), self._parted(into.polled, self._found[1])
        subjects = {id(guard): into.subjects[id(guard)] for guard in (*others, *rest) if id(guard) in into.subjects}
        shared = Guards(others, rest, About(subjects, about.scope, reached=reached, look=self._as_look(subjects)))
        return Guards(watched, [*polled, *more, *behind], about, shared)

    def _parted(self, guards: Sequence[Guard], found: int) -> tuple[list[Guard], list[Guard]]:
        """Guards of what opaque arguments alone lead to, with those behind the first ``found``, of links; and all others."""
        subjects = self._traversal.subjects
        own = [guard for guard in guards[:found] if subjects.get(id(guard), (0, ""))[0] in self._own]
        others = [guard for guard in guards[:found] if subjects.get(id(guard), (0, ""))[0] not in self._own]
        return [*own, *guards[found:]], others

    def _as_look(self, subjects: Mapping[int, tuple[int, str]]) -> Look | None:
        """What looks at other calls may rely on; None where what opaque arguments alone lead to cannot be told apart."""
        into = self._traversal
        if not self.complete or self._weak or into.scope.advanced:
            return None
        about = {identity for identity, _ in subjects.values()}
        objects = {id(v): v for _, v in self._roots} | {id(value): value for value in into.keep}
        asked = {identity: _asked(value) for identity, value in objects.items() if identity in about}
        return Look(into.scope.reads.kept(), asked, frozenset(into.scope.placed & into.seen - self._own))

    def changed(self) -> Difference | None:
        """The first value that is not what it was when the walk saw it."""
        return next((found for guard in self._all() if (found := guard.difference()) is not None), None)

    def of_links(self, links: Sequence[Link]) -> list[Guard]:
        """Guards for links to tensors that the walk did not find: behind objects that no observed function names."""
        guards = [*self._all(), *(self._beside.all() if self._beside is not None else ())]
        guarded = {id(guard.mapping) for guard in guards if isinstance(guard, (MappingGuard, NamesGuard))}
        guarded |= {id(guard.sequence) for guard in guards if isinstance(guard, SequenceGuard)}
        guarded |= {id(guard.cell) for guard in guards if isinstance(guard, CellGuard)}
        left = [link for link in links if _of_link(link) not in guarded and not isinstance(link.container, tuple)]
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

    def _look(self, known: Look | None) -> None:
        """Look at everything once, with what is in scope by now, but for what is ``known``."""
        into = self._traversal
        into.pending += self._roots
        if known is None:
            into.enter("Tensor", Tensor)
            guard_namespaces(into)
            self._guard_observed()
        else:
            into.seen |= known.seen()
        self._follow()
        self._found = len(into.watched), len(into.polled)

    def _follow(self) -> None:
        """Look at what is pending and all that it leads to; then at opaque arguments; then at what is held weakly."""
        into, self._own, self._weak, self._reached = self._traversal, set[int](), False, frozenset[int]()
        self._look_on()
        before, weakly = set(into.seen), len(into.weakly)
        weak = {id(weakref.ref.__call__(reference)) for _, reference in into.weakly}
        for root in reversed(self._last):
            into.pending.append(root)
            self._look_on()
        if self.complete:
            self._own, self._weak = into.seen - before, len(into.weakly) > weakly
        while into.weakly and self.complete:
            into.subject = None
            guard_weakly_held(into, *into.weakly.pop())
            self._look_on()
        into.subject = None
        if self.complete:
            self._reached = frozenset((into.seen - self._own) | weak)

    def _look_on(self) -> None:
        """Look at what is pending and all that it leads to, as long as that is not too much."""
        into, roots = self._traversal, {id(root) for _, root in [*self._roots, *self._last]}
        while into.pending and self.complete:
            into.subject = None
            path, value = into.pending.pop()
            if type(value) is types.ModuleType:  # that an object holds, or an argument is
                guard_module(into, path, value, into.names, id(value))
            if type(value) in LEAVES or of_type(value, NOT_ENTERED) or id(value) in into.seen:
                continue
            if len(into.seen) > _LIMIT:
                self.complete = False
                return
            into.seen.add(id(value))
            if id(value) not in roots:
                into.keep.append(value)
            into.subject = id(value), path
            guard_object(into, path, value)

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


def _asked(value: Any) -> Callable[[], Any]:
    """An object, to be asked for. A tensor is held, by what compares it too: torch swaps none that something refers to weakly."""
    return (lambda: value) if of_type(value, Tensor) else reference_to(value)


def _item(container: Any, key: Any) -> Any:
    """An entry of a container; `ABSENT` where there is none."""
    try:
        return container[key]
    except (KeyError, IndexError):
        return ABSENT


def _of_link(link: Link) -> int:
    """The identity of what holds the tensor of a link: of a closure's cell, not of the view of it that is made for each look."""
    return id(link.container.cell if isinstance(link.container, CellView) else link.container)
