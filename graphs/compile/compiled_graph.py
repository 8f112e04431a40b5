"""One FX graph, compiled so that it can be recorded.

A device graph records whatever kernels a compiled function launches. The CPU tape records operators, and Inductor's C++
kernels are none: where operators are being watched, a graph that Inductor compiled for the CPU runs as one operator,
``graphs::compiled``, whose schema says what it writes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

import passes
from graphs._version import __version__
from graphs.compile.torch_dynamo import private
from graphs.compile.view_sources import view_sources
from graphs.errors import Site
from graphs.observation.eager_trace import trace_eager
from graphs.observation.operations import EagerTrace
from graphs.rehearsal.rehearsal import Runs, States
from graphs.state.storage import storage_id, tensors_in
from graphs.state.tensor_state import RandomState
from passes.core.schema import may_write
from passes.core.traced_step import note_apart

Tensor = torch.Tensor
_logger = logging.getLogger("graphs")
_handles = itertools.count()
_library = torch.library.Library("graphs", "FRAGMENT")
_library.define("compiled(int handle, Tensor(a!)[] written, Tensor[] read, int[] sizes) -> Tensor[]")


class CompiledGraph:
    """A graph from Dynamo as a callable of flat inputs, and the graph as it was before.

    Attributes:
        name: where it stands in the program, for messages.
        function: the compiled function, of tensors, and of ints for symbolic sizes.
        compiler: ``"inductor"`` or ``"aten"``.
        training: whether it was compiled for autograd, and so must not be recorded.
        device: where it runs.
        static: positions of inputs that stay where they are by intention: parameters, buffers, marked addresses.
        names: of the inputs.
        sizes: positions of the inputs that are symbolic sizes.
        operators: operators in the graph as Dynamo traced it.
        owned: tensors of the graph's own.
        changes: what the passes changed; empty where a compile cache made running them needless.
        writes: whether it may write in its inputs.
        modes: dispatch modes that whoever called Dynamo suspended around it, and that are to see this graph.
    """

    def __init__(self, module: GraphModule, inputs: Sequence[Any], compiler: str) -> None:
        self.function: Any = module
        self.name = f"graph {module.meta.get('dynamo_compile_id', '')}".rstrip()
        self.compiler = compiler
        self.device = device_of(module, inputs)
        self.training = needs_gradients(module, inputs)
        self.static = static_inputs(module)
        self.operators = sum(node.op.startswith("call_") for node in module.graph.nodes)
        self.names = [node.name for node in placeholders(module)]
        self.sizes = [i for i, node in enumerate(placeholders(module)) if not isinstance(node.meta["example_value"], Tensor)]
        self.owned: list[Tensor] = [*module.parameters(), *module.buffers()]
        self.changes: list[passes.Change] = []
        self.modes: Sequence[Any] = ()
        self._original = _copied(module)
        self.writes = any(may_write(node, module) for node in module.graph.nodes)
        self._written: tuple[int, ...] | None = None
        self._constants: dict[int, Any] = {}
        self._handle = next(_handles)
        _compiled[self._handle] = self

    def __call__(self, *inputs: Any) -> Any:
        """Run the compiled function."""
        if self.compiler == "aten" or self.device.type != "cpu" or self.training:
            return self.function(*inputs)
        if self.modes or _get_current_dispatch_mode() is not None:
            with contextlib.ExitStack() as stack:
                for mode in self.modes:
                    stack.enter_context(mode)
                return self._run_as_operator(inputs)
        self.written(inputs)
        return self.function(*inputs)

    def written(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """Positions of the inputs in whose memory the graph writes, by one watched run with the first that are given."""
        return self.watch(inputs, tensors_of(inputs), EagerTrace()) if self._written is None else self._written

    def as_traced(self, *inputs: Any) -> Any:
        """Run the graph as Dynamo traced it, with effects in the order of the program whatever memory the inputs share."""
        return self._original(*inputs)

    def view_sources(self) -> list[frozenset[int | Tensor]]:
        """Whose memory each output may be; see `graphs.compile.view_sources`."""
        return view_sources(self._original)

    def watch(self, inputs: Sequence[Any], given: Sequence[Tensor], trace: EagerTrace) -> tuple[int, ...]:
        """Run the graph as it was before it was compiled, watched, and undo it.

        Args:
            given: the inputs that change from call to call; the others count as read in place.
            trace: filled, also when the run raises.

        Returns:
            Positions of the inputs in whose memory the graph writes.
        """
        runs = Runs(States(trace.written, RandomState(self.device)), trace, is_there=True)
        located = _Located(self._original, trace, {storage_id(tensor) for tensor in tensors_of(inputs)})
        output, _ = runs.run(lambda: trace_eager(lambda: located.run(*inputs), list(given), into=trace))
        self._constants = {index: value for index, value in enumerate(output) if not isinstance(value, Tensor)}
        self._written = tuple(i for i, v in enumerate(inputs) if isinstance(v, Tensor) and storage_id(v) in trace.written)
        return self._written

    def _run_as_operator(self, inputs: Sequence[Any]) -> list[Any]:
        if self._written is None:
            raise RuntimeError("a graph compiled for the CPU has to run once before it is recorded")
        written = [inputs[index] for index in self._written]
        read = [value for i, value in enumerate(inputs) if isinstance(value, Tensor) and i not in self._written]
        sizes = [value for value in inputs if not isinstance(value, Tensor)]
        produced = torch.ops.graphs.compiled(self._handle, written, read, sizes)
        for index, value in self._constants.items():
            produced.insert(index, value)
        return produced

    def from_operator(self, written: list[Tensor], read: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Run the compiled function on the arguments of ``graphs::compiled``."""
        groups, rest, positions = {True: iter(written), False: iter(read)}, iter(sizes), self._written or ()
        inputs = [
            next(groups[index in positions]) if isinstance(node.meta["example_value"], Tensor) else next(rest)
            for index, node in enumerate(placeholders(self._original))
        ]
        return tensors_of(self.function(*inputs))


