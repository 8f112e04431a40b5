"""Recording a step that is compiled first: ``graphs.capture(compiler="inductor" | "auto")``.

The compiled step is a candidate for the model: the first call watches the model itself, and only the warm-up and the
recording run what ``torch.compile`` made of it. A replay touches neither Dynamo's guards nor Inductor's wrappers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

import passes
from graphs.compile.fused_region import CompiledRegion
from graphs.compile.torch_dynamo import private, without_recompile_limit
from graphs.compiler_options import CompilerOptions
from graphs.errors import CompileFailed, Refusal, RowsInteract, Site
from graphs.first_call.recorded_step import RecordedStep
from graphs.observation.operations import EagerTrace
from graphs.observation.timing import CallTime
from graphs.rehearsal.step import Step
from graphs.rewriting.rewritten_step import RewrittenStep
from passes.core.composites import suspended_calls


def record_compiled(step: Step, trace: EagerTrace, record: Callable[[Step], RecordedStep]) -> RecordedStep:
    """The recording of a step by its compiler; with ``"auto"`` the faster of both, uncompiled where compiling fails.

    Args:
        trace: of the watched run of the model.
        record: records a step, from the state before the call.

    Raises:
        Refusal: the uncompiled step cannot be recorded either, or (`RowsInteract`) not at this size.
    """
    if step.compiler == "none":
        return record(step)
    candidate = CompiledModel(step.model, step.device, random=_draws(trace), options=step.compiler_options)
    try:
        compiled = record(step.with_candidate(candidate))
    except RowsInteract:
        raise
    except Refusal as refusal:
        return dataclasses.replace(record(step), not_compiled=refusal)
    rewrites = dict(Counter(change.by for change in candidate.changes))
    compiled = dataclasses.replace(compiled, compiler="inductor", compile_seconds=candidate.seconds, rewrites=rewrites)
    if step.compiler == "inductor":
        return compiled
    plain = record(step)
    costs = {"none": _cost(plain.replay), "inductor": _cost(compiled.replay)}
    return dataclasses.replace(compiled if costs["inductor"] < costs["none"] else plain, candidates=costs)


def compile_rewritten(step: Step, rewritten: RewrittenStep) -> Step:
    """The step with its rewritten graph in the model's place: compiled where the step is to be compiled, else fused."""
    if isinstance(step.model, CompiledModel):
        step.model.stand_for(rewritten.module)
        rewritten.module = step.model
    else:
        rewritten.changes += passes.run(rewritten.traced, (*step.compiler_options.operators(step.device), *fusion_of(step)))
    return step.with_candidate(rewritten)


def fusion_of(step: Step) -> list[passes.Pass]:
    """The passes that leave a rewritten step fewer kernels to launch, where it is recorded uncompiled."""
    return [passes.fewer_launches, functools.partial(passes.fuse_exact, make=CompiledRegion)] if _is_fused(step) else []


def _is_fused(step: Step) -> bool:
    """Whether small operators are compiled. The tape of a CPU records operators one by one, which it could not then."""
    return "fusion" in step.passes and step.device.type != "cpu"


def _cost(replay: CallTime | None) -> float:
    return max(replay.host_us, replay.device_us or 0.0) if replay is not None else float("inf")


def _draws(trace: EagerTrace) -> bool:
    """Whether a step draws random numbers: Inductor's own would not be those that eager draws."""
    return any(torch.Tag.nondeterministic_seeded in operation.func.tags for operation in trace.operations)


class CompiledModel:
    """A model, compiled for static shapes. It owns the compiled graphs, which a recording of them reads constants of.

    On a CPU the model has to be one graph: the tape sees compiled graphs as operators, and Dynamo, whose guards fail while
    operators are watched, is run with the watching suspended. Operators between two graphs would be lost.

    Args:
        random: draw the random numbers that eager draws, not Inductor's own.
        options: what else the compiler is told.

    Attributes:
        seconds: time spent compiling so far.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        device: torch.device,
        *,
        random: bool = False,
        options: CompilerOptions | None = None,
    ) -> None:
        from graphs.compile.compiled_graph import CompiledGraph, compile_graph

        self.seconds = 0.0
        self._graphs: list[CompiledGraph] = []
        options = options or CompilerOptions()
        patches = {**({"fallback_random": True} if random else {}), **options.inductor}
        pipeline = options.pipeline(device)

        def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> CompiledGraph:
            started = time.perf_counter()
            self._graphs.append(compile_graph(module, inputs, "inductor", pipeline, patches))
            self.seconds += time.perf_counter() - started
            return self._graphs[-1]

        self._compile = functools.partial(torch.compile, backend=backend, dynamic=False, fullgraph=device.type == "cpu")
        self.stand_for(getattr(model, "_orig_mod", model))

    @property
    def changes(self) -> list[passes.Change]:
        """What the passes changed in all graphs."""
        return [change for graph in self._graphs for change in graph.changes]

    def stand_for(self, model: Callable[..., Any]) -> None:
        """Compile ``model`` from now on."""
        self._compiled = self._compile(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled model; the first call compiles it.

        Raises:
            CompileFailed: Dynamo or Inductor raised, or Dynamo found nothing to compile.
        """
        default = torch.compiler.set_stance("default")
        with default, _no_recompile_limit(), suspended_calls(), _disable_current_modes() as modes:
            for graph in self._graphs:
                graph.modes = modes
            try:
                result = self._compiled(*args, **kwargs)
            except private("TorchDynamoException") as error:
                raise _compile_failed(error) from error
        if not self._graphs:
            raise CompileFailed("Dynamo found no operator of the step that it can trace", operator="torch.compile")
        return result


@contextlib.contextmanager
def _no_recompile_limit() -> Iterator[None]:
    """Each key is compiled once and may be the ninth of its code: the limit is for guards that keep failing."""
    with without_recompile_limit():
        yield


def _compile_failed(error: Exception) -> CompileFailed:
    """What the compiler raised, with the innermost line of the user's that it was tracing."""
    stack = list(getattr(error, "real_stack", None) or ())
    site = Site(stack[-1].filename, stack[-1].lineno or 0, (stack[-1].line or "").strip()) if stack else Site()
    inner = getattr(error, "inner_exception", error)
    detail = f"{type(inner).__name__}: {str(inner).strip().splitlines()[0] if str(inner).strip() else ''}"
    return CompileFailed(detail, operator="torch.compile", site=site)
