"""Proofs of removed host values: a step and its rewritten graph compared for outcomes that the present data does not show.

The step runs eagerly with one host read given another tensor to read (the other truth value, a length of none, one or all,
a number at the limit of a branch), and the graph runs with the same tensor at the same place, from the same state. Results and
everything written must agree; all of it is undone. An outcome that eager itself refuses, since other data do not go with it,
and one that the graph's own flag refuses, prove nothing: there the flag, or eager, decides when it occurs.
"""

from __future__ import annotations

import dis
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphs.contract.outputs.template import OutputTemplate
from graphs.errors import Site, VerifyMismatch
from graphs.numerics import tolerance
from graphs.observation.eager_trace import trace_again
from graphs.observation.host_reads import may_read
from graphs.observation.operations import EagerTrace
from graphs.recording.failures import is_interrupt
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.step import Step
from graphs.rewriting.forbidding import without_effects
from graphs.rewriting.rewritten_step import RewrittenStep
from passes import Forced, Forcing, OutOfRange, Place, inside, refuse_on_device, user_place, with_tensor
from passes.core.composites import DispatchMode, taken_apart
from passes.core.source_location import frames_of

Tensor = torch.Tensor
_MOST = 24
"""Outcomes of a graph that are forced, unless more values ask for one each."""
_PROVED, _ASSUMED, _REFUSED = "proved", "assumed", "refused"


@dataclass
class Proof:
    """What was compared, counted by kind: ``branch``, ``length`` and ``number``.

    Attributes:
        proved: forced outcomes in which step and graph agreed.
        unproved: tensors that host values are read from of which no outcome could be compared.
        capped: outcomes that were left out, since a value had too many.
        missing: branches whose other side was never compared, by where they begin.
    """

    proved: Counter[str] = field(default_factory=Counter)
    unproved: Counter[str] = field(default_factory=Counter)
    capped: int = 0
    missing: list[tuple[str, int, int]] = field(default_factory=list)

    def add(self, forcing: Forcing, found: dict[str, str]) -> None:
        """Count what became of the outcomes of one forcing."""
        self.capped += forcing.capped
        self.proved[forcing.kind] += sum(what == _PROVED for what in found.values())
        self.unproved[forcing.kind] += bool(found) and all(what == _REFUSED for what in found.values())
        seen = {branch for name in found if found[name] != _REFUSED for branch in forcing.branches.get(name, ())}
        tried = dict.fromkeys(branch for branches in forcing.branches.values() for branch in branches)
        self.missing += [branch for branch in tried if branch not in seen]


