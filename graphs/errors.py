"""The catalogue: every error this project raises and every reason a step is not recorded.

A refusal is an exception object used as a value. The capture path builds one, counts it, warns once and runs the
call eagerly; with ``strict=True`` it raises the same object. Each names the operator, the user's source line and what
to change, and its message ends in the remedy.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class GraphsError(Exception):
    """Base class of every error raised on purpose by this project."""


class ConfigError(GraphsError, ValueError):
    """A setting, argument or ``GRAPHS_*`` variable has a value that is not legal."""

    def __init__(self, name: str, value: object, legal: Iterable[object] | str) -> None:
        choices = legal if isinstance(legal, str) else "one of " + ", ".join(repr(v) for v in legal)
        super().__init__(f"{name} = {value!r} is not legal; it must be {choices}.")
        self.name, self.value = name, value


class WritesError(ConfigError):
    """What the ``writes`` of `graphs.register_op` says of a call of its operator tells no rows of an argument."""


class WeightError(GraphsError, ValueError):
    """A weight, scale or activation of a grouped projection has the wrong shape, dtype, device or values."""


class MissingDependency(GraphsError, ImportError):
    """An optional package is needed and absent; the message says what to install."""

    def __init__(self, package: str, needed_for: str, install: str) -> None:
        super().__init__(f"{needed_for} needs the package {package!r}, which cannot be imported here. Install it with: {install}")
        self.package = package


class FactoryError(GraphsError, ValueError):
    """``package.module:factory``, as named on the command line, does not lead to a model and its arguments."""

    def __init__(self, spec: str, detail: str, remedy: str) -> None:
        super().__init__(f"cannot use {spec!r}: {detail}. Remedy: {remedy}")
        self.spec = spec


@dataclass(frozen=True, slots=True)
class Site:
    """A line of the user's program. ``file`` is empty where no Python frame is known."""

    file: str = ""
    line: int = 0
    source: str = ""

    @classmethod
    def at(cls, frame: tuple[str, int]) -> Site:
        """The line of a file, with its text where the file can be read."""
        return cls(*frame, linecache.getline(*frame).strip())

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "an unknown line"


class Refusal(GraphsError):
    """Why a step is not recorded.

    Attributes:
        reason: stable slug of the class of failure, for counting and for tests.
        operator: the operator or value at fault, for example ``aten._local_scalar_dense``.
        site: the user's source line.
        detail: what was seen.
        remedy: what to change.
    """

    reason = "refused"
    remedy = ""

    def __init__(self, detail: str, *, operator: str = "", site: Site | None = None, remedy: str | None = None) -> None:
        self.detail = detail
        self.operator = operator
        self.site = site or Site()
        if remedy is not None:
            self.remedy = remedy
        where = f" at {self.site}" if self.site.file else ""
        quoted = f"\n    {self.site.source}" if self.site.source else ""
        named = f" [{operator}]" if operator else ""
        super().__init__(f"{self.reason}{where}{named}: {detail}{quoted}\n  Remedy: {self.remedy}")

    @property
    def signature(self) -> tuple[str, str, str, int]:
        """What makes two refusals the same one for counting: reason, operator, file and line."""
        return self.reason, self.operator, self.site.file, self.site.line


class HostSync(Refusal):
    """The step turns a device value into a Python value, or waits for one."""

    reason = "host-sync"
    remedy = (
        "keep the value on the device (index with the tensor, torch.where), or pass what the host already knows as an argument"
    )


class DataDependentShape(Refusal):
    """An operator whose output shape depends on data."""

    reason = "data-dependent-shape"
    remedy = "give the result a static size and a mask, for example torch.nonzero_static(x, size=bound)"


class HostConstant(Refusal):
    """A tensor is built from host data inside the step: an upload that a device graph cannot hold."""

    reason = "host-constant"
    remedy = "build the tensor once, outside the step (a buffer), or pass it as an argument"


class ChangingValue(Refusal):
    """A Python value that differs between two consecutive steps would be frozen by a recording."""

    reason = "changing-value"
    remedy = "keep the value in a tensor that the step updates in place, or pass it as an argument"


class UnguardedRead(Refusal):
    """The step reads something that no later call can be compared with: a clock, a file, a seed it sets itself."""

    reason = "unguarded-read"
    remedy = "read it outside the step and pass it as an argument; seed generators before the step"


class HiddenRead(Refusal):
    """An operator reads a tensor on the host inside its own code, where no dispatcher sees it."""

    reason = "hidden-read"
    remedy = "pass these sizes or lengths as Python numbers: they become part of the key"


class SideEffect(Refusal):
    """The step does something outside of its tensors and objects, which a replay would leave out."""

    reason = "side-effect"
    remedy = "return what has to be written, and write it outside the step"


class ManyWays(Refusal):
    """The step decides by host values in more ways than are recorded."""

    reason = "many-ways"
    remedy = "decide on the device (torch.where, masks), or pass what decides as an argument: it becomes part of the key"


class MovedStaticTensor(Refusal):
    """A tensor that a recording reads in place is no longer where it was."""

    reason = "moved-static-tensor"
    remedy = "update weights and caches in place (copy_), or call invalidate() on the captured module after replacing them"


class MixedDevices(Refusal):
    """Tensor arguments live on more than one device, and are no small host tensors that a recording takes in."""

    reason = "mixed-devices"
    remedy = "move every tensor argument to the device of the model before the call, but for small host tensors"


class AutogradInput(Refusal):
    """Gradients are being recorded for this call."""

    reason = "autograd"
    remedy = "call the step under torch.no_grad() or torch.inference_mode(), or detach its inputs and parameters"


class UnsupportedArgument(Refusal):
    """An argument can neither be a slot nor a part of a key."""

    reason = "unsupported-argument"
    remedy = "pass tensors, numbers, strings, or containers of them"


