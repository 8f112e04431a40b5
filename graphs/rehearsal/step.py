"""One step as its first call sees it: how to run it, and its state at one moment."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from graphs.compiler_options import CompilerOptions
from graphs.contract.argument_state import argument_state, classes_of, held_by
from graphs.contract.arguments import Call, replace_tensors
from graphs.contract.outputs.template import Known, OutputTemplate, output_template
from graphs.contract.slots import kept_strides
from graphs.objects.cells import Difference, text_of, write_mapping
from graphs.observation.operations import EagerTrace
from graphs.state.counters import Counter, find_counters
from graphs.state.python_state import PythonState
from graphs.state.tensor_form import TensorForm, has_form
from graphs.state.tensor_state import RandomState

Tensor = torch.Tensor


@dataclass
class Step:
    """What a first call needs to know of the captured module and of one call.

    Attributes:
        model: the module or callable.
        call, args, kwargs: the call, flattened and as given.
        names, opaque_names: names of the tensor leaves and of the opaque leaves.
        static: positions of tensor arguments declared static.
        batch_dims: batch dimension of each tensor leaf; used when ``rows`` is not None.
        rows: bucket to record at, or None for exact sizes.
        real: rows of this call.
        compiler, compiler_options: what compiles the step before it is recorded; see `graphs.first_call.candidates`.
        passes, bounds: what takes host values out of the step; see `graphs.rewriting.rewritten_step`.
        unmerged: branches that cannot become part of a recording, and why, by file, line and column; filled by trials.
        merged: branches that did, for any call of the module, which are tried at once; likewise. See `passes.trace_step`.
        form: the template of the output, where it is that of a candidate for the module.
        moving: positions of arguments that lie elsewhere at each call: copied, and copied back if the step writes them.
        host: positions of host tensors among arguments on a device; see `graphs.first_call.host_arguments`.
        held: whether an object hangs on the module or on an opaque argument; filled by the first call.
        replaced: what stands in the place of functions of torch's and Python's, and torch's hooks for all modules, as far as the
            step can look it up, by name; filled by its observed run. See `graphs.python_reads.replaced`.
        plain: the module itself, where ``model`` is a candidate for it (compiled, or rewritten); else None.
    """

    model: Callable[..., Any]
    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: list[str]
    opaque_names: list[str]
    static: tuple[int, ...]
    padding: dict[str, Any]
    device: torch.device
    batch_dims: tuple[int | None, ...] = ()
    rows: int | None = None
    real: int = 1
    compiler: str = "none"
    plain: Callable[..., Any] | None = None
    compiler_options: CompilerOptions = field(default_factory=CompilerOptions)
    passes: tuple[str, ...] = ()
    bounds: Mapping[str, int] = field(default_factory=dict)
    unmerged: dict[tuple[str, int, int], str] = field(default_factory=dict)
    merged: dict[tuple[str, CodeType], frozenset[tuple[int, int]]] = field(default_factory=dict)
    form: OutputTemplate | None = None
    moving: frozenset[int] = frozenset()
    host: tuple[int, ...] = ()
    held: Callable[[Any], bool] = lambda value: False
    replaced: list[tuple[str, Any]] = field(default_factory=list)

    def with_candidate(self, model: Callable[..., Any]) -> Step:
        """The same step with ``model`` in place of the module, which stays its reference."""
        return dataclasses.replace(self, model=model, plain=self.plain or self.model)

    def without_candidate(self) -> Step:
        """The same step of the module itself."""
        return self if self.plain is None else dataclasses.replace(self, model=self.plain, plain=None)

    @functools.cached_property
    def is_dummy(self) -> bool:
        """Whether the rows of the call are padding themselves: each is at a sentinel, which no row that counts is."""
        sentinels = [(tensor, self.padding[name]) for name, tensor in self.tensors() if name in self.padding]
        return any(policy.kind == "sentinel" and bool((tensor == policy.value).all()) for tensor, policy in sentinels)

    def with_fresh_arguments(self) -> Step:
        """The same step with containers of its own, as each call has: it may add to them. Tensors and objects are the same."""
        args, kwargs = replace_tensors((self.args, self.kwargs), iter(self.call.tensors))
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def run(self, tensors: Sequence[Tensor] | None = None) -> Any:
        """Call the model eagerly, with its tensor leaves replaced by ``tensors``."""
        with torch.no_grad():
            if tensors is None:
                return self.model(*self.args, **self.kwargs)
            args, kwargs = replace_tensors((self.args, self.kwargs), iter(tensors))
            return self.model(*args, **kwargs)

    def shapes(self, tensors: Sequence[Tensor]) -> str:
        """The names and shapes of the tensor leaves, where they are ``tensors``: what a recording is called by in reports."""
        return ", ".join(f"{n}{list(t.shape)}" for n, t in zip(self.names, tensors, strict=True)) or "no tensor arguments"

    def template(
        self, output: Any, tensors: Sequence[Tensor], externals: Sequence[Tensor]
    ) -> tuple[OutputTemplate, list[Tensor]]:
        """The output as a template and the tensors that a replay has to produce."""
        views = self.rows is None and all(kept_strides(tensor) is not None for tensor in tensors)
        containers = held_by(self.args, self.kwargs, self.call.opaques)
        return output_template(output, Known(tensors, self.call.opaques, externals, self.held, views, containers))

    def shares_memory(self, output: Any, tensors: Sequence[Tensor], externals: Sequence[Tensor]) -> bool:
        """Whether an output is a view of an argument or of a tensor of the step's own, or two of them are one memory."""
        return output_template(output, Known(tensors, self.call.opaques, externals, self.held))[0].shares

    def produced(self, tensors: Sequence[Tensor], externals: Sequence[Tensor]) -> list[Tensor]:
        """Run at ``tensors`` and return the output tensors that a replay has to produce."""
        output = self.run(tensors)
        return self.form.select(output) if self.form is not None else self.template(output, tensors, externals)[1]

    def roots(self) -> list[tuple[str, Any]]:
        """Where Python state of the step can hang: the model, the opaque arguments, the classes of all others, and what the
        program has put in the place of others' functions.
        """
        model = getattr(self.model, "_orig_mod", self.model)  # a compiled module's own bookkeeping is not state
        model = getattr(model, "_torchdynamo_orig_callable", model)
        classes = [("an argument's class", kind) for kind in classes_of(self.args, self.kwargs, self.call.opaques)]
        return [("self", model), *zip(self.opaque_names, self.call.opaques, strict=True), *classes, *self.replaced]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensor arguments by name."""
        yield from zip(self.names, self.call.tensors, strict=True)


class Checkpoint:
    """Python, random and tensor state at one moment; tensors as far as ``written`` covers them."""

    def __init__(self, step: Step, trace: EagerTrace | None = None) -> None:
        self.python = PythonState(step.roots())
        self._arguments = argument_state(step.args, step.kwargs, self.python)
        self.python.complete = self.python.complete and self._arguments.complete
        self._hung = [(name, tensor.__dict__, dict(tensor.__dict__)) for name, tensor in step.tensors()]
        self._forms = [TensorForm(name, tensor) for name, tensor in step.tensors() if has_form(tensor)]
        self._random = RandomState(step.device, {g: g.get_state() for g in self._generators(step, trace)})
        self._written = trace.written if trace else None
        self._copies = trace.written.copies() if trace else None

    def _generators(self, step: Step, trace: EagerTrace | None) -> set[torch.Generator]:
        """The generators that the step drew from, and those that it can reach: another way through it may draw from them."""
        given = [opaque for opaque in step.call.opaques if type(opaque) is torch.Generator]
        return {*given, *self.python.generators, *(trace.generators if trace is not None else ())}

    def later(self, step: Step, trace: EagerTrace) -> Checkpoint:
        """The present state, where nothing of Python's changed since: a walk would find what this one found."""
        now = copy.copy(self)
        now._random = RandomState(step.device, {g: g.get_state() for g in self._generators(step, trace)})
        now._written, now._copies = trace.written, trace.written.copies()
        return now

    def covers(self, trace: EagerTrace) -> None:
        """Take tensors and generators from ``trace``, which saved them before their first use."""
        self._written, self._copies = trace.written, None
        self._random.also(trace.generators)

    def differences(self) -> list[Difference]:
        """What Python state is not as it was."""
        return [*self._arguments.differences(), *self._hanging(), *self.python.differences()]

    def _hanging(self) -> list[Difference]:
        """What was set on or taken from tensor arguments, and what else they are not any more."""
        set_or_taken = [
            Difference(f"{name}.{key}", text_of(before.get(key)), text_of(now.get(key)))
            for name, now, before in self._hung
            for key in {**before, **now}
            if now.get(key) is not before.get(key)
        ]
        return [*set_or_taken, *(difference for form in self._forms for difference in form.differences())]

    def changed_entries(self) -> Iterator[tuple[str, Any, Any, Any, Any]]:
        """As `PythonState.changed_entries`, for all that hangs on the model and on arguments."""
        yield from self._arguments.changed_entries()
        yield from ((change.path, None, None, change.before, change.after) for change in self._hanging())
        yield from self.python.changed_entries()

    def counters(self) -> list[Counter] | None:
        """The whole numbers of Python that changed since; None where something else did."""
        return find_counters(self.python) if not self._arguments.differences() and not self._hanging() else None

    def random_states(self) -> list[Tensor]:
        """The states of the random generators now."""
        return self._random.states()

    def host_has_drawn(self) -> bool:
        """Whether random numbers were drawn from a generator of the host since."""
        return self._random.host_has_drawn()

    def with_python_of(self, other: Checkpoint) -> Checkpoint:
        """This checkpoint with the Python state of another, but for that of the arguments: each call brings its own."""
        mixed = copy.copy(self)
        mixed.python = other.python
        return mixed

    def restore(self) -> None:
        """Put everything back."""
        self.restore_tensors()
        self.restore_python()

    def restore_tensors(self) -> None:
        """Put back tensors and random generators, and nothing else."""
        if self._written is not None:
            self._written.restore(self._copies)
        self._random.restore()

    def restore_python(self) -> None:
        """Put Python objects back, and nothing else."""
        for _, attributes, before in self._hung:
            if attributes or before:
                write_mapping(attributes, before)
        for form in self._forms:
            form.restore()
        self._arguments.restore()
        self.python.restore()
