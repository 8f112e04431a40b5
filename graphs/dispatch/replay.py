"""One replay: whether a recording may serve a call, and the output that it gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from graphs.contract.arguments import Call
from graphs.errors import ChangingValue, ManyWays, MovedStaticTensor, NestedCapture, Refusal, Site
from graphs.first_call.recorded_step import RecordedStep, Variants
from graphs.objects.cells import Difference
from graphs.objects.torch_fast_paths import increment_version, is_capturing
from graphs.recording.failures import StepRaised
from graphs.recording.recorder import CannotPoint, ReplayRaised
from graphs.state.tensor_state import RandomState, TensorState

UNDONE = object()
"""What `replayed` gives where an assumption of the recording does not hold for the call: all of the replay was undone."""


MAX_VARIANTS = 16
"""Recordings of one key."""
_PATIENCE = 4 * MAX_VARIANTS  # calls that none of them could serve, before a step that mostly goes other ways is given up
_SHOWN = 4  # lines that a refusal for too many variants names


class Outdated(NamedTuple):
    """A recording that froze what is not so any more.

    Attributes:
        change: the Python value that differs.
        moved: the tensor that is elsewhere.
        Neither is given where the object it was recorded for is gone and another took its identity.
    """

    change: Difference | None = None
    moved: Refusal | None = None

    @property
    def refusal(self) -> Refusal | None:
        """What has changed, as a reason not to record again."""
        if self.change is None:
            return self.moved
        path, before, after = self.change.path, self.change.before, self.change.after
        kind = MovedStaticTensor if after.startswith("tensor(") else ChangingValue
        return kind(f"{path} was {before} when recorded and is {after} now", operator=path)


def stale(entry: RecordedStep, call: Call) -> Refusal | Outdated | None:
    """Why ``entry`` cannot serve this call after all, or None. Runs at every call."""
    tensors = call.tensors
    for position, opaque in enumerate(call.opaques):
        if entry.opaques[position]() is not opaque:
            return Outdated()
    changed = entry.guards.changed()
    if changed is not None:
        return Outdated(changed)
    if not entry.statics.unchanged(tensors):
        moved = entry.statics.moved(tensors)
        return Outdated(moved=moved) if entry.statics.arguments_fit(tensors) else moved
    if entry.on_device and is_capturing():
        return NestedCapture("the current stream is being recorded by somebody else", operator="replay")
    return None


def unpointed(entry: RecordedStep) -> Outdated | None:
    """Have the recording, which others may share, use the tensors of ``entry``; why not, where it does not let itself be."""
    try:
        entry.point()
    except CannotPoint as why:
        entry.blueprint.usable = False
        return Outdated(moved=MovedStaticTensor(str(why), operator="recording"))
    return None


def replayed(entry: RecordedStep, rows: int, call: Call) -> Any:
    """The output of one replay; `UNDONE` where it met what the recording does not hold for, and was taken back.

    Raises:
        ReplayRaised: an operator refused its data, and nothing is left of the replay: the model is to be run.
        StepRaised: an operator refused its data, which the step does not catch, and others had written.
    """
    undone = not entry.on_device and (entry.catches or entry.checked is not None)
    journal = TensorState() if undone else None
    draws = entry.generators is not None and not entry.on_device and (undone or not entry.written.tensors)
    random = RandomState(torch.device("cpu"), {g: g.get_state() for g in entry.generators or ()}) if draws else None
    try:
        produced = entry.recording.replay(call.tensors, rows, journal)
    except ReplayRaised as raised:
        if random is not None:
            random.restore()
        if journal is not None:
            journal.restore()
            if entry.checked is not None:
                entry.checked.abandoned()
        elif entry.written.tensors:
            raise StepRaised(raised.error) from None
        raise
    if entry.bumped or entry.bumped_arguments:
        increment_version([*entry.bumped, *map(call.tensors.__getitem__, entry.bumped_arguments)])
    if entry.checked is not None and not entry.checked.commit_or_rollback():
        return UNDONE
    entry.replays += 1
    entry.real_rows += rows
    try:
        return entry.template.fill(produced, call.tensors, call.opaques)
    except Exception as error:  # it was put together once at capture: a class of the user's now raises
        if entry.written.tensors:  # the step has taken place: the model must not run as well
            raise StepRaised(error) from None
        raise


def many_variants(variants: list[RecordedStep]) -> ManyWays:
    """The refusal for a call that takes none of the recorded variants; it names the lines that decide."""
    lines = list(dict.fromkeys(line for variant in variants for line in getattr(variant.candidate, "decided_at", ())))
    also = ", ".join(f"{file.rpartition('/')[2]}:{line}" for file, line in lines[1:_SHOWN])
    detail = f"{len(variants)} ways through the step are recorded, and this call takes another"
    detail += f"; {also} and others decide too" if len(lines) > _SHOWN else f"; {also} decides too" if also else ""
    return ManyWays(detail, operator="branch", site=Site.at(lines[0]) if lines else None)


def is_hopeless(group: Variants) -> bool:
    """Whether most calls of a key are served by none of its variants."""
    return group.broken > _PATIENCE and 2 * group.broken > sum(variant.replays for variant in group.variants)
