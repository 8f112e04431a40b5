"""What a walk over Python objects has found: cells of what can change, and links to tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from graphs.objects.cells import AttributesView, Cell, CellView, SpecialView, write_mapping
from graphs.objects.raw_access import items_of
from graphs.python_reads.named_state import NamesView
from graphs.state.tensor_form import TensorForm, has_form

Tensor = torch.Tensor
PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
View = AttributesView | SpecialView | CellView


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a path to an object: ``container[key] is value``, reached through ``parent``."""

    path: str
    container: Any
    key: Any
    value: Any
    parent: Link | None


Found = tuple[str, Any, Link | None]
"""Where an object was found: the path to call it by, the object, and the last link on the way there."""


class Inventory:
    """The cells of one snapshot, with all that was seen on the way to them.

    Args:
        roots: identities of the objects that the walk begins at, which are not held.
        seen: identities of objects that another snapshot answers for.
        tensors: whether to take in what tensors are besides their values.

    Attributes:
        cells: what can change, in the order in which it was found.
        forms: tensors whose memory and layout can change.
        owners: links to tensors.
        generators: generators of random numbers of torch's; their states are the caller's to keep.
        seen: identities of all objects that were found.
        classes: classes of objects with attributes among them, by identity.
        named: the cell for the names of a namespace or class, by the identity of that.
    """

    def __init__(self, roots: Iterable[int], seen: Iterable[int], *, tensors: bool) -> None:
        self._roots, self._tensors = set(roots), tensors
        self._keep: list[Any] = []  # so that no identity is reused while the snapshot lives
        self.cells: list[Cell] = []
        self.forms: list[TensorForm] = []
        self.owners: list[Link] = []
        self.generators: list[torch.Generator] = []
        self.seen: set[int] = set(seen)
        self.classes: dict[int, type[Any]] = {}
        self.named: dict[int, tuple[Cell, NamesView]] = {}

    def is_root(self, value: Any) -> bool:
        """Whether the walk began at an object."""
        return id(value) in self._roots

    def mark_seen(self, value: Any) -> None:
        """Note that an object was found. Roots are not held: a recording must not keep a caller's cache alive."""
        self.seen.add(id(value))
        if not self.is_root(value):
            self._keep.append(value)

    def keep(self, value: Any) -> None:
        """Hold an object that is found without being entered."""
        self._keep.append(value)

    def add(self, cell: Cell | None) -> None:
        """Take in a cell, if there is one."""
        if cell is not None:
            self.cells.append(cell)

    def add_mapping(self, form: str, mapping: dict[Any, Any]) -> None:
        """Take in a dictionary, with ``{}`` in the path of an entry for its key."""
        read = functools.partial(_copied, mapping)
        self.add(Cell(form, read(), read, functools.partial(write_mapping, mapping), container=mapping))

    def add_view(self, form: str, view: View) -> dict[str, Any]:
        """Take in what a view shows as a mapping; returns its content."""
        content = view.read()
        self.add(Cell(form, content, view.read, view.write))
        return content

    def entry(self, path: str, container: Any, key: Any, item: Any, parent: Link | None) -> Found:
        """An entry of a container, as something to look into; a tensor is noted with the link to it."""
        link = Link(path, container, key, item, parent)
        if type(item) in PLAIN_TENSORS and item.layout == torch.strided:
            self.owners.append(link)
            if self._tensors and has_form(item):
                self.forms.append(TensorForm(path, item))
        return path, item, link


def _copied(mapping: dict[Any, Any]) -> dict[Any, Any]:
    return dict(mapping) if type(mapping) is dict else dict(items_of(mapping))