class _Override(DispatchMode):
    """Gives the reads of one tensor another one to read."""

    def __init__(self, forcing: Forcing, outcome: Callable[[Tensor], Tensor], most: int) -> None:
        super().__init__()
        self._left = most  # operators; a loop whose condition is forced would never end
        self._reads = {(read.operator, read.place, read.turn) for read in forcing.reads}
        self._unread = forcing.unread
        self._operators = set(forcing.positions)
        self._positions, self._outcome = forcing.positions, outcome
        self._turns: Counter[tuple[str, Place]] = Counter()
        self.met: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with inside(func, args):
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        whole = taken_apart(self, func, args, kwargs or {})
        if whole is not NotImplemented:
            return whole
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the step does not come to an end when this value is forced")
        name = str(func)
        if name in self._operators and may_read(func):
            place = user_place()
            key = (name, place, self._turns[name, place])
            self._turns[name, place] += 1
            self.met |= {key} & self._reads
            if key in self._reads or (name, place) in self._unread:
                args = with_tensor(args, self._positions[name], self._outcome)
        refuse_on_device(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    @property
    def done(self) -> bool:
        """Whether every read was met."""
        return self.met == self._reads


def prove(step: Step, rehearsal: Rehearsal, stand_ins: Sequence[Tensor], template: OutputTemplate) -> Proof:
    """Compare a rewritten step with the model for outcomes that are forced, each from the start of ``rehearsal``.

    Raises:
        VerifyMismatch: they differ; it names the line of the host read.
    """
    proof = Proof()
    model = step.model
    if not isinstance(model, RewrittenStep) or model.forced is None or model.counters is not None:
        return proof
    module, forcings = model.forced
    for forcing in _within(_MOST, forcings, proof):
        one = _Forced(step, rehearsal, stand_ins, template, module, forcing)
        proof.add(forcing, {name: one.compared(name) for name in forcing.outcomes})
    return proof


def _within(most: int, forcings: Sequence[Forcing], proof: Proof) -> list[Forcing]:
    """Forcings with no more than ``most`` outcomes: all that take a branch the other way, then one or two of each value."""
    left = most - sum(len(forcing.outcomes) for forcing in forcings if forcing.kind == "branch")
    others = [forcing for forcing in forcings if forcing.kind != "branch"]
    each = max(1, left // max(len(others), 1))
    for forcing in others:
        for name in [*forcing.outcomes][each:]:
            del forcing.outcomes[name]
            proof.capped += 1
    return list(forcings)


def unmerged(step: Step, proof: Proof) -> bool:
    """Have branches stay assumptions whose other side could not be compared; whether there are such that were merged."""
    new = [branch for branch in proof.missing if branch not in step.unmerged]
    step.unmerged.update(dict.fromkeys(new, "its other side could not be compared with the step's own run of it"))
    return bool(new)


def _raised_as_written(error: BaseException) -> bool:
    """Whether an exception was raised by a ``raise`` statement, not by a signal that came in between."""
    frame = frames_of(error)[-1]
    return frame.f_code.co_code[frame.f_lasti] == dis.opmap["RAISE_VARARGS"]


@dataclass(frozen=True)
class _Forced:
    """A step and its rewritten graph under outcomes of one host value."""

    step: Step
    rehearsal: Rehearsal
    stand_ins: Sequence[Tensor]
    template: OutputTemplate
    module: Any
    forcing: Forcing

    def compared(self, name: str) -> str:
        """What becomes of one outcome: both agree, the graph assumes that it does not occur, or eager refuses it."""
        trace = self.rehearsal.first
        override = _Override(self.forcing, self.forcing.outcomes[name], 20 * len(trace.operations) + 1000)
        try:
            expected, state, more = self.rehearsal.run(lambda: self._eager(override))
        except BaseException as error:  # the step refuses an outcome that other data do not go with: nothing to compare
            if is_interrupt(error) and not _raised_as_written(error):
                raise
            return _REFUSED
        try:
            return self.rehearsal.run(lambda: self._judged(name, override, expected, state, more))
        except OutOfRange:  # the step as well, had it asked; on a host it would have caught an exception
            return _REFUSED

    def _eager(self, override: _Override) -> tuple[list[Tensor], list[Tensor], EagerTrace]:
        """The outputs of the step under an override, what it wrote of what is known, and a trace of what else."""
        plain, trace = self.step.without_candidate(), self.rehearsal.first

        def forced() -> Any:
            with override:
                return without_effects(lambda: plain.run(self.stand_ins))

        output, more = trace_again(forced, list(self.stand_ins), trace)
        return [leaf.clone() for leaf in self.template.select(output)], trace.written.copies(), more

    def _judged(self, name: str, override: _Override, expected: list[Tensor], state: list[Tensor], more: EagerTrace) -> str:
        """The same of the graph, compared.

        Raises:
            VerifyMismatch: it differs.
        """
        run = Forced(self.module, self.forcing.number, self.forcing.outcomes[name])
        results, broken = self.step.model.forced_run(run, self.step, self.stand_ins)  # type: ignore[attr-defined]
        if broken:
            return _ASSUMED
        if not override.done:  # the step goes another way before it comes to a read
            return _REFUSED
        left = self.rehearsal.first.written.left()
        factor = tolerance.OTHER_KERNELS
        found = tolerance.run_difference(expected, self.template.select(results), state, left, tolerance_factor=factor)
        if found is None and more.written.tensors:
            found = ("state", "a tensor is written by the step alone")
        if found is not None:
            detail = f"{found[1]} when the value read at this line is forced to another outcome ({name})"
            raise VerifyMismatch(detail, operator=self.forcing.reads[0].operator, site=Site.at(self.forcing.site))
        return _PROVED
