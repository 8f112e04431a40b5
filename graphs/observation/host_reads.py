"""What an operator call takes from the host or gives to it: host syncs, data-dependent sizes, host constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from graphs.errors import DataDependentShape, HiddenRead, HostConstant, HostSync, MixedDevices, Refusal, Site
from graphs.state.op_registry import refusal_of
from graphs.state.storage import tensors_in
from passes.core.modes.patched_functions import tensor_method

Tensor = torch.Tensor
aten = torch.ops.aten
TO_HOST = {
    tensor_method(name): name
    for name in "tolist numpy cpu to __array__ __repr__ __format__ __reduce_ex__ __deepcopy__ __dlpack__".split()  # noqa: SIM905
}
FROM_LISTS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_ASKED = "data_ptr const_data_ptr storage_offset untyped_storage storage _typed_storage _is_view is_shared is_pinned is_set_to"
_LOOKED_AT = "_version _base _cdata is_leaf grad_fn grad output_nr retains_grad _backward_hooks __cuda_array_interface__"
OF_THE_OBJECT: dict[Any, str] = {
    **{tensor_method(name): name for name in _ASKED.split() if hasattr(Tensor, name)},
    **{tensor_method(name).__get__: name for name in _LOOKED_AT.split()},
}
"""What a tensor answers as this one object in this one memory: copies, and tensors of later calls, answer otherwise."""
_MASKED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
_ALONG = (aten.unique_dim.default,)
_READS = (aten._local_scalar_dense.default, aten.equal.default, aten._linalg_check_errors.default)
GROUPED = aten._grouped_mm.default
SPLITS = frozenset((torch.tensor_split, Tensor.tensor_split))
"""Functions that read the tensor of boundaries they are given, above any operator."""
_READ_INSIDE = frozenset(
    (
        *(aten._pack_padded_sequence.default, aten._pad_packed_sequence.default),
        *(aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data),
        *(aten.ctc_loss.Tensor, aten._ctc_loss.Tensor, aten.tensor_split.tensor_indices_or_sections),
        *(aten.quantize_per_tensor.tensor_qparams, aten.quantize_per_tensor.tensors),
    )
)
"""Operators whose kernels read lengths, sizes or scales on the host."""
_COPIES = (aten._to_copy.default, aten.copy_.default)
FILLS = (aten.masked_fill.Tensor, aten.masked_fill_.Tensor)
"""On a GPU the host reads the 0-d tensor."""


@dataclass(frozen=True, slots=True)
class HostRead:
    """One value that the host got from a tensor.

    Attributes:
        operator: what was called: ``aten._local_scalar_dense.default``, ``Tensor.tolist``.
        function: name of the Python function of torch that asked: ``item``, ``__bool__``, ``__getitem__``, ``nonzero``.
        frame: file and line of the user's program.
        value: the number or flag; the list of ``tolist``; the data-dependent size of ``nonzero`` and its like, one read for
            each mask that indexes; None for conversions of another kind (``numpy``, ``cpu``, printing).
        index: number of operators that had run before: for a value read by an operator, its place in `Trace.operations`.
        place: what of the user's program asked, as in `passes.Place`.
        turn: how often the operator had run there before.
        source: the operator that made the tensor, where the step did that and its one number was read.
    """

    operator: str
    function: str
    frame: tuple[str, int]
    value: Any
    index: int
    place: Any = None
    turn: int = 0
    source: str = ""

    @property
    def site(self) -> Site:
        """The user's line that asked for the value."""
        return Site.at(self.frame)


