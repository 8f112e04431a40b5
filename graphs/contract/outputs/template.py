"""The template of a step's output: which leaves a replay produces, and how the structure is put back together."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

from graphs.contract.arguments import is_leaf, map_children
from graphs.contract.outputs.builder import Builder, identities_of
from graphs.contract.outputs.holes import (
    HOLES,
    Argument,
    Held,
    Leaf,
    Part,
    View,
    children_of,
    is_record,
    made_record,
    record_parts,
)
from graphs.contract.outputs.views import Bits, Layout, shared_memory
from graphs.contract.slots import physical
from graphs.errors import ChangingValue, Refusal, UnsupportedOutput
from graphs.objects.cells import text_of
from graphs.objects.keys import NOT_CONSTANT, constant_key, nested_key
from graphs.objects.raw_access import of_type
from graphs.state.storage import storage_id

Tensor = torch.Tensor
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_NAMED = (type, FunctionType, BuiltinFunctionType, ModuleType)
"""Objects that code names: one that is made anew by each call is another object in the next run."""


class OutputTemplate:
    """Structure of an output with holes; what is one object in the output is one here, and in what is filled.

    Attributes:
        structure: the output with holes in place of tensors and of what is handed through.
        fill: the caller's output: tensors that the replay produced, tensor and opaque arguments of this call handed through.
    """

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        self.identities = identities_of(structure)
        self.fill = Builder(structure, self.identities).fill

    def select(self, output: Any) -> list[Tensor]:
        """What a replay produces, of an ``output`` that has this structure."""
        found: dict[int, Tensor] = {}
        for hole, value in _holes(self.structure, output):
            if isinstance(hole, Leaf):
                found[hole.index] = physical(value)
            elif isinstance(hole, Part) and hole.index not in found:
                found[hole.index] = hole.shared.behind(value, hole.layout)
        return [found[index] for index in sorted(found)]

    def tensors(self, output: Any) -> list[Tensor]:
        """The tensors of ``output`` that a replay produces, each by itself, as its memory holds it: to be compared."""
        return [physical(value) for hole, value in _holes(self.structure, output) if isinstance(hole, (Leaf, Part))]

    @property
    def hung(self) -> bool:
        """Whether attributes are set on output tensors."""
        return any(getattr(hole, "hung", None) for hole, _ in _holes(self.structure, self.structure))

    @property
    def shares(self) -> bool:
        """Whether an output is a view of what the step was given or has, or shares memory with another output."""
        holes = [hole for hole, _ in _holes(self.structure, self.structure)]
        parts = Counter(hole.index for hole in {id(hole): hole for hole in holes}.values() if isinstance(hole, Part))
        return any(isinstance(hole, View) for hole in holes) or any(count > 1 for count in parts.values())

    @property
    def held(self) -> list[Any]:
        """The objects of the model and of opaque arguments that are handed out as they are, tensors left out."""
        holes = [hole for hole, _ in _holes(self.structure, self.structure) if isinstance(hole, Held)]
        return [hole.value for hole in holes if not of_type(hole.value, Tensor)]

    @property
    def tensors_of_step(self) -> list[Tensor]:
        """The tensors of the step's own that are handed out as they are, or of which views are."""
        holes = [hole for hole, _ in _holes(self.structure, self.structure)]
        sources: list[Any] = [
            hole.value if isinstance(hole, Held) else hole.source for hole in holes if isinstance(hole, (Held, View))
        ]
        return [source for source in sources if of_type(source, Tensor)]

    def seen(self, produced: Sequence[Tensor]) -> list[Tensor]:
        """The same of what a replay produced."""
        holes = [hole for hole, _ in _holes(self.structure, self.structure) if isinstance(hole, (Leaf, Part))]
        return [
            hole.layout.memory_within(produced[hole.index]) if isinstance(hole, Part) else produced[hole.index] for hole in holes
        ]


