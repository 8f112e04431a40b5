"""A recording described without the tensors that it uses in place, so that it can be pointed at others.

The blueprint outlives a cache whose recording it describes and holds nothing of it. Memory that the recording uses in place has
a number, its place; whatever leads to it (a tensor of the model, one behind an opaque argument, a static argument) is an anchor.
A place may be elsewhere if all its anchors say so, and if everything else about them is as it was recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from graphs.contract.arguments import Call
from graphs.contract.outputs.template import OutputTemplate
from graphs.contract.places import Places, Spot, Storage, lie_apart
from graphs.contract.static_tensors import StaticTensors
from graphs.first_call.recorded_step import RecordedStep
from graphs.guards.identity import numbers_of, numbers_of_identity
from graphs.guards.portrait import Portrait
from graphs.guards.python_guards import Guards
from graphs.rewriting.rewritten_step import RewrittenStep
from graphs.state.inventory import Link
from graphs.state.storage import has_storage
from graphs.state.tensor_form import form_of
from graphs.state.tensor_state import TensorState

Tensor = torch.Tensor
_SETTLED = 64  # addresses of the model's tensors that are remembered as compared


class Anchor(NamedTuple):
    """A tensor by which the step finds a place.

    Attributes:
        form: what has to be as it was; see `form_of`.
        path: to call it by.
        own: a tensor of the model's; else ``number`` tells which tensor of the portrait, or ``position`` which argument it is.
    """

    place: int
    form: Any
    path: str
    own: Callable[[], Tensor | None] | None = None
    number: int | None = None
    position: int | None = None


class Piece(NamedTuple):
    """A tensor of the recording's: the tensor of an anchor, or a spot of a place."""

    anchor: int | None
    spot: Spot


@dataclass
class OfModel:
    """The places that nothing but tensors of the model's leads to, as they are now.

    Attributes:
        tensors: by anchor; None for the anchors of other places.
        storages: by place, likewise.
        statics: the check that they stay there.
    """

    tensors: list[Tensor | None]
    storages: list[Storage | None]
    statics: StaticTensors


@dataclass
class Located:
    """Where the places are for one call.

    Attributes:
        storages: by place.
        tensors: by anchor.
        moved: numbers of the places that are not where they were recorded.
        of_model: those among them that are the model's.
    """

    storages: list[Storage]
    tensors: list[Tensor]
    moved: set[int]
    of_model: OfModel

    def tensor(self, piece: Piece) -> Tensor:
        """The tensor that is now what a piece describes."""
        return self.tensors[piece.anchor] if piece.anchor is not None else piece.spot.on(self.storages[piece.spot.place])


