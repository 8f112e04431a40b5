"""Python state that a step can read or change: found by walking, compared, restored.

The walk starts at the model, its opaque arguments and, for functions, their closures, defaults and the globals they
name. It enters containers, objects and the user's own classes and functions; of libraries it enters objects but not
classes or functions, and what C objects hold without attributes is read by kind (`object_cells`). Looking runs no code of the
user's (`raw_access`).
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from graphs.objects.cells import Difference, cell_differences, changed_entries, is_untouched
from graphs.objects.kinds import ATOMS
from graphs.objects.raw_access import bases_of, module_name, of_type, per_class
from graphs.python_reads.named_state import SKIPPED, Ran
from graphs.state.c_state import pickled
from graphs.state.inventory import Found, Inventory, Link
from graphs.state.object_cells import names_of, visit

__all__ = ["Link", "PythonState"]

_OF_THREADS = frozenset(("threading", "_thread", "queue", "_queue", "asyncio", "_asyncio", "concurrent", "multiprocessing"))
_WALK_LIMIT = 500_000


class PythonState:
    """A snapshot of everything mutable that is reachable from named roots.

    Args:
        roots: objects, with the names to call them by.
        known: a snapshot of which nothing is taken again.
        generators: whether to include Python's and NumPy's own random generators.
        tensors: whether to include what tensors are besides their values: which memory they lie in, and how.

    Attributes:
        cells: what is compared and put back.
        owners: links to tensors.
        generators: generators of random numbers of torch's that hang on the roots; their states are the caller's to keep.
        ran: functions whose names were taken in.
        complete: False when the walk gave up at half a million objects.
    """

    def __init__(
        self,
        roots: Iterable[tuple[str, Any]],
        known: PythonState | None = None,
        *,
        generators: bool = True,
        tensors: bool = True,
    ) -> None:
        named = list(roots)
        seen: set[int] = known._inventory.seen if known is not None else set()
        inventory = Inventory((id(root) for _, root in named), seen, tensors=tensors)
        self._inventory: Inventory = inventory
        self.cells, self._forms = inventory.cells, inventory.forms
        self.owners, self.generators = inventory.owners, inventory.generators
        self.ran: list[Ran] = []
        self.complete = True
        if generators:
            self._random_modules()
        self._walk([(path, root, None) for path, root in named])

    def take(self, ran: Ran) -> None:
        """Take in what a function names as well; to be called before it runs for the first time."""
        self.ran.append(ran)
        with _disable_current_modes():  # what is looked at here is not done by the step
            self._walk(list(names_of(self._inventory, ran)))

    def enter(self, roots: Iterable[tuple[str, Any]]) -> None:
        """Take in what hangs on further roots; to be called before anything of it can change."""
        found: list[Found] = [(path, root, None) for path, root in roots]
        if found:
            with _disable_current_modes():
                self._walk(found)

    @property
    def classes(self) -> Iterable[type[Any]]:
        """The classes of the objects that were found."""
        return self._inventory.classes.values()

    def _walk(self, pending: list[Found]) -> None:
        into = self._inventory
        while pending:
            path, value, link = pending.pop()
            if type(value) is torch.Generator and not into.is_root(value):
                self.generators.append(value)
            if type(value) in ATOMS or of_type(value, SKIPPED) or id(value) in into.seen or _is_of_threads(type(value)):
                continue
            if len(into.seen) >= _WALK_LIMIT:
                self.complete = False
                break
            into.mark_seen(value)
            pending.extend(visit(into, path, value, link))

    def _random_modules(self) -> None:
        self._inventory.add(pickled("random.random()", random.getstate, random.setstate, random.random))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            rng = numpy.random
            self._inventory.add(pickled("numpy.random", rng.get_state, rng.set_state, rng.random_sample))

    def differences(self) -> list[Difference]:
        """What changed since the snapshot."""
        found = [difference for cell in self.cells if not is_untouched(cell) for difference in cell_differences(cell)]
        return [*found, *(difference for form in self._forms for difference in form.differences())]

    def shifted(self) -> Callable[[], list[Difference]]:
        """Draw once from each generator of Python's and NumPy's; returns what tells, after a run, which of them the run set.

        A run that sets one to the same state whenever it is called does not show otherwise. What it left alone is put back.
        """
        drawing = [cell for cell in self.cells if cell.draw is not None]
        for cell in drawing:  # one generator may hang in two cells
            cell.draw()  # type: ignore[misc]
        states = [cell.read() for cell in drawing]

        def set_by_the_run() -> list[Difference]:
            changed = [cell for cell, state in zip(drawing, states, strict=True) if cell.read() != state]
            for cell in drawing:
                cell.write(cell.content)
            return [Difference(c.form.removesuffix("{}"), "as the calls before left it", "set by the step") for c in changed]

        return set_by_the_run

    def changed_entries(self) -> Iterator[tuple[str, Any, Any, Any, Any]]:
        """Path, container, key, value before and value now of all that changed; no container where there is no mapping."""
        for cell in self.cells:
            if isinstance(cell.content, (dict, list)):
                for key, before, after in changed_entries(cell):
                    yield cell.form.format(key), cell.container, key, before, after
            elif cell_differences(cell):
                yield cell.form, None, None, None, None
        yield from ((change.path, None, None, None, None) for form in self._forms for change in form.differences())

    def restore(self) -> None:
        """Put back what the snapshot saw."""
        for cell in self.cells:
            if not is_untouched(cell) and cell_differences(cell):
                cell.write(cell.content)
        for form in self._forms:
            form.restore()

    def holds(self, value: Any) -> bool:
        """Whether an object hangs on one of the roots, or is one."""
        return id(value) in self._inventory.seen


@per_class
def _is_of_threads(kind: type[Any]) -> bool:
    """Whether other threads may be waiting for an object of this class: nothing of it may be put back."""
    bases = bases_of(kind)
    return threading.local not in bases and any(module_name(base).partition(".")[0] in _OF_THREADS for base in bases)