def leaves_the_device(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of a function in `TO_HOST` makes a host object: ``to("cpu")`` does on every device, ``to(other)`` not."""
    if not args or not isinstance(args[0], Tensor):
        return False
    if func is Tensor.to:
        return "cpu" in (*(value for value in args[1:] if isinstance(value, str)), kwargs.get("device"))
    return func is not Tensor.__format__ or args[0].dim() > 0  # a single number is formatted through item()


@functools.cache
def _reads_a_value(func: OpOverload) -> bool:
    return func in _READS or (torch.Tag.data_dependent_output in func.tags and bool(func._schema.returns))


@functools.cache
def _may_be_sized_by_data(func: OpOverload) -> bool:
    return torch.Tag.dynamic_output_shape in func.tags


@functools.cache
def _is_plain(func: OpOverload) -> bool:
    """Whether nothing about the values that an operator is given concerns the host, only where they lie."""
    reads = _reads_a_value(func) or _may_be_sized_by_data(func) or func in _READ_INSIDE
    return not reads and func not in (*FILLS, *_MASKED, GROUPED, aten.lift_fresh.default)


def _sized_by_data(func: OpOverload, kwargs: Any) -> bool:
    """Whether a result's size depends on data; a caller of ``repeat_interleave`` may have given it."""
    return _may_be_sized_by_data(func) and kwargs.get("output_size") is None


@functools.cache
def may_read(func: OpOverload) -> bool:
    """Whether the host may learn something from calls of an operator; see `values_read`."""
    return _reads_a_value(func) or func in (*FILLS, *_MASKED, *_COPIES) or _may_be_sized_by_data(func)


def values_read(func: OpOverload, args: Any, kwargs: Any, result: Any) -> list[Any]:
    """What the host learns from an operator call: a number or flag, or sizes that depend on data."""
    if not may_read(func):
        return []
    if _reads_a_value(func):
        return [result]
    if func in FILLS and args[2].device == args[0].device:
        return [args[2].item()]
    if func in _MASKED:
        return [int(mask.count_nonzero()) for mask in tensors_in(args[1]) if mask.dtype in (torch.bool, torch.uint8)]
    if _sized_by_data(func, kwargs):
        return [tensors_in(result)[0].shape[args[1] if func in _ALONG else 0]]
    if func in _COPIES and _device_finding(func, args, kwargs, tensors_in(args)) is _fetched:
        return [None]
    return []


def finding(
    func: OpOverload, args: Any, kwargs: Any, tensors: list[Tensor], function: list[Any]
) -> Callable[..., Refusal] | None:
    """The class and text of what is wrong with an operator call, or None."""
    return refusal_of(func, tensors) or host_finding(func, args, kwargs, tensors, function)


def host_finding(
    func: OpOverload, args: Any, kwargs: Any, tensors: list[Tensor], function: list[Any]
) -> Callable[..., Refusal] | None:
    """The same, whatever the operator is registered as."""
    if _is_plain(func):
        return _device_finding(func, args, kwargs, tensors)
    if func in _READ_INSIDE:
        return _with(HiddenRead, "the operator reads lengths or sizes from a tensor, on the host")
    if _reads_a_value(func):
        return _with(HostSync, "the host waits for a value of a tensor")
    if func in FILLS and args[2].device == args[0].device:
        return _with(HostSync, "the host reads the number that a mask is filled with")
    if func is GROUPED and args[0].dtype != torch.bfloat16 and (len(args) > 2 or kwargs.get("offs") is not None):
        return _with(HostSync, "on a GPU the host reads the offsets of the groups, for any dtype but bfloat16")
    if func in _MASKED:
        masks = [t for t in tensors_in(args[1]) if t.dtype in (torch.bool, torch.uint8)]
        return _with(DataDependentShape, "indexing with a boolean mask counts its true elements on the host") if masks else None
    if _sized_by_data(func, kwargs):
        return _with(DataDependentShape, "the size of the result depends on the data")
    if func is aten.lift_fresh.default:
        if function and getattr(function[-1], "__name__", "") == "__setitem__":
            return None  # a Python number written to an element: a kernel argument, not an upload
        return _with(HostConstant, "a tensor is made from host data")
    return _device_finding(func, args, kwargs, tensors)


def _device_finding(func: OpOverload, args: Any, kwargs: Any, tensors: list[Tensor]) -> Callable[..., Refusal] | None:
    kinds = {device.type for device in {tensor.device for tensor in tensors}}
    if func is aten._to_copy.default and kwargs.get("device") is not None:
        kinds.add(torch.device(kwargs["device"]).type)
    if len(kinds) == 1 or not kinds:
        return None
    if func in _COPIES:
        source = args[0] if func is aten._to_copy.default else args[1]
        if source.device.type == "cpu":
            return _with(HostConstant, "a host tensor is copied to the device")
        return _fetched
    return _with(MixedDevices, "an operator mixes a host tensor with device tensors: its value would be frozen")


def _with(kind: type[Refusal], detail: str) -> Callable[..., Refusal]:
    return lambda **where: kind(detail, **where)


_fetched = _with(HostSync, "a device tensor is copied to the host")