@dataclass(eq=False)
class Blueprint:
    """A recording without the tensors it was made with.

    Attributes:
        skeleton: the recorded step without them.
        recorded: address and bytes of each place.
        fixed: places without an anchor, which cannot move; their storages are held.
        pattern: what opaque arguments have to look like; None where there are none.
        names: what the functions of the step look up, as the portrait needs it.
        shared: the guards of what does not hang on opaque arguments alone.
        external, written, bumped: what the step has of each; see `RecordedStep`.
        hanging: path and anchor of the tensors that are looked at at every call.
        others: identities of the model's own tensors.
        numbers: whole numbers that the step keeps, by which it may know objects.
        proven: places that were once moved and the replay then compared with eager.
        settled: addresses of the model's own places that a replay was compared at.
        usable: False once the recording has refused to be pointed.
        last: the model's places when they were looked at last.
    """

    skeleton: RecordedStep
    recorded: list[tuple[int, int]]
    anchors: list[Anchor]
    fixed: dict[int, Storage]
    pattern: tuple[Any, ...] | None
    names: frozenset[str]
    external: list[Piece]
    written: list[Piece]
    bumped: list[Piece]
    hanging: list[tuple[str, int]]
    others: frozenset[int]
    numbers: frozenset[int]
    shared: Guards
    proven: set[int] = field(default_factory=set)
    settled: set[tuple[int, ...]] = field(default_factory=set)
    usable: bool = True
    last: OfModel | None = None

    def locate(self, call: Call, seen: Portrait | None, exchanged: Mapping[int, Tensor]) -> Located | None:
        """Where the places are for a call; None where something about them is not as it was recorded.

        Args:
            seen: the opaque arguments of the call.
            exchanged: tensors of the model's that stand in the place of others, by the identity of those.
        """
        of_model = self.last
        if of_model is None or exchanged or not of_model.statics.in_place():
            of_model = self._locate_model(exchanged)
        if of_model is None:
            return None
        tensors, storages = list(of_model.tensors), list(of_model.storages)
        for index, anchor in enumerate(self.anchors):
            if tensors[index] is None:
                tensors[index] = self._tensor(anchor, call, seen, exchanged)
                if not _stands(anchor, tensors[index], storages):
                    return None
        found = [storage for storage in storages if storage is not None]
        if len(found) < len(storages) or not lie_apart(found):
            return None
        moved = {number for number, storage in enumerate(found) if storage.data_ptr() != self.recorded[number][0]}
        return Located(found, [tensor for tensor in tensors if tensor is not None], moved, of_model)

    def _locate_model(self, exchanged: Mapping[int, Tensor]) -> OfModel | None:
        """Where the places of the model's are, with everything about its tensors compared."""
        others = {anchor.place for anchor in self.anchors if anchor.own is None}
        tensors: list[Tensor | None] = [None] * len(self.anchors)
        storages: list[Storage | None] = [self.fixed.get(place) for place in range(len(self.recorded))]
        for index, anchor in enumerate(self.anchors):
            if anchor.place not in others:
                tensors[index] = _own(anchor, exchanged)
                if not _stands(anchor, tensors[index], storages):
                    return None
        hanging = [(path, tensors[anchor]) for path, anchor in self.hanging]
        links = [Link(path, None, None, tensor, None) for path, tensor in hanging if tensor is not None]
        statics = StaticTensors(
            [], [self._made(p, tensors, storages) for p in self.external if p.spot.place not in others], [], links
        )
        statics.links.clear()
        return OfModel(tensors, storages, statics)

    @staticmethod
    def _made(piece: Piece, tensors: Sequence[Tensor | None], storages: Sequence[Storage | None]) -> Tensor:
        found = tensors[piece.anchor] if piece.anchor is not None else None
        storage = storages[piece.spot.place]
        assert storage is not None
        return piece.spot.on(storage) if found is None else found

    def _tensor(self, anchor: Anchor, call: Call, seen: Portrait | None, exchanged: Mapping[int, Tensor]) -> Tensor | None:
        if anchor.position is not None:
            return call.tensors[anchor.position]
        if anchor.number is not None:
            return seen.tensors[anchor.number][1] if seen is not None else None
        return _own(anchor, exchanged)

    @property
    def of_model(self) -> set[int]:
        """The places that a tensor of the model's leads to."""
        return {anchor.place for anchor in self.anchors if anchor.own is not None}

    def settle(self, addresses: tuple[int, ...]) -> None:
        """Remember that a replay was compared with the model's places at these addresses."""
        if len(self.settled) >= _SETTLED:
            self.settled.clear()
        self.settled.add(addresses)

    def adopt(self, exchanged: Mapping[int, Tensor]) -> None:
        """Take tensors of the model's for those whose place they took."""
        for index, anchor in enumerate(self.anchors):
            own = anchor.own() if anchor.own is not None else None
            if own is not None and id(own) in exchanged:
                self.anchors[index] = anchor._replace(own=_holding(exchanged[id(own)]))
        gone = {identity for identity in exchanged if identity in self.others}
        self.others = (self.others - gone) | {id(exchanged[identity]) for identity in gone}

    def leave(self, step: RecordedStep) -> None:
        """Hold nothing of a step that is given up, but how many calls it served."""
        self.skeleton.replays += step.replays
        self.skeleton.real_rows += step.real_rows
        recording = step.recording
        if recording.at is step.storages:
            recording.let_go(self.recorded)

    def written_at(self, located: Located) -> TensorState:
        """The tensors that the step writes."""
        return TensorState.of(located.tensor(piece) for piece in self.written)


