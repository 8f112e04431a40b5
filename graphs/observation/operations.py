"""What a watched run did: operators with their arguments, host reads, and what stands in the way of a recording."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

from graphs.errors import Refusal, Site
from graphs.observation.host_reads import HostRead
from graphs.state.tensor_state import TensorState
from passes.core.schema import written_values

Tensor = torch.Tensor


class TensorUse(NamedTuple):
    """A tensor as an operator was given it.

    ``origin`` is ``("argument", position)``, ``("operation", index)`` or ``("external", identity of its storage)``.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: str
    origin: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator call: constants by value, tensors as `TensorUse`, keywords as pairs after the positional arguments."""

    func: OpOverload
    arguments: tuple[Any, ...]
    frame: tuple[str, int]

    @property
    def site(self) -> Site:
        """The user's line that called the operator."""
        return Site.at(self.frame)

    def named(self) -> list[tuple[str, Any]]:
        """The arguments with their names; host data that becomes a tensor is called ``data``."""
        names = [argument.name for argument in self.func._schema.arguments]
        positional = [*names, "data"]
        return [
            value if type(value) is tuple and len(value) == 2 and value[0] in names else (positional[position], value)
            for position, value in enumerate(self.arguments)
        ]

    def written(self) -> list[TensorUse]:
        """The tensors that the operator wrote."""
        values = written_values(self.func, (), dict(self.named()))
        return [v for value in values for v in (value if type(value) is tuple else (value,)) if isinstance(v, TensorUse)]


@dataclass
class EagerTrace:
    """What one watched run did.

    Attributes:
        operations: the operators in order.
        findings: what cannot be recorded, in order, one per source line and operator.
        counts: how often each was met, by `Refusal.signature`.
        asked: the Python function of torch that was running when it was met first.
        reads: every value that the host got from a tensor, in order.
        externals: tensors that the step read without having been given or having made them: weights, buffers, caches.
        lent: those whose memory the host was given as an array of NumPy's, as they were then.
        written: externals and arguments that were written in place, saved before the first write.
        generators: generators named explicitly by an operator, with the states they had.
        origins: where each storage that was seen comes from, by its identity; see `TensorUse`.
        made_at: the lines that made each output and wrote each tensor, by what a mismatch calls them; filled by the trial.
        placed: tensors that the step did not make and of which its own code asked where they lie.
        imported_dynamo: whether the step did so: what it compiled was not run as it is written.
        storages: what keeps identities of storages that are gone from being those of new ones.
    """

    operations: list[Operation] = field(default_factory=list)
    findings: list[Refusal] = field(default_factory=list)
    counts: Counter[tuple[str, str, str, int]] = field(default_factory=Counter)
    asked: dict[tuple[str, str, str, int], str] = field(default_factory=dict)
    reads: list[HostRead] = field(default_factory=list)
    externals: dict[int, Tensor] = field(default_factory=dict)
    lent: TensorState = field(default_factory=TensorState)
    written: TensorState = field(default_factory=TensorState)
    generators: dict[torch.Generator, Tensor] = field(default_factory=dict)
    origins: dict[int, tuple[str, int]] = field(default_factory=dict)
    storages: list[StorageWeakRef] = field(default_factory=list)
    made_at: dict[str, Site] = field(default_factory=dict)
    placed: list[Tensor] = field(default_factory=list)
    imported_dynamo: bool = False

    def found(self, refusal: Refusal, asked: str = "") -> None:
        """Count a finding, and add it unless the same line has reported it."""
        if refusal.signature not in self.counts:
            self.findings.append(refusal)
            self.asked[refusal.signature] = asked
        self.counts[refusal.signature] += 1
