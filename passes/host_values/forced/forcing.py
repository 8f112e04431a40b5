"""Outcomes that the present data does not show: which there are to force, and a graph in which they can be.

A rewritten graph is compared with eager on the data of one call. To see more of it, one host read is given another tensor to
read, in the eager run and in the graph alike. `read_here` marks the tensors that host values come from, in a second graph that
the same rules build and that is never recorded.

Before::

    %u : _local_scalar_dense(%n)

After, with ``u`` defined as::

    %read_here : read_here(%n, 0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from passes.core.aliasing import is_pure
from passes.core.facts import Facts
from passes.core.predicates import BranchArm
from passes.core.source_location import Branch, Place, Site
from passes.core.values.host_reads import Read

Tensor = torch.Tensor
aten = torch.ops.aten
ITEM = aten._local_scalar_dense.default
PICKING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
LIMIT = 3
"""Outcomes that are forced of one value at most, unless more are needed to take each branch the other way."""
_MASKS = (torch.bool, torch.uint8)


def read_here(tensor: Tensor, number: int) -> Tensor:
    """The tensor that a host value is read from: what it is given, unless a proof puts another in its place."""
    return tensor


@dataclass
class Forcing:
    """One tensor that host values are read from.

    Attributes:
        number: as in the graph's `read_here`.
        reads: what the eager run read of it.
        unread: operators and places that read it where the eager run did not come.
        positions: which argument of the reading operators it is.
        kind: ``"branch"``, ``"length"`` or ``"number"``, by what its values are for.
        outcomes: what to put in its place, by a text that tells what that is.
        branches: by outcome, the branches that go the other way then.
        capped: outcomes that are left out.
    """

    number: int
    reads: list[Read]
    positions: dict[str, int]
    site: Site
    kind: str = "number"
    outcomes: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    unread: set[tuple[str, Place]] = field(default_factory=set)
    branches: dict[str, list[Branch]] = field(default_factory=dict)
    capped: int = 0


def position_of(node: Node) -> int | None:
    """Which argument of a traced operator its host value is read from; None where that is no single one."""
    if node.target in PICKING:
        masks = [i for i in node.args[1] if isinstance(i, Node) and i.meta["val"].dtype in _MASKS]  # type: ignore[union-attr]
        return 1 if len(masks) == 1 else None
    return _POSITIONS.get(node.target)


def with_tensor(args: tuple[Any, ...], position: int, change: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Arguments with ``change`` applied to the tensor, or to the only mask of a list, at a position."""

    def masked(item: Any) -> Any:
        value = item.meta.get("val") if isinstance(item, Node) else item
        return change(item) if isinstance(value, Tensor) and value.dtype in _MASKS else item

    given = args[position]
    made = type(given)(map(masked, given)) if isinstance(given, (list, tuple)) else change(given)
    return (*args[:position], made, *args[position + 1 :])


def _tensor_at(args: tuple[Any, ...], position: int) -> Any:
    """What `with_tensor` would change."""
    found: list[Any] = []

    def note(value: Any) -> Any:
        found.append(value)
        return value

    with_tensor(args, position, note)
    return found[0] if found else None


def symbols_of(node: Node, facts: Facts) -> list[sympy.Symbol]:
    """The symbols that a traced operator read in the eager run too."""
    found: dict[sympy.Symbol, None] = {}
    for value in tree_leaves(node.meta.get("val")):
        for part in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                found |= dict.fromkeys(s for s in part.node.expr.free_symbols if s in facts.reads)
    return list(found)