def _holes(structure: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """The holes of a structure, with what stands there in ``value``."""
    if of_type(structure, HOLES):
        yield structure, value
        return
    parts, values = children_of(structure), children_of(value)
    for part, item in zip(parts or (), values or (), strict=True):
        yield from _holes(part, item)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same storage."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and Bits.of(a) == Bits.of(b)
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


@dataclasses.dataclass
class Known:
    """What an output may hand through.

    Attributes:
        tensors, opaques: the arguments.
        externals: tensors that the step reads in place: a cache that it also returns.
        held: whether an object hangs on the model or on an opaque argument.
        views: whether outputs that are views are handed out as views: not where sizes or layouts are others than recorded.
        containers: containers that are arguments or hang on them, by identity.
    """

    tensors: Sequence[Tensor]
    opaques: Sequence[Any]
    externals: Sequence[Tensor] = ()
    held: Callable[[Any], bool] = lambda value: False
    views: bool = True
    containers: Mapping[int, Any] = dataclasses.field(default_factory=dict)


def output_template(output: Any, known: Known) -> tuple[OutputTemplate, list[Tensor]]:
    """Split an output into a template and the tensors that a replay has to produce.

    A leaf that is an argument, the same tensor or the same object, is handed through and not copied; so are views of
    arguments and of `Known.externals`.

    Raises:
        UnsupportedOutput: a leaf is neither a tensor, a constant, nor an argument, nor held by the model; or a container is the
            caller's own.
    """
    made: list[Tensor] = []
    handed: dict[int, Any] = {}

    def leaf(value: Any) -> Any:
        if of_type(value, Tensor):
            refusal = tensor_refusal(value)
            if refusal is not None:
                raise refusal
            if id(value) not in handed:
                handed[id(value)] = _handed_through(value, known)
                if handed[id(value)] is None:
                    made.append(value)
            return value if handed[id(value)] is None else handed[id(value)]
        if of_type(value, (*_CONSTANTS, *_NAMED)) or constant_key(value) is not NOT_CONSTANT:
            return value
        raise UnsupportedOutput(f"the output holds a {type(value).__name__}, made anew by each call", operator="output")

    structure = _mapped(output, known, leaf, {})
    holes, produced = _produced_holes(made, known)
    ours = {id(tensor) for tensor in made}
    return OutputTemplate(map_output(structure, lambda part: holes[id(part)] if id(part) in ours else part)), produced


def _handed_through(value: Tensor, known: Known) -> Any:
    """What stands for a tensor that is not made by the step; None for one that is."""
    for index, tensor in enumerate(known.tensors):
        if value is tensor:
            return Argument(index, opaque=False)
    for tensor in known.externals:
        if value is tensor or (storage_id(value) == storage_id(tensor) and known.held(value)):
            return Held(value)
    if known.views and value.numel():
        sources: list[tuple[int | Tensor, Tensor]] = [
            *enumerate(known.tensors),
            *((tensor, tensor) for tensor in known.externals),
        ]
        for source, tensor in sources:
            if storage_id(tensor) == storage_id(value):
                return View(source, Layout.of(value, tensor.data_ptr()), dict(value.__dict__))
    return None


def _produced_holes(made: list[Tensor], known: Known) -> tuple[dict[int, Any], list[Tensor]]:
    """The hole of each tensor that the step made, by identity, and what a replay produces for them."""
    holes: dict[int, Any] = {}
    produced: list[Tensor] = []
    groups = shared_memory(made) if known.views else []
    for tensor in made:
        if id(tensor) in holes:
            continue
        group = next((group for group in groups if id(tensor) in group[1]), None)
        if group is None:
            holes[id(tensor)] = Leaf(len(produced), Bits.of(tensor), dict(tensor.__dict__))
            produced.append(physical(tensor))
        else:
            shared, layouts = group
            members = [member for member in made if id(member) in layouts]
            holes.update({id(m): Part(len(produced), shared, layouts[id(m)], dict(m.__dict__)) for m in members})
            produced.append(shared.behind(tensor, layouts[id(tensor)]))
    return holes, produced


def _mapped(value: Any, known: Known, leaf: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
    """``value`` with ``leaf`` applied to its leaves, and with a hole for each object that is handed through as it is."""
    for index, item in enumerate(known.opaques):
        if value is item:
            return memo.setdefault(id(value), (Argument(index, opaque=True), value))[0]
    if not of_type(value, (Tensor, *_CONSTANTS, tuple)) and known.held(value):
        return memo.setdefault(id(value), (Held(value), value))[0]
    children = children_of(value)
    if children is None:
        return leaf(value)
    if known.containers.get(id(value)) is value and (children or type(value) is not tuple):
        detail = f"the output holds a {type(value).__name__} that is an argument of the call or hangs on one"
        raise UnsupportedOutput(detail, operator="output", remedy="leave it out of the output: the caller has it")
    return _once(value, memo, lambda: _with_parts(value, lambda part: _mapped(part, known, leaf, memo)))


_UNFINISHED = object()


def _once(value: Any, memo: dict[int, Any], make: Callable[[], Any]) -> Any:
    """What ``make`` gives for a container, once for each.

    Raises:
        UnsupportedOutput: the container holds itself.
    """
    key = id(value)
    if key not in memo:
        memo[key] = _UNFINISHED, value  # which keeps its identity, where a container makes its children when it is asked
        memo[key] = make(), value
    if memo[key][0] is _UNFINISHED:
        raise UnsupportedOutput(f"the output holds a {type(value).__name__} that contains itself", operator="output")
    return memo[key][0]


def map_output(
    value: Any,
    fn: Callable[[Any], Any],
    memo: dict[int, Any] | None = None,
    *,
    given: Callable[[Any], bool] = lambda value: False,
) -> Any:
    """`map_leaves` for outputs: an instance of a dataclass is no leaf, but one with other attributes.

    A container that occurs twice is one object in the result too. What is ``given`` is a leaf.

    Raises:
        UnsupportedOutput: a container holds itself.
    """
    if of_type(value, HOLES) or children_of(value) is None or given(value):
        return fn(value)
    known: dict[int, Any] = {} if memo is None else memo
    return _once(value, known, lambda: _with_parts(value, lambda part: map_output(part, fn, known, given=given)))


def tensor_refusal(value: Tensor) -> UnsupportedOutput | None:
    """Why a tensor cannot be an output that a replay makes; None where it can."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        kind = f"a {type(value).__name__} with layout {value.layout}"
        return UnsupportedOutput(f"the output holds {kind}", operator="output")
    if value.device.type not in ("cpu", "cuda"):
        return UnsupportedOutput(f"the output holds a tensor on {value.device}", operator="output")
    return None


def _with_parts(value: Any, fn: Callable[[Any], Any]) -> Any:
    if is_record(value) and is_leaf(value):
        return made_record(type(value), {name: fn(part) for name, part in record_parts(value).items()})
    return map_children(value, fn)


def compare_templates(first: Any, second: Any, *, arguments: bool = True) -> Refusal | None:
    """The first constant or structural difference between two templates.

    Without ``arguments``, which argument is handed through may differ: a caller who gave one tensor twice.
    """
    if type(first) is not type(second):
        return ChangingValue(f"the output was a {type(first).__name__}, then a {type(second).__name__}", operator="output")
    if of_type(first, HOLES) and (getattr(first, "hung", None) or getattr(second, "hung", None)):
        a, b = nested_key(first.hung), nested_key(second.hung)
        if a != b:
            return ChangingValue(f"attributes of an output were {first.hung!r}, then {second.hung!r}", operator="output")
    if of_type(first, Leaf):
        if first.bits == second.bits:
            return None
        return ChangingValue(f"an output had {first.bits}, then {second.bits}", operator="output")
    if of_type(first, (Part, View)):
        if first.layout == second.layout or not arguments:
            return None
        return ChangingValue("an output was another view than in the step before", operator="output")
    if of_type(first, Held):
        a, b = first.value, second.value
        same = a is b or (of_type(a, Tensor) and of_type(b, Tensor) and same_memory(a, b))
        return None if same else ChangingValue("the output was another object than in the step before", operator="output")
    if of_type(first, Argument):
        if arguments and (first.index, first.opaque) != (second.index, second.opaque):
            return ChangingValue("the output handed through another argument", operator="output")
        return None
    a, b = children_of(first), children_of(second)
    if a is None or b is None:
        key = constant_key(first)
        if first is second or (key is not NOT_CONSTANT and key == constant_key(second)):
            return None
        detail = f"a constant in the output was {text_of(first)}, then {text_of(second)}"
        return ChangingValue(detail, operator="output")
    if len(a) != len(b):
        return ChangingValue(f"the output had {len(a)} parts, then {len(b)}", operator="output")
    return next((refusal for x, y in zip(a, b, strict=True) if (refusal := compare_templates(x, y, arguments=arguments))), None)
