"""`explain`: what becomes of a step, from its graph to the launches of a replay. What to read when speed is missing."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

import passes
from graphs.auditing.audit import step_of
from graphs.compile.torch_dynamo import private
from graphs.compiler_options import CompilerOptions
from graphs.config import PASSES
from graphs.dispatch.captured_module import capture
from graphs.dynamo.backend import backend_report, graphs_backend
from graphs.eager_mode import forced_eager
from graphs.errors import CompileFailed
from graphs.first_call.candidates import CompiledModel, fusion_of
from graphs.first_call.observe import taking_names
from graphs.observation.eager_trace import trace_eager
from graphs.observation.launches import count_launches
from graphs.observation.operations import EagerTrace
from graphs.ops.wo_a.routes import wo_a_routes
from graphs.python_reads.code_reads import CodeReads, observed
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.step import Checkpoint, Step
from graphs.report import CaptureReport, PieceReport, RefusalCount
from graphs.rewriting.rewritten_step import refusal_of, traced

Tensor = torch.Tensor
_WIDTH = 80


@dataclass(frozen=True)
class PassEffect:
    """What one pass did to the graph of a step.

    Attributes:
        name: of the pass.
        changes: nodes that it replaced.
        diff: unified diff of the printed graph; empty where nothing changed.
        refusal: why it could not do its work; empty where it could.
    """

    name: str
    changes: int
    diff: str
    refusal: str = ""


@dataclass(frozen=True)
class Fusion:
    """What Inductor makes of a step.

    Attributes:
        scheduled: nodes before fusion, calls of libraries included.
        generated: kernels generated; calls of libraries are not among them.
        kernels: the operators of each node after fusion, in the order they run; ``"library: ..."`` for what Inductor calls.
        rewrites: how often each of this project's passes changed the graph before.
        refusal: why the step could not be compiled; empty where it could.
    """

    scheduled: int = 0
    generated: int = 0
    kernels: tuple[str, ...] = ()
    rewrites: dict[str, int] = field(default_factory=dict)
    refusal: str = ""

    def __str__(self) -> str:
        if self.refusal:
            return self.refusal
        lines = [f"{name}: {count} change(s)" for name, count in self.rewrites.items()]
        lines.append(f"{self.scheduled} nodes before fusion, {self.generated} generated kernel(s) after")
        return "\n".join([*lines, *(f"  {kernel}" for kernel in self.kernels)])


@dataclass(frozen=True)
class Explanation:
    """What becomes of a step.

    Attributes:
        device: where it runs.
        graph: the step as ATen operators, printed; empty where it could not be traced.
        untraced: why not.
        assumed: branches of which only one side is in the graph, as ``file:line``, and why.
        effects: of the passes, in the order they run. Routing is what ``graphs.route(model)`` would do.
        fusion: None where it was not asked for.
        launches: submissions per step, by how the step is called: ``"eager"``, ``"recorded"``. Operators on a CPU.
        pieces: the graphs that ``torch.compile(backend="graphs")`` makes of it, with its graph breaks.
        report: of the captured step, with the reasons why it is not recorded.
    """

    device: str
    graph: str
    untraced: str
    effects: tuple[PassEffect, ...]
    fusion: Fusion | None
    launches: dict[str, int | None]
    pieces: tuple[PieceReport, ...]
    report: CaptureReport
    assumed: dict[str, str] = field(default_factory=dict)

    @property
    def recorded(self) -> bool:
        """Whether calls of the captured step were replayed."""
        return self.report.replays > 0

    @property
    def conclusion(self) -> str:
        """Whether the step is recorded; what passes changed for it and what a replay saves, or why not and what to change."""
        reasons = [line for refusal in self.report.refusals for line in _reason(refusal)]
        if not self.recorded:
            head = "Not recorded." if reasons else "Not recorded within three calls, and no reason was counted."
            return "\n".join([head, *reasons])
        changed = ", ".join(f"{effect.name} {effect.changes}x" for effect in self.effects if effect.changes)
        counts = [self.launches.get(way) for way in ("recorded", "eager")]
        unit = "operators" if self.device == "cpu" else "launches"
        saved = f": {counts[0]} {unit} per replay, {counts[1]} per eager step" if None not in counts else ""
        lines = [f"Recorded{saved}.", f"Changed by passes: {changed or 'nothing'}."]
        return "\n".join([*lines, *(["Some calls ran eagerly."] if reasons else []), *reasons])

    def to_json(self, indent: int | None = 2) -> str:
        """A JSON object with ``recorded``, ``conclusion`` and the attribute names as keys."""
        return json.dumps({"recorded": self.recorded, "conclusion": self.conclusion, **dataclasses.asdict(self)}, indent=indent)

    def __str__(self) -> str:
        parts = [self.conclusion, f"# Graph of the step, on {self.device}", self.graph or f"not traced: {self.untraced}"]
        parts += ["# Branches of which one side is assumed"] if self.assumed else []
        parts += [f"{place}: {reason}" for place, reason in self.assumed.items()]
        for effect in self.effects:
            parts += [f"# Pass {effect.name}: {effect.changes} change(s)", *filter(None, [effect.diff, effect.refusal])]
        if self.fusion is not None:
            parts += ["# Inductor", str(self.fusion)]
        counts = [f"{name} {'not counted' if count is None else count}" for name, count in self.launches.items()]
        parts += ["# Launches per step", ", ".join(counts)]
        parts += ['# Pieces of torch.compile(backend="graphs")', *map(str, self.pieces)]
        return "\n".join([*parts, "# Recording", str(self.report)])


def _reason(refusal: RefusalCount) -> list[str]:
    """Why calls were not replayed and what to change, wrapped for a terminal; paths stay whole."""
    where = f" at {refusal.file}:{refusal.line}" if refusal.file else ""
    wrap = functools.partial(textwrap.wrap, width=_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    why = f"Why: {refusal.reason}{where} [{refusal.operator}], {refusal.count} call(s): {refusal.detail}"
    return [*wrap(why), *wrap(f"Change: {refusal.remedy}")]


def explain(
    model: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, fuse: bool = True
) -> Explanation:
    """Run one step of ``model`` in every way that this project has, and tell what came of it.

    The step runs a dozen times; its tensors, Python state and random numbers are put back.

    Args:
        fuse: compile the step with Inductor as well, which takes a while.

    Raises:
        Refusal: an argument is not dense or not on a CPU or GPU.
        Exception: what the step raises when it runs eagerly.
    """
    step = dataclasses.replace(step_of(model, args, kwargs or {}), passes=PASSES)
    trace = EagerTrace()
    rehearsal = Rehearsal(Checkpoint(step), trace, is_there=True)
    with forced_eager("trial"):
        reads = CodeReads(before=taking_names(step, rehearsal.start))
        rehearsal.covering(lambda: trace_eager(observed(step.run, reads), step.call.tensors, into=trace))
        graph, untraced, effects, assumed = rehearsal.run(lambda: _passes(step, trace))
    fusion = rehearsal.run(lambda: _fusion(step)) if fuse else None
    pieces = rehearsal.run(lambda: _pieces(step))
    launches, report = rehearsal.run(lambda: _launches(step))
    return Explanation(str(step.device), graph, untraced, effects, fusion, launches, pieces, report, assumed)


def _passes(step: Step, trace: EagerTrace) -> tuple[str, str, tuple[PassEffect, ...], dict[str, str]]:
    """The printed graph, why there is none, what the passes do to it, and which branches it assumes."""
    try:
        made = traced(step, trace, step.call.tensors, merge=True)
    except passes.Unremovable as reason:
        return "", str(refusal_of(reason, trace)), (), {}
    except Exception as error:  # a step may do what no trace can follow, and a first call says so too
        return "", f"tracing raised {type(error).__name__}: {error}", (), {}
    graph = str(made.module.graph)
    effects = [
        _effect(made.module, one, trace)
        for one in (*_rewriting(step, made), _routing, *step.compiler_options.operators(step.device), *fusion_of(step))
    ]
    assumed = {f"{file}:{line}": reason for (file, line, _), reason in made.facts.unmerged.items()}
    return graph, "", tuple(effects), assumed


def _rewriting(step: Step, graph: passes.TracedStep) -> list[passes.Pass]:
    """What `passes.rewrite` does for a step, pass by pass."""
    names = [name for name in step.passes if name not in ("constants", "fusion")]

    def remove_host_values(_: GraphModule) -> list[tuple[str, str]]:
        return [(change.before, change.after) for change in passes.remove_host_values(graph, step.bounds, names).changes]

    return [*([remove_host_values] if names else []), *([passes.hoist_constants] if "constants" in step.passes else [])]


def _routing(module: GraphModule) -> list[tuple[str, str]]:
    return passes.routing(module, wo_a_routes())


def _effect(module: GraphModule, one: passes.Pass, trace: EagerTrace) -> PassEffect:
    name = str(getattr(getattr(one, "func", one), "__name__", one)).lstrip("_")
    before = str(module.graph).splitlines()
    try:
        changes = passes.run(module, [one])
    except passes.Unremovable as reason:
        return PassEffect(name, 0, "", str(refusal_of(reason, trace)))
    after = str(module.graph).splitlines()
    diff = difflib.unified_diff(before, after, "before", "after", n=1, lineterm="")
    return PassEffect(name, len(changes), "\n".join(diff) if changes else "")


def _fusion(step: Step) -> Fusion:
    """Compile the step anew, since a cache of compiled graphs does not say what was fused."""
    config, metrics = private("config"), private("metrics")

    kernels: list[str] = []
    options: dict[str, Any] = {"force_disable_caches": True}
    if hasattr(config, "_post_fusion_custom_pass"):
        options["_post_fusion_custom_pass"] = functools.partial(_list_kernels, kernels)
    compiled = CompiledModel(step.model, step.device, options=CompilerOptions.resolve(options))
    metrics.reset()
    try:
        step.with_candidate(compiled).run()
    except CompileFailed as refusal:
        return Fusion(refusal=str(refusal))
    rewrites = dict(Counter(change.by for change in compiled.changes))
    return Fusion(metrics.ir_nodes_pre_fusion, metrics.generated_kernel_count, tuple(kernels), rewrites)


def _list_kernels(kernels: list[str], nodes: list[Any]) -> list[Any]:
    """Write down what each node of Inductor's schedule is made of; the schedule stays as it is."""
    for node in nodes:
        origins = {origin for part in node.get_nodes() if part.node is not None for origin in part.node.get_origins()}
        graph_order = {origin: index for index, origin in enumerate(next(iter(origins)).graph.nodes)} if origins else {}
        names = ", ".join(str(origin) for origin in sorted(origins, key=lambda one: graph_order.get(one, 0)))
        kernels.append(f"library: {names}" if node.is_extern() else names)
    return nodes


def _pieces(step: Step) -> tuple[PieceReport, ...]:
    """The graphs that Dynamo makes of the step, called twice; no Inductor, since it changes nothing about them."""
    known = {piece.index for piece in backend_report().pieces}
    compiled = torch.compile(step.model, backend=graphs_backend, options={"compiler": "aten"})
    for _ in range(2):
        step.with_fresh_arguments().with_candidate(compiled).run()
    return tuple(piece for piece in backend_report().pieces if piece.index not in known)


def _launches(step: Step) -> tuple[dict[str, int | None], CaptureReport]:
    captured = capture(step.model)
    recorded = step.with_candidate(captured)
    for _ in range(3):
        recorded.with_fresh_arguments().run()
    launches = {"eager": count_launches(lambda: step.with_fresh_arguments().run(), step.device)}
    if captured.report().replays:
        launches["recorded"] = count_launches(lambda: recorded.with_fresh_arguments().run(), step.device)
    return launches, captured.report()