class Marks:
    """The tensors of a traced graph that host values are read from, each with a number: reads of one tensor share one."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.found: dict[Any, Forcing] = {}
        self._keys: dict[Node, Any] = {}
        self._numbers: dict[Any, int] = {}
        self.symbols: dict[int, list[sympy.Symbol]] = {}

    def of(self, node: Node) -> Forcing | None:
        """The forcing of an old node that reads, or None."""
        symbols, reads = symbols_of(node, self.facts), node.meta.get("reads", [])
        unread: Place | None = node.meta.get("unread")
        position = position_of(node) if len(symbols) <= 1 and (len(reads) == 1 or unread is not None) else None
        if position is None or any(read.place is None or read.operator != str(node.target) for read in reads):
            return None
        source = _tensor_at(node.args, position)
        if not isinstance(source, Node):
            return None
        key = self._computed(source)
        forcing = self.found.setdefault(key, Forcing(len(self.found), [], {}, node.meta.get("site", ("", 0))))
        forcing.positions[str(node.target)] = position
        forcing.unread |= {(str(node.target), unread)} if unread is not None else set()
        forcing.reads += [read for read in reads if read not in forcing.reads]
        self.symbols.setdefault(forcing.number, []).extend(symbols)
        return forcing

    def _computed(self, node: Node) -> Any:
        """The same for nodes that compute the same of the same: a mask that is written out twice is one mask."""
        if node not in self._keys:
            plain = node.op == "call_function" and not any(isinstance(value, dict) for value in node.kwargs.values())
            if node.target is aten.alias.default:
                self._keys[node] = self._computed(node.args[0])  # type: ignore[arg-type]
            elif plain and is_pure(node):
                given = torch.fx.node.map_aggregate(
                    (node.args, node.kwargs), lambda a: self._computed(a) if isinstance(a, Node) else a
                )
                self._keys[node] = self._numbers.setdefault((str(node.target), repr(given)), len(self._numbers))
            else:
                self._keys[node] = node.name
        return self._keys[node]


def chosen(marks: Marks, graph: Graph, bound: Callable[[sympy.Basic], int | None]) -> list[Forcing]:
    """The forcings of a graph with the outcomes that are worth to be forced."""
    facts = marks.facts
    arms = {arm.branch: arm for node in graph.nodes for arm in node.meta.get("trips", ()) if isinstance(arm, BranchArm)}
    found = [forcing for forcing in marks.found.values() if forcing.reads]
    known = {(read.operator, read.place) for forcing in found for read in forcing.reads}
    for forcing in found:
        forcing.unread -= known  # type: ignore[operator]
        symbols = marks.symbols.get(forcing.number, [])
        following = {*symbols, *facts.depending_on(symbols)}
        own = [arm for arm in arms.values() if facts.resolve(arm.predicate).free_symbols & following]
        if symbols and forcing.reads[0].operator == str(ITEM):
            _scalar_outcomes(forcing, symbols, own, facts, bound)
        else:
            sized = next((_SIZED[read.operator] for read in forcing.reads if read.operator in _SIZED), _MASKED)
            forcing.kind, forcing.outcomes = "length", dict(sized)
    return found


def _scalar_outcomes(
    forcing: Forcing,
    symbols: Sequence[sympy.Symbol],
    arms: Iterable[BranchArm],
    facts: Facts,
    bound: Callable[[sympy.Basic], Any],
) -> None:
    present = facts.hints[symbols[0]]
    if isinstance(forcing.reads[0].value, bool):
        candidates: list[float] = [1 - present]
    else:
        computed = facts.depending_on(symbols)
        asked = [arm.predicate for arm in arms] + [
            d.condition for d in facts.assumptions if d.condition.free_symbols & {*symbols, *computed}
        ]
        asked += [operand for made in computed.values() for operand, _ in made.operands]
        limits = {float(n) if isinstance(present, float) else int(n) for c in asked for n in c.atoms(sympy.Number) if n.is_finite}
        candidates = [value for limit in sorted(limits) for value in (limit, limit + 1, limit - 1)] + [0, 1]
        largest = bound(symbols[0]) if isinstance(present, int) else None
        candidates += [largest] if largest is not None else []
    candidates = [value for value in dict.fromkeys(candidates) if value != present]
    flips = {value: _flipped(value, symbols, arms, facts) for value in candidates}
    forcing.kind = "branch" if any(flips.values()) else "length" if _is_size(symbols, facts) else "number"
    kept, seen = [], set[Branch]()
    for value in candidates:  # first those that take a branch the other way
        if set(flips[value]) - seen:
            kept.append(value)
            seen |= set(flips[value])
    most = max(LIMIT, len(kept))
    kept = list(dict.fromkeys([*kept, *[v for v in (0, 1, *candidates[-1:]) if v in candidates]]))
    forcing.capped = max(len(kept) - most, 0)
    for value in kept[:most]:
        forcing.outcomes[str(value)] = lambda tensor, value=value: torch.full_like(tensor, value)  # type: ignore[misc]
        forcing.branches[str(value)] = flips[value]


def _flipped(value: float, symbols: Sequence[sympy.Symbol], arms: Iterable[BranchArm], facts: Facts) -> list[Branch]:
    """The branches that go the other way if the symbols are ``value``, others being as in the eager run."""
    found = []
    for arm in arms:
        other = facts.resolve(arm.predicate).xreplace(facts.values_if(dict.fromkeys(symbols, value)))
        now, then = facts.hint(arm.predicate), facts.hint(other)
        if now is not None and then is not None and now != then:
            found.append(arm.site)
    return found


def _is_size(symbols: Sequence[sympy.Symbol], facts: Facts) -> bool:
    return any(set(symbols) & definition.free_symbols for definition in facts.replacements.values())


def copied(graph: Graph) -> Graph:
    """A copy of a graph whose nodes know their conditions by nodes of the copy."""
    made, places = Graph(), dict[Node, Node]()
    made.output(made.graph_copy(graph, places))
    for node in places.values():
        node.meta = _told(node.meta, lambda value: places.get(value, value))
    return made


def unmark(graph: Graph) -> None:
    """Take the marks out of a graph."""

    def behind(value: Node) -> Node:
        while value.target is read_here:
            value = value.args[0]  # type: ignore[assignment]
        return value

    marked = [node for node in graph.nodes if node.target is read_here]
    for node in graph.nodes if marked else ():
        node.meta = _told(node.meta, behind)
    for node in marked:
        node.replace_all_uses_with(behind(node))
        graph.erase_node(node)


def _told(meta: dict[str, Any], change: Callable[[Node], Node]) -> dict[str, Any]:
    """What is known of a node, with the nodes changed that it names."""
    made = dict(meta)
    if isinstance(meta.get("predicate"), Node):
        made["predicate"] = change(meta["predicate"])
    if meta.get("limits"):
        made["limits"] = {dim: change(limit) for dim, limit in meta["limits"].items()}
    return made


def _first(tensor: Tensor) -> Tensor:
    """Zeros but for the first element."""
    made = torch.zeros_like(tensor)
    made.view(-1)[:1] = 1
    return made


def _ramp(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape).to(tensor.dtype)


_MASKED: dict[str, Callable[[Tensor], Tensor]] = {"none": torch.zeros_like, "the first": _first, "all": torch.ones_like}
_SIZED: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    str(aten._unique2.default): {"all the same": torch.zeros_like, "all different": _ramp},
    str(aten.unique_consecutive.default): {"all the same": torch.zeros_like, "all different": _ramp},
}
_POSITIONS: dict[Any, int] = {
    ITEM: 0,
    aten.nonzero.default: 0,
    aten.masked_select.default: 1,
    aten.repeat_interleave.Tensor: 0,
    aten.bincount.default: 0,
    aten._unique2.default: 0,
    aten.unique_consecutive.default: 0,
}