_compiled: weakref.WeakValueDictionary[int, CompiledGraph] = weakref.WeakValueDictionary()


def _run_compiled(handle: int, written: list[Tensor], read: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return _compiled[handle].from_operator(written, read, sizes)


_library.impl("compiled", _run_compiled, "CPU")


def compile_graph(
    module: GraphModule,
    inputs: Sequence[Any],
    compiler: str,
    pipeline: Sequence[passes.Pass],
    patches: Mapping[str, Any] | None = None,
) -> CompiledGraph:
    """Compile a graph as a backend of Dynamo gets it: AOT, then ``pipeline``, then Inductor or plain ATen.

    Args:
        inputs: tensors, and symbolic sizes.
        compiler: ``"inductor"`` or ``"aten"``.
        patches: further settings of Inductor.
    """
    graph = CompiledGraph(module, inputs, compiler)
    if compiler == "inductor":
        settings = {"triton.cudagraphs": False, **(patches or {})}
        for setting, early in (("joint_custom_pre_pass", True), ("post_grad_custom_pre_pass", False)):
            some = [one for one in pipeline if passes.is_early(one) == early]
            settings |= _as_inductor_pass(setting, some, graph.changes, settings.get(setting))
        graph.function = private("compile_fx")(module, inputs, config_patches=settings)
    else:

        def rewritten(lowered: GraphModule, _: Sequence[Any]) -> Any:
            graph.changes += _run_passes(lowered, pipeline)
            return private("make_boxed_func")(lowered.forward)

        aot_autograd = private("aot_autograd")
        graph.function = aot_autograd(fw_compiler=rewritten, keep_inference_input_mutations=True)(module, inputs)
    return graph


def _run_passes(module: GraphModule, pipeline: Sequence[passes.Pass]) -> list[passes.Change]:
    note_apart(module)  # AOT has a graph that writes an input take what shares its memory as views of one input
    with private("unset_fake_temporarily")():  # compilers run in a mode where a constant that a pass computes would have no value
        return passes.run(module, pipeline, failed=_tell)


def _tell(name: str, error: Exception) -> None:
    """A rewrite that fails is an error of this project, and none of the step's: it is compiled without."""
    _logger.warning("graphs: the step is compiled without %s, which failed: %s: %s", name, type(error).__name__, error)


def _as_inductor_pass(setting: str, pipeline: Sequence[passes.Pass], changes: list[passes.Change], given: Any) -> dict[str, Any]:
    """The ``setting`` that makes Inductor run the pipeline on the ATen graph, after a pass that is ``given`` or set already.

    Its caches tell pipelines apart by name and by the version of this project.
    """
    if not pipeline:
        return {}
    config, base = private("config"), private("CustomGraphPass")
    before: Any = given if given is not None else getattr(config, setting)

    class Pipeline(base):  # type: ignore[misc, valid-type]
        def __call__(self, graph: Graph) -> None:
            if before is not None:
                before(graph)
            changes.extend(_run_passes(cast(GraphModule, graph.owning_module), pipeline))

        def uuid(self) -> Any:
            other = before.uuid() if isinstance(before, base) else None
            if before is not None and other is None:
                return None  # it has no name that a cache could trust
            return ("passes", __version__, *map(name_of, pipeline), other)

    return {setting: Pipeline()}


def name_of(one: Any) -> str:
    """The name of a pass, with its module and with what it was bound to."""
    if isinstance(one, functools.partial):
        bound = (f"{key}={name_of(value) if callable(value) else value}" for key, value in sorted(one.keywords.items()))
        return f"{name_of(one.func)}({', '.join(bound)})"
    if isinstance(one, OpOverload):
        return str(one)
    return f"{getattr(one, '__module__', '')}.{getattr(one, '__qualname__', repr(one))}"


def tensors_of(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among flat inputs or outputs of a graph."""
    return [value for value in values if isinstance(value, Tensor)]


class _Located(Interpreter):
    """Runs a graph; what is found in it is found at the user's line that a node was traced from.

    Args:
        inputs: storages of the graph's inputs. A higher-order operator (a kernel of the user's, a conditional) has no schema,
            and dispatch modes do not see into it: what it is given of them counts as written.
    """

    def __init__(self, module: GraphModule, trace: EagerTrace, inputs: set[int]) -> None:
        super().__init__(module)
        self._trace, self._inputs = trace, inputs

    def run_node(self, n: Node) -> Any:
        """Run one node and place what it adds to the findings."""
        if isinstance(n.target, HigherOrderOperator):
            for tensor in tensors_in(self.fetch_args_kwargs_from_env(n)):
                if storage_id(tensor) in self._inputs:
                    self._trace.written.save(tensor)
            with _disable_current_modes():
                return super().run_node(n)
        known = len(self._trace.findings)
        result = super().run_node(n)
        for index, finding in enumerate(self._trace.findings[known:], known):
            placed = type(finding)(finding.detail, operator=finding.operator, site=site_of(n), remedy=finding.remedy)
            self._trace.findings[index] = placed
        return result


def site_of(node: Node) -> Site:
    """The user's line that a node was traced from."""
    summary: list[str] = (node.meta.get("stack_trace") or "").splitlines()
    places = [line.split('"') for line in summary if line.lstrip().startswith('File "')]
    if not places:
        return Site()
    line = places[-1][2].split(",")[1].removeprefix(" line ")
    return Site(places[-1][1], int(line), summary[-1].strip())


def needs_gradients(module: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether AOTAutograd makes a graph for training of ``module``."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*module.parameters(), *tensors_of(inputs)))


def static_inputs(module: GraphModule) -> tuple[int, ...]:
    """Positions of the inputs that Dynamo calls static: parameters, buffers, marked addresses."""
    return tuple(index for index, node in enumerate(placeholders(module)) if _is_static(node))


def placeholders(module: GraphModule) -> list[Node]:
    """The inputs of a graph."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _is_static(node: Node) -> bool:
    return node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None


def _copied(module: GraphModule) -> GraphModule:
    """The graph again, with the same tensors: compilers take over what they are given."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)


def device_of(module: GraphModule, inputs: Sequence[Any]) -> torch.device:
    """The device of the graph: of its inputs, else of what it makes."""
    made = [node.meta.get("example_value") for node in module.graph.nodes]
    devices = [tensor.device for tensor in (*tensors_of(inputs), *module.buffers(), *tensors_of(made))]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