class UnsupportedOutput(Refusal):
    """The step returns something that a replay cannot produce."""

    reason = "unsupported-output"
    remedy = "return tensors, or containers of tensors and constants"


class OpaqueKernel(Refusal):
    """A kernel was launched that no operator schema describes, so what it writes is unknown."""

    reason = "opaque-kernel"
    remedy = "register the kernel with torch.library.custom_op or triton_op, naming what it mutates"


class UndeclaredWrite(Refusal):
    """A tensor changed during the step though no operator's schema says that it writes it."""

    reason = "undeclared-write"
    remedy = "name what the operator writes: mutates_args= of torch.library.custom_op, or (a!) in its schema"


class HiddenState(Refusal):
    """An operator whose result or effect depends on more than its arguments."""

    reason = "hidden-state"
    remedy = "pass what it remembers as a tensor argument, named in mutates_args, and keep nothing from one call to the next"


class UnsafeOperator(Refusal):
    """An operator that its author has registered as one that no recording may hold."""

    reason = "unsafe-operator"
    remedy = "use another operator in this step, or change it until graphs.capture_check passes and register it as graph_safe"


class UnsupportedOperator(Refusal):
    """An operator that this recorder cannot replay."""

    reason = "unsupported-operator"
    remedy = "move the operator out of the step, or run this step in eager mode"


class CaptureFailed(Refusal):
    """The device refused the recording."""

    reason = "capture-failed"
    remedy = "move what the device refuses (the message holds the driver's words) out of the step, or run the step eagerly"


class CompileFailed(Refusal):
    """A step, or a part of it, that ``torch.compile`` cannot compile."""

    reason = "compile-failed"
    remedy = (
        "change the line named here, call torch.compile on the model alone for the whole story, or capture with compiler='none'"
    )


class VerifyMismatch(Refusal):
    """The first replay of a recording disagreed with eager on the same inputs and state."""

    reason = "verify-mismatch"
    remedy = "look for an operator without a schema, or hidden state; the recording was dropped and this key runs eagerly"


class AboveLargestBucket(Refusal):
    """A batch larger than every bucket."""

    reason = "above-largest-bucket"
    remedy = "add a larger bucket, or split the batch"


class TooManyKeys(Refusal):
    """More distinct keys than ``max_recordings`` allows: the one used least recently is dropped, or the new one waits."""

    reason = "too-many-keys"
    remedy = "declare buckets=, pass changing numbers as tensors, or raise max_recordings"


class OverBudget(Refusal):
    """A recording that needs more device memory than ``memory_budget`` leaves."""

    reason = "memory-budget"
    remedy = "raise memory_budget, record fewer or smaller sizes, or free memory of the device first"


class RowsInteract(Refusal):
    """Padding a batch would change its real rows, so the step is recorded at exact sizes instead."""

    reason = "rows-interact"
    remedy = (
        "nothing has to change; to pad anyway, make rows independent, or give index inputs padding={name: graphs.sentinel(row)}"
    )

    def __init__(self, detail: str, *, unproved: bool = False) -> None:
        super().__init__(detail, operator="padding")
        self.unproved = unproved
        """True where this call could prove nothing; a later one with other data may."""


class ActiveMode(Refusal):
    """The call is made inside a mode or a transform of the caller's, which a replay would hide its operators from."""

    reason = "active-mode"
    remedy = (
        "call the step outside of the mode (in torch.func, call the model itself), "
        "or set graphs_observer = True on the class of a mode that changes nothing"
    )


class UnsupportedTensor(Refusal):
    """A tensor in the step that is no dense memory of its own: sparse, nested, of MKLDNN, or a wrapper of other tensors."""

    reason = "unsupported-tensor"
    remedy = "make it dense before the step (to_dense(), the tensors that a wrapper holds), or leave what uses it out of the step"


class Scripted(Refusal):
    """A module of TorchScript, whose attributes are kept where Python cannot see them change."""

    reason = "torchscript"
    remedy = "capture the module that was scripted or traced, in place of what torch.jit made of it"


class Collective(Refusal):
    """A collective of ``torch.distributed`` that is waited for outside of any operator."""

    reason = "collective"
    remedy = (
        "use the functional collectives (torch.distributed._functional_collectives), which return tensors and wait as operators, "
        "or leave the collective out of the step"
    )


class Unwatchable(Refusal):
    """The step raises while its operators are watched, and does not otherwise."""

    reason = "unwatchable"
    remedy = "leave what raises out of the step: it does something that PyTorch does not support under a TorchDispatchMode"


class StepRaises(Refusal):
    """An operator refuses what this call gives it: eager raises, or the step catches what is raised."""

    reason = "step-raises"
    remedy = (
        "nothing has to change if the step is meant to raise here; what it catches is better told beforehand, with torch.where"
    )


class HigherOrder(Refusal):
    """An operator that takes functions (``torch.cond``, ``scan``, ``flex_attention``), which no schema describes."""

    reason = "higher-order-operator"
    remedy = (
        "write it with operators (torch.where for torch.cond, scaled_dot_product_attention for flex_attention), or compile the "
        "step with backend='graphs'"
    )


class InternalError(Refusal):
    """Something in this project raised; the step itself ran eagerly.

    Attributes:
        error: what was raised.
    """

    reason = "internal-error"
    remedy = "nothing in the step has to change; please report this, with the traceback that the report shows"

    def __init__(self, detail: str, *, error: BaseException | None = None, **where: Any) -> None:
        super().__init__(detail, **where)
        self.error = error


class NestedCapture(Refusal):
    """The call happens while another graph is being recorded on the current stream."""

    reason = "nested-capture"
    remedy = "record either the whole program or the step, not one inside the other"
