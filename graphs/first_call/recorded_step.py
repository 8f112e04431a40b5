"""A recording with everything a replay needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphs.contract.outputs.template import OutputTemplate
from graphs.contract.slots import Contract
from graphs.contract.static_tensors import StaticTensors
from graphs.errors import Refusal
from graphs.guards.python_guards import Guards
from graphs.numerics.tolerance import OTHER_KERNELS
from graphs.observation.timing import CallTime
from graphs.recording.recorder import Recording
from graphs.rehearsal.tried_step import TriedStep
from graphs.rewriting.checked_replay import CheckedReplay
from graphs.rewriting.proof import Proof
from graphs.state.tensor_state import TensorState

Tensor = torch.Tensor


@dataclass
class Variants:
    """The recordings of one key.

    Attributes:
        variants: each for other outcomes of what the step decides by host values; the last used first.
        broken: calls that none of them could serve, since there were as many as are recorded.
        refusals: why another variant cannot be recorded, once that was found.
        unmerged: branches that could not become part of the first recording; the others are spared the attempt.
    """

    variants: list[RecordedStep]
    broken: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    unmerged: dict[tuple[str, int, int], str] = field(default_factory=dict)


@dataclass
class RecordedStep:
    """A recording with everything a replay needs.

    Attributes:
        guards: the Python values that the step reads, compared with the present at every call.
        opaques: weak references to the opaque arguments it was recorded with.
        externals: tensors read in place that are not arguments.
        written: the tensors that the step writes in place.
        sentinels: padding rows that padded calls may write to.
        replays, real_rows: calls served and the rows they had.
        used: when it was last found for a call that is not like the one before, or made: a number that grows.
        ahead: whether it was recorded ahead of the calls.
        candidate: what was recorded in the model's place; it owns constants that the recording reads.
        compiler: what compiled the step, or ``"none"``.
        compile_seconds: what compiling took, of ``capture_seconds``.
        rewrites: how often each pass changed the graph that was compiled; see `graphs.report.KeyReport`.
        candidates: microseconds of one replay by compiler, where more than one was measured.
        uploads: host tensors that the recording holds copies of.
        checked: the recording, where it assumes something of host values; None where it holds for any.
        proof: what removed host values were compared for besides the data of the call.
        group: the recordings of the key.
        catches: whether the step may catch what one of its operators raises in a replay: then the replay is undone.
        on_device: whether replays are launched on a GPU.
        generators: those that the step names, where it draws random numbers; None where it draws none.
        asks_memory: whether the step's code asks where tensors of its own lie.
        bumped, bumped_arguments: the step's own tensors, and positions of arguments, that replays write where they are: autograd
            is told so.
        left_open: whether no padding was compared yet, since the step was recorded of rows that are padding themselves.
        tried: the step as it was tried as a whole, at this size or at another one.
        from_host: whether some arguments are host tensors, of which the recording has copies.
        recorded: address and bytes of the memory that is used in place, as it was recorded.
        storages: that memory as it is for this step; None where the recording is never pointed at other memory.
        blueprint: the recording without the tensors it uses in place; see `graphs.pointing.blueprint`.
        replaced: see `graphs.rehearsal.step.Step`; runs that are undone undo what is kept there.
        not_compiled: why the step was recorded uncompiled although a compiler was asked for.
    """

    recording: Recording
    contract: Contract
    template: OutputTemplate
    statics: StaticTensors
    opaques: list[Callable[[], Any]]
    externals: list[Tensor]
    written: TensorState
    key: str
    device_free_delta: int = 0
    eager: CallTime | None = None
    replay: CallTime | None = None
    capture_seconds: float = 0.0
    replays: int = 0
    real_rows: int = 0
    used: int = 0
    ahead: bool = False
    candidate: Any = None
    compiler: str = "none"
    compile_seconds: float = 0.0
    rewrites: dict[str, int] = field(default_factory=dict)
    candidates: dict[str, float] = field(default_factory=dict)
    catches: bool = False
    not_compiled: Refusal | None = None
    checked: CheckedReplay | None = None
    uploads: list[Tensor] = field(default_factory=list)
    guards: Guards = field(default_factory=lambda: Guards((), ()))
    proof: Proof = field(default_factory=Proof)
    group: Variants = field(default_factory=lambda: Variants([]))
    on_device: bool = False
    generators: list[torch.Generator] | None = None
    bumped: list[Tensor] = field(default_factory=list)
    bumped_arguments: list[int] = field(default_factory=list)
    from_host: bool = False
    asks_memory: bool = False
    left_open: bool = False
    recorded: Sequence[tuple[int, int]] = ()
    storages: Sequence[torch.UntypedStorage] | None = None
    blueprint: Any = None
    tried: TriedStep | None = None
    replaced: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.group = Variants([self])

    def point(self) -> None:
        """Have the recording, which others may share, use the memory of this step.

        Raises:
            CannotPoint: it does not let itself be pointed.
        """
        if self.storages is not None and self.recording.at is not self.storages:
            self.recording.point(self.recorded, self.storages)

    @property
    def memory_bytes(self) -> int:
        """Memory that the recording takes.

        On a device that of its pool, or what the device lost meanwhile, where that is more: the driver's own is included, and
        what other processes took.
        """
        if self.on_device:
            return max(self.recording.pool_bytes, self.device_free_delta, self.contract.nbytes)
        return self.recording.pool_bytes + self.contract.nbytes

    @property
    def rounds_otherwise(self) -> bool:
        """Whether other kernels run than in eager, or the same at another size, which sum in another order.

        A kernel takes the number in a 0-d host tensor as it is, and casts one on the device to the dtype that it computes in.
        """
        return self.candidate is not None or self.contract.rows is not None or self.from_host

    @property
    def tolerance_factor(self) -> float:
        """Factor on the tolerance between eager and a replay where no run in float64 can tell what rounding does."""
        return OTHER_KERNELS if self.candidate is not None else 1.0

    @property
    def sentinels(self) -> list[int]:
        """Rows that padding may write to."""
        return [int(slot.padding.value) for slot in self.contract.slots if slot.padding.kind == "sentinel"]


def reference_to(opaque: Any) -> Callable[[], Any]:
    """A weak reference where the object allows one, so that a recording does not keep a cache alive."""
    try:
        return weakref.ref(opaque)
    except TypeError:
        return lambda: opaque


def sliced(tensors: Sequence[Tensor], dims: Sequence[int | None], rows: int) -> list[Tensor]:
    """Outputs at recorded size cut to their real rows."""
    return [t if dim is None else t.narrow(dim, 0, rows) for t, dim in zip(tensors, dims, strict=True)]
