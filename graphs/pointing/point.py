"""A recording pointed at the static tensors of a call: when that may be done, and what is compared before it is relied on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphs.contract.arguments import Call
from graphs.contract.static_tensors import StaticTensors
from graphs.errors import Refusal
from graphs.first_call.recorded_step import RecordedStep, reference_to
from graphs.guards.identity import numbers_of
from graphs.guards.portrait import Portrait, alike, guards_of_tensor, portrait
from graphs.guards.python_guards import Guards
from graphs.objects.keys import NOT_CONSTANT, nested_key
from graphs.objects.raw_access import of_type
from graphs.pointing.blueprint import Blueprint, Located, is_known_by_number
from graphs.recording.recorder import CannotPoint
from graphs.state.inventory import Link
from graphs.state.tensor_form import form_of

Tensor = torch.Tensor
Compare = Callable[[RecordedStep], Refusal | None]


@dataclasses.dataclass(frozen=True)
class Pointed:
    """What came of pointing a recording at the tensors of a call.

    Attributes:
        step: the recorded step of these tensors.
        compared: whether tensors of the model's had to be compared with eager.
        exchanged: whether some of these are other tensors than before, so that other steps of the recording are out of date.
    """

    step: RecordedStep
    compared: bool
    exchanged: bool


def point_anew(
    blueprint: Blueprint, call: Call, opaque_names: Sequence[str], compare: Compare, *, weights: bool = True
) -> Pointed | None:
    """Point a recording at the static tensors of a call; None where something else than their addresses changed.

    A replay is compared with an eager run, both undone, the first time a place behind an argument moves: from then on it is
    known that its address stands in the words that were found. Tensors of the model's are compared at each new address: what a
    step keeps that was computed from a weight does not show in addresses.

    Args:
        compare: runs a step eagerly and as a replay, and tells how they differ.
        weights: whether tensors of the model's may be where no replay has been compared yet.

    Raises `CannotPoint` where the recording is not usable any more.
    """
    exchanged = _exchanged(blueprint)
    seen = _seen(blueprint, call, opaque_names)
    if exchanged is None or (seen is None and blueprint.pattern is not None):
        return None
    located = blueprint.locate(call, seen, exchanged)
    if located is None:
        return None
    step = _step(blueprint, call, located, seen)
    if step is None:
        return None
    of_model = blueprint.of_model
    addresses = tuple(located.storages[place].data_ptr() for place in sorted(of_model))
    unknown = bool(located.moved & of_model) and addresses not in blueprint.settled
    if unknown and not weights:
        return None
    step.point()
    if unknown or not located.moved <= blueprint.proven | of_model:
        _prove(blueprint, step, compare)
        blueprint.proven |= located.moved - of_model
        blueprint.settle(addresses)
    if exchanged:
        blueprint.shared = blueprint.shared.adopted(exchanged, guards_of_tensor)
        blueprint.adopt(exchanged)
        step = dataclasses.replace(step, guards=_guards(blueprint, step.statics, seen))
    blueprint.last = located.of_model
    return Pointed(step, unknown, bool(exchanged))


def _seen(blueprint: Blueprint, call: Call, opaque_names: Sequence[str]) -> Portrait | None:
    """The opaque arguments of a call; None where there are none, or where they are not like those that were recorded."""
    about = blueprint.shared.about
    if blueprint.pattern is None or about is None:
        return None
    seen = portrait(list(zip(opaque_names, call.opaques, strict=True)), about.scope, blueprint.names, about.reached)
    if seen is None or not alike(seen.pattern, blueprint.pattern) or is_known_by_number(seen, blueprint.numbers):
        return None
    return seen


def _exchanged(blueprint: Blueprint) -> dict[int, Tensor] | None:
    """Tensors of the model's that stand in the place of others, by the identity of those; None where more than that changed.

    More changed where the step could see which tensor it is: the old one stands elsewhere still, or the new one did before.
    """
    if blueprint.shared.changed() is None:
        return {}
    pairs = blueprint.shared.exchanged()
    handed_out = {id(tensor) for tensor in blueprint.skeleton.template.tensors_of_step}
    if pairs is None or not all(_is_like(old, new) and id(old) not in handed_out for old, new in pairs):
        return None
    exchanged = {id(old): new for old, new in pairs}
    consistent = all(exchanged[id(old)] is new for old, new in pairs)
    if not consistent or len({id(new) for new in exchanged.values()}) != len(exchanged):
        return None
    gone = Counter(id(old) for old, _ in pairs)
    about = blueprint.shared.about
    known = about is None or any(id(new) in about.reached for new in exchanged.values())
    if known or blueprint.shared.times(gone) != gone:
        return None
    numbers = numbers_of(tensor for pair in pairs for tensor in pair)
    return exchanged if numbers.isdisjoint(blueprint.numbers) else None


def _is_like(old: Any, new: Any) -> bool:
    """Whether one tensor may stand in the place of another."""
    if not (of_type(old, Tensor) and of_type(new, Tensor)) or (form := form_of(old)) is None:
        return False
    attributes = nested_key(old.__dict__), nested_key(new.__dict__)
    if form != form_of(new) or NOT_CONSTANT in attributes or attributes[0] != attributes[1]:
        return False
    return not old.is_leaf or (old.grad is None and new.grad is None)


def _step(blueprint: Blueprint, call: Call, located: Located, seen: Portrait | None) -> RecordedStep | None:
    """The recorded step of the tensors of a call; None where an argument is a tensor of the step's own."""
    contract, written, of_model = blueprint.skeleton.contract, blueprint.written_at(located), located.of_model
    externals = [located.tensor(piece) for piece in blueprint.external]
    behind = {id(tensor) for _, tensor in seen.tensors} if seen is not None else set[int]()
    movable = [of_model.storages[piece.spot.place] is None for piece in blueprint.external]
    statics = StaticTensors(
        [(a.position, a.path, call.tensors[a.position]) for a in blueprint.anchors if a.position is not None],
        [tensor for tensor, may_move in zip(externals, movable, strict=True) if may_move],
        written.tensors,
        [Link(path, None, None, located.tensors[a], None) for path, a in blueprint.hanging if of_model.tensors[a] is None],
        contract.longest,
        contract.written,
        [index for index, _ in contract.same],
        call.tensors,
        own=blueprint.others | behind,
        beside=of_model.statics,
    )
    statics.links.clear()
    if statics.own_arguments:
        return None
    return dataclasses.replace(
        blueprint.skeleton,
        statics=statics,
        opaques=[reference_to(opaque) for opaque in call.opaques],
        externals=externals,
        written=written,
        guards=_guards(blueprint, statics, seen),
        bumped=[located.tensor(piece) for piece in blueprint.bumped],
        storages=located.storages,
        blueprint=blueprint,
        replays=0,
        real_rows=0,
    )


def _guards(blueprint: Blueprint, statics: StaticTensors, seen: Portrait | None) -> Guards:
    if seen is None:
        return blueprint.shared
    return Guards(seen.watched, seen.with_layouts(statics.placed), beside=blueprint.shared)


def _prove(blueprint: Blueprint, step: RecordedStep, compare: Compare) -> None:
    """Compare a replay with eager.

    Raises:
        CannotPoint: they differ.
    """
    mismatch = compare(step)
    if mismatch is not None:
        blueprint.usable = False
        raise CannotPoint(f"{mismatch.detail} once it is pointed at the tensors of this call ({mismatch.operator})")
