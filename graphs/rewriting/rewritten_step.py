"""Taking host values out of a step before it is recorded: `passes` at work inside `graphs.capture`.

The rewritten graph is a candidate for the model, as a compiled one is: the first call watches the model itself, and the
warm-up and the recording run the graph.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import passes
from graphs.contract.arguments import flatten_call, replace_tensors
from graphs.contract.outputs.template import map_output
from graphs.errors import ChangingValue, DataDependentShape, HostConstant, HostSync, MixedDevices, Refusal, Site, VerifyMismatch
from graphs.objects.libraries import MODELS
from graphs.observation.eager_trace import trace_again
from graphs.observation.operations import EagerTrace
from graphs.recording.failures import raised_refusal
from graphs.recording.recorder import Recording
from graphs.rehearsal.rehearsal import PythonOnly, Rehearsal, Runs
from graphs.rehearsal.step import Checkpoint, Step
from graphs.rewriting.checked_replay import CheckedReplay, Speculation
from graphs.rewriting.forbidding import forbidding
from graphs.rewriting.python_stores import Stored, Stores
from graphs.state.counters import Counter, Counters
from graphs.state.python_state import PythonState
from graphs.state.storage import storage_id
from graphs.state.tensor_state import RandomState

Tensor = torch.Tensor
_SINGULAR: type[Exception] = getattr(torch.linalg, "LinAlgError")  # noqa: B009  # named by no stub
REMOVABLE = (HostSync, DataDependentShape, HostConstant, MixedDevices)
"""What the passes can take out of a step."""


def is_removable(findings: Iterable[Refusal]) -> bool:
    """Whether everything that stands in the way of a recording is a matter of passes."""
    return all(isinstance(finding, REMOVABLE) for finding in findings)


def rewrite(step: Step, trace: EagerTrace, tensors: Sequence[Tensor], counters: Counters | None = None) -> RewrittenStep:
    """The step as a graph without host values.

    Args:
        trace: of an eager run with ``tensors`` for its tensor leaves, whose reads are the hints.
        counters: numbers of Python that the step advances.

    Raises:
        Refusal: a host value cannot be removed; of the kind that was found at its line.
    """
    attempts = (True, False) if "branches" in step.passes and passes.Stopping.is_possible() else (False,)
    for merge in attempts:  # where both sides of branches cannot be, a bound may come from the way that is taken
        try:
            graph = traced(step, trace, tensors, counters, merge=merge)
        except passes.Unremovable as error:  # of the step as it goes, which another attempt would trace again
            reason = error
            break
        try:
            rewritten = passes.rewrite(graph, step.bounds, step.passes, forced=True)
            if step.device.type != "cpu":
                passes.refuse_host_results(rewritten.module.graph)
            made = RewrittenStep(rewritten, graph.structure, counters)
        except passes.Unremovable as error:
            reason = error
        else:
            if counters is not None:
                made.also_writes(_written_by_the_next(step, trace, tensors), tensors)
            return made
        if not graph.merged:
            break
    raise refusal_of(reason, trace) from reason


def host_values(
    step: Step, trace: EagerTrace, tensors: Sequence[Tensor]
) -> tuple[tuple[passes.HostValue, ...], passes.Unremovable | None]:
    """What the passes do with each value that the host read, and what they cannot do, if anything.

    A step that no graph can stand for is looked at as far as one does.

    Args:
        trace: as in `rewrite`.

    Raises:
        Exception: what the step raises on tensors without data.
    """
    try:
        return rewrite(step, trace, tensors).host_values, None
    except Refusal as refusal:
        if not isinstance(refusal.__cause__, passes.Unremovable):
            raise
        reason = refusal.__cause__
    if reason.host_values:
        return reason.host_values, reason
    graph = traced(step, trace, tensors, merge=passes.Stopping.is_possible(), partial=True)
    try:
        return passes.rewrite(graph, step.bounds, step.passes).host_values, reason
    except passes.Unremovable as further:
        return further.host_values, reason


def _written_by_the_next(step: Step, trace: EagerTrace, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the step after this one writes: a number that this one advances may pick another tensor of several.

    Both run for real. What the second one writes is put back, all else is the caller's to restore, as for ``trace``.
    """

    def both() -> list[Tensor]:
        step.run(tensors)
        return trace_again(lambda: step.run(tensors), list(tensors), trace)[1].written.tensors

    return Rehearsal(Checkpoint(step), trace, is_there=True).run(both)


