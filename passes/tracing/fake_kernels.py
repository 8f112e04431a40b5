"""Fake tensors for tracing a step, where torch's own fake kernels refuse what its kernels take."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any

import torch

from passes.core.symbols import SYMBOLS
from passes.tracing.torch_symbols import FakeTensorMode, ShapeEnv

Tensor = torch.Tensor


class StepFakes(FakeTensorMode):
    """A fake mode in which a grouped product may have any floating dtype: torch's fake one knows bfloat16 alone.

    Results whose sizes depend on symbols are not kept for later calls of the same operator: the symbols of one trace hardly
    meet again, and to keep such a result takes as long as to make it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of ``func``, without data."""
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            with self:
                return grouped_result(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _cached_dispatch_impl(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if _has_symbols(args) or _has_symbols(kwargs.values()):
            return self._dispatch_impl(func, types, args, kwargs)
        return super()._cached_dispatch_impl(func, types, args, kwargs)


@functools.cache
def outlive_first_thread() -> None:
    """Have the thread that enters a fake mode first never end.

    In torch 2.11 a process ends with a segmentation fault that enters one on a thread after the first one that did so has ended.
    The main thread does not end; where another one comes first, a thread of our own goes before it, and waits.
    """
    if threading.current_thread() is threading.main_thread():
        return
    entered = threading.Event()

    def stay() -> None:
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            mode.from_tensor(torch.ones(1))
        entered.set()
        threading.Event().wait()

    threading.Thread(target=stay, name="graphs-fake-mode", daemon=True).start()
    entered.wait()


def _has_symbols(values: Iterable[Any]) -> bool:
    """Whether any argument is a symbol, or a tensor whose shape or layout has one."""
    return any(
        value._has_symbolic_sizes_strides
        if isinstance(value, Tensor)
        else isinstance(value, SYMBOLS) or (isinstance(value, (list, tuple)) and _has_symbols(value))
        for value in values
    )


def grouped_result(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """An empty result of ``_grouped_mm``: rows begin at multiples of 16 bytes, as the kernels have it."""
    groups = [] if offs is None or a.dim() != b.dim() else [offs.shape[0]]
    batch = [a.shape[0]] if a.dim() == b.dim() == 3 else groups
    shape = [*batch, a.shape[-2], b.shape[-1]]
    dtype = out_dtype or a.dtype
    step = 16 // dtype.itemsize
    width = -(-shape[-1] // step) * step
    strides = [shape[-2] * width, width, 1][-len(shape) :]
    return torch.empty_strided(shape, strides, dtype=dtype, device=a.device)