def _holding(tensor: Tensor) -> Callable[[], Tensor]:
    """A tensor of the model's, to be asked for. It is held: torch swaps no tensor that something refers to weakly."""
    return lambda: tensor


def _own(anchor: Anchor, exchanged: Mapping[int, Tensor]) -> Tensor | None:
    own = anchor.own() if anchor.own is not None else None
    return exchanged.get(id(own), own) if own is not None else None


def _stands(anchor: Anchor, tensor: Tensor | None, storages: list[Storage | None]) -> bool:
    """Whether a tensor may be that of an anchor; notes the storage of its place, on which all anchors of it have to agree."""
    if tensor is None or form_of(tensor) != anchor.form:
        return False
    storage, known = tensor.untyped_storage(), storages[anchor.place]
    storages[anchor.place] = storage
    return known is None or known._cdata == storage._cdata


def blueprint_of(entry: RecordedStep, call: Call, opaque_names: Sequence[str]) -> Blueprint | None:
    """The blueprint of a recording that was just made; None for one that is never pointed elsewhere.

    That is one whose undo log or counters belong to its tensors, and one that uses memory to which, as far as is known, nothing
    leads, though it may belong to an opaque argument.
    """
    about = entry.guards.about
    if about is None or not _is_movable(entry):
        return None
    view = about.view
    used = [*entry.externals, *(call.tensors[index] for index, _ in entry.statics.named)]
    if not all(map(has_storage, used)) or (call.opaques and view is None):
        return None
    places = Places(used)
    anchors = _anchors(entry, call, view, places)
    anchored = {anchor.place for anchor in anchors}
    fixed = {n: storage for n, storage in enumerate(places.storages) if n not in anchored}
    numbers = {id(tensor) for _, tensor in view.tensors} if view is not None else set[int]()
    if view is not None and (fixed or _behind(entry, opaque_names, numbers) or _handed_out(entry.template, view)):
        return None
    kept = entry.guards.numbers()
    led_by = _tensors(anchors, call, view)
    known = not kept.isdisjoint(numbers_of(tensor for tensor in led_by if tensor is not None))
    if known or (view is not None and is_known_by_number(view, kept)):
        return None
    pieces = _Pieces(places, {id(tensor): number for number, tensor in enumerate(led_by)})
    found = [pieces.of(part) for part in (entry.externals, entry.written.tensors, entry.bumped)]
    if any(part is None for part in found) or any(piece.anchor is None for piece in found[2] or ()):
        return None
    external, written, bumped = (part or [] for part in found)
    _settle(entry, places.storages)
    return Blueprint(
        skeleton=_skeleton(entry),
        recorded=list(entry.recorded),
        anchors=anchors,
        fixed=fixed,
        pattern=view.pattern if view is not None else None,
        names=about.scope.names(),
        external=external,
        written=written,
        bumped=bumped,
        hanging=[(path, pieces.anchors[id(tensor)]) for path, tensor in entry.statics.hanging],
        others=entry.statics.own - numbers,
        numbers=kept,
        shared=entry.guards.shared(),
    )


def is_known_by_number(view: Portrait, kept: frozenset[int]) -> bool:
    """Whether one of the numbers ``kept`` is made of an object of a portrait."""
    found = numbers_of(tensor for _, tensor in view.tensors).union(*map(numbers_of_identity, view.visited))
    return not kept.isdisjoint(found)