def traced(
    step: Step,
    trace: EagerTrace,
    tensors: Sequence[Tensor],
    counters: Counters | None = None,
    *,
    merge: bool = False,
    partial: bool = False,
) -> passes.TracedStep:
    """The step as a graph with its host values.

    Args:
        merge: both sides of branches are part of it where they can be.
        partial: a step that does with a host value what no graph can do is traced up to there.

    Raises:
        passes.Unremovable: the step does such a thing, and is not to be traced up to there.
    """
    before = Checkpoint(step)
    flat = _FlatStep(step, before, counters.counters if counters is not None else [])
    runs = Runs(PythonOnly(before), trace, is_there=True)  # another attempt starts from here
    made = runs.run(
        lambda: passes.trace_step(
            *(flat, tensors, _reads(trace), _modules(step, trace), _numbers(counters), lambda: flat.advanced),
            structure=lambda: flat.structure,
            snapshot=functools.partial(PythonState, tensors=False) if merge else None,
            forbidding=forbidding() if merge else None,
            restore=runs.undo,
            unmerged=step.unmerged,
            partial=partial,
            merged=step.merged,
        )
    )
    if counters is not None and made.advance is not None:
        counters.advance = made.advance
    return made


class _FlatStep:
    """The step as a function from its tensor leaves, and symbols for the numbers that it advances, to its results in a row.

    Attributes:
        structure: the output of the last run, with a hole for each result.
        advanced: what the numbers were after it.
    """

    def __init__(self, step: Step, before: Checkpoint, counters: Sequence[Counter]) -> None:
        self._step, self._before, self._counters = step, before, counters
        self.structure: Any = None
        self.advanced: list[Any] = []

    def __call__(self, leaves: Sequence[Tensor], symbols: Sequence[Any]) -> list[Any]:
        step, counters = self._step, self._counters
        for counter, symbol in zip(counters, symbols, strict=True):
            counter.container[counter.key] = symbol
        args, kwargs = replace_tensors((step.args, step.kwargs), iter(leaves))
        stores = Stores(self._before, (args, kwargs), leaves, counters)
        output = step.model(*args, **kwargs)
        stores.check()
        self.advanced = [counter.container[counter.key] for counter in counters]
        found: list[Any] = []
        self.structure = map_output(output, lambda leaf: _hole(leaf, found))
        return found


def _reads(trace: EagerTrace) -> list[passes.Read]:
    """What the host read in a watched run."""
    return [passes.Read(r.operator, r.frame, r.value, r.index, r.place, r.turn, r.source) for r in trace.reads]


def _numbers(counters: Counters | None) -> list[passes.Number]:
    """The numbers of Python that a step advances, with the tensors that hold them."""
    if counters is None:
        return []
    held = zip(counters.tensors, counters.counters, strict=True)
    return [passes.Number(tensor, counter.value, counter.path) for tensor, counter in held]