def _settle(entry: RecordedStep, storages: list[Storage]) -> None:
    """Note where the memory of a recording is, now that it was recorded there."""
    entry.storages, entry.recorded = storages, [(storage.data_ptr(), storage.nbytes()) for storage in storages]
    entry.recording.settle(storages)


def _is_movable(entry: RecordedStep) -> bool:
    """Whether nothing but addresses ties a recording to its tensors: a step may compare an argument with what is its own."""
    rewritten = entry.checked is not None or bool(entry.uploads)
    if isinstance(entry.candidate, RewrittenStep):
        rewritten = rewritten or entry.candidate.reads_host_values
    return not rewritten and not entry.asks_memory and not entry.statics.own_arguments


def _skeleton(entry: RecordedStep) -> RecordedStep:
    """A recorded step without the tensors that it was recorded with."""
    nothing = StaticTensors([], [], [], [])
    held = dataclasses.replace(entry, statics=nothing, opaques=[], externals=[], written=TensorState(), guards=Guards((), ()))
    return dataclasses.replace(held, bumped=[], storages=None)


def _anchors(entry: RecordedStep, call: Call, view: Portrait | None, places: Places) -> list[Anchor]:
    """What leads to the places."""
    found: list[Anchor] = []

    def add(path: str, tensor: Tensor, **source: Any) -> None:
        place = places.number(tensor) if has_storage(tensor) else None
        if place is not None:
            found.append(Anchor(place, form_of(tensor), path, **source))

    for index, name in entry.statics.named:
        add(name, call.tensors[index], position=index)
    behind = view.tensors if view is not None else []
    for number, (path, tensor) in enumerate(behind):
        add(path, tensor, number=number)
    known = {id(tensor) for _, tensor in behind}
    for path, tensor in {id(tensor): (path, tensor) for path, tensor in entry.statics.hanging}.values():
        if id(tensor) not in known:
            add(path, tensor, own=_holding(tensor))
    return found


def _tensors(anchors: Sequence[Anchor], call: Call, view: Portrait | None) -> list[Tensor | None]:
    """The tensors of anchors, at the call that they were found in."""
    tensors: list[Tensor | None] = []
    for anchor in anchors:
        if anchor.position is not None:
            tensors.append(call.tensors[anchor.position])
        elif anchor.number is not None and view is not None:
            tensors.append(view.tensors[anchor.number][1])
        else:
            tensors.append(anchor.own() if anchor.own is not None else None)
    return tensors


def _behind(entry: RecordedStep, opaque_names: Sequence[str], numbers: set[int]) -> bool:
    """Whether a tensor in use hangs on an opaque argument where the portrait did not see it."""
    return any(
        id(tensor) not in numbers and any(path.startswith(name) for name in opaque_names)
        for path, tensor in entry.statics.hanging
    )


def _handed_out(template: OutputTemplate, view: Portrait) -> bool:
    """Whether the output holds a part of an opaque argument, or a view of a tensor of the step's own."""
    return bool(template.tensors_of_step) or any(id(value) in view.visited for value in template.held)


class _Pieces:
    """Tensors of a recording as pieces.

    Args:
        anchors: numbers of the anchors, by the identity of their tensors.
    """

    def __init__(self, places: Places, anchors: dict[int, int]) -> None:
        self._places, self.anchors = places, anchors

    def of(self, tensors: Sequence[Tensor]) -> list[Piece] | None:
        """Each tensor as a piece; None where one lies at no place."""
        found = []
        for tensor in tensors:
            place = self._places.number(tensor)
            if place is None:
                return None
            found.append(Piece(self.anchors.get(id(tensor)), Spot.of(tensor, place)))
        return found


def anonymous(key: Any, call: Call) -> Any:
    """A key with opaque arguments by the order in which they are given, instead of by identity."""
    numbers = {id(opaque): number for number, opaque in reversed([*enumerate(call.opaques)])}

    def part(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(part, value))
        return ("opaque", numbers[value]) if type(value) is int and value in numbers else value

    return part(key) if call.opaques else key