class _Hole:
    """A result of the graph, by position; no dataclass, whose instances are outputs with parts."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hole) and other.index == self.index

    def __hash__(self) -> int:
        return hash((_Hole, self.index))


_hole_of = functools.cache(_Hole)  # one object for each position


def _hole(leaf: Any, found: list[Any]) -> Any:
    if isinstance(leaf, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        found.append(leaf)
        return _hole_of(len(found) - 1)
    parts = leaf if isinstance(leaf, torch.Size) else (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else ()
    for part in parts:  # refused as the number itself is
        _hole(part, found)
    return leaf


def _modules(step: Step, trace: EagerTrace) -> list[str]:
    """Names of the Python modules whose lines read values, and of those that define the model."""
    files = {read.frame[0] for read in trace.reads}
    names = [name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None) in files]
    model: Any = step.model
    parts = model.modules() if isinstance(model, torch.nn.Module) else [model]
    names += [getattr(part, "__module__", None) or type(part).__module__ for part in parts]
    return [name for name in dict.fromkeys(names) if _is_a_models(name)]


def _is_a_models(name: str) -> bool:
    """Whether a module may hold lines of a step: no library below the model does, and of this package the models."""
    package, _, rest = name.partition(".")
    return package not in ("torch", "passes", "builtins") and (package != "graphs" or rest.partition(".")[0] in MODELS)


def refusal_of(reason: passes.Unremovable, trace: EagerTrace) -> Refusal:
    """The refusal for what a pass could not do: of the kind that was found at that line."""
    if isinstance(reason, Stored):
        site = trace.findings[0].site if trace.findings else None
        return ChangingValue(reason.detail, operator=reason.operator, site=site)
    at = [finding for finding in trace.findings if (finding.site.file, finding.site.line) == reason.site]
    kind = type((at or trace.findings)[0]) if trace.findings else HostSync
    site = Site.at(reason.site) if reason.site[0] else (at or trace.findings)[0].site
    return kind(reason.detail, operator=reason.operator, site=site, remedy=reason.remedy or None)


class RewrittenStep:
    """A rewritten graph, called as the model is.

    Attributes:
        changes: what the passes did.
        assumption: what the graph assumes of host values; None where it holds for any.
        written: positions of the arguments that the graph writes, be it under a condition.
        held, held_written: tensors of the step that it reads and writes in place, or that the step writes the next time.
        decided_at: file and line of what it assumes.
        forced: a graph of the same rules in which outcomes of host values can be forced, and what those are.
        uploaded: host tensors of the step whose content the graph holds as it was when it was made.
        host_values: what became of each value that the host read.
        reads_host_values: whether the step does so, or advances numbers of Python: its graph may be one of several then.
    """

    def __init__(self, rewritten: passes.RewrittenGraph, structure: Any, counters: Counters | None) -> None:
        self.counters = counters
        self.module: Callable[..., Any] = rewritten.module
        self.traced = rewritten.module
        self.changes = list(rewritten.changes)
        self._structure = structure
        self.forced = rewritten.forced
        self.uploaded = rewritten.uploaded
        self.host_values = rewritten.host_values
        facts = rewritten.facts
        self.reads_host_values = bool(facts.hints or facts.assumptions or rewritten.changes or counters is not None)
        self.written, written = passes.lasting_writes(rewritten.module)
        held = rewritten.state  # not the passes' own
        self.held: list[Tensor] = list(held.values())
        self.held_written: list[Tensor] = [held[name] for name in written if name in held]
        self._results = rewritten.results
        self.decided_at: list[tuple[str, int]] = [site for site in rewritten.facts.checked if site[0]]
        self.assumption = Speculation(rewritten.undo) if rewritten.assumes else None

    def also_writes(self, written: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
        """Note what another run of the step writes: whoever runs it and takes that back has to save it before."""
        places = {storage_id(tensor): index for index, tensor in enumerate(arguments)}
        self.written = sorted({*self.written, *(places[key] for key in map(storage_id, written) if key in places)})
        known = {storage_id(tensor) for tensor in self.held_written} | {*places}
        self.held_written += [tensor for tensor in written if storage_id(tensor) not in known]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on the tensor leaves of a call. Python's numbers stay what they are.

        Raises:
            StepRaises: an operator refuses what it is given. Of the step that is known not to reach the caller.
        """
        run = self.traced.forward if self.module is self.traced else self.module  # which hooks for all modules are not told of
        try:
            made = run(*flatten_call(args, kwargs).tensors)
        except (IndexError, ValueError, _SINGULAR) as error:
            raise raised_refusal(error) from error
        results = made[: self._results]
        if self.assumption is not None:
            self.assumption.ran(made[self._results], made[self._results + 1 :])
        return self._output(results)

    def _output(self, results: Sequence[Any]) -> Any:
        return map_output(self._structure, lambda leaf: results[leaf.index] if isinstance(leaf, _Hole) else leaf)

    def forced_run(self, run: passes.Forced, step: Step, tensors: Sequence[Tensor]) -> tuple[Any, bool]:
        """The output of a run of the graph `forced`, and whether what it assumes was broken."""
        args, kwargs = replace_tensors((step.args, step.kwargs), iter(tensors))
        with torch.no_grad():
            made = run.run(*flatten_call(args, kwargs).tensors)
        return self._output(made[: self._results]), len(made) > self._results and bool(made[self._results])

    def prepare(self) -> None:
        """Make the device hold Python's numbers, before the graph is run outside a recording."""
        if self.counters is not None:
            self.counters.unknown()
            self.counters.load()

    def require_held(self) -> None:
        """Raise a `VerifyMismatch` where what the graph assumes did not hold in its last run."""
        if self.assumption is not None and not self.assumption.valid(self.assumption.runs()):
            site = Site.at(self.decided_at[0]) if self.decided_at else None
            raise VerifyMismatch("what the graph assumes does not hold for its own call", operator="branch", site=site)

    def checked(self, recording: Recording, random: Callable[[], RandomState] | None) -> CheckedReplay | None:
        """``recording`` of this graph with what a replay needs around it; None where it needs nothing."""
        if self.assumption is None and self.counters is None:
            return None
        if self.counters is not None:
            self.counters.unknown()
        return CheckedReplay(recording, self.assumption, self.counters, random)
