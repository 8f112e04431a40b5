"""Launching a compiled Triton kernel as clusters of thread blocks, which Triton itself does only for tensors laid out over them.

The kernel is an ordinary one of single blocks that speaks to its cluster in PTX. The launch goes to the driver directly
(``cuLaunchKernelEx``), on torch's current stream, so that it is recorded by whatever records that stream.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("attribute_count", ctypes.c_uint),
    )  # fmt: skip


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def launch(compiled: Any, grid: tuple[int, int, int], cluster: int, arguments: Sequence[Tensor | int]) -> None:
    """Launch ``compiled`` on the current stream.

    Args:
        compiled: a kernel that `triton.compile` made, loaded on the current device.
        grid: in blocks; its first number is a multiple of ``cluster``.
        cluster: blocks of a cluster, along the first dimension of the grid.
        arguments: tensors, and numbers for arguments of 32 bits, in the order of the kernel's.

    Raises:
        RuntimeError: the driver refused the launch.
    """
    values = [
        ctypes.c_uint64(argument.data_ptr()) if isinstance(argument, Tensor) else ctypes.c_int32(argument)
        for argument in arguments
    ]
    values += [ctypes.c_uint64(0)] * 2  # Triton's scratch memory, of which these kernels have none
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values))
    attribute = _Attribute(_CLUSTER_DIMENSION)
    attribute.value[:3] = (cluster, 1, 1)
    metadata = compiled.metadata
    config = _Config(
        grid,
        (32 * metadata.num_warps, 1, 1),
        metadata.shared,
        torch.cuda.current_stream().cuda_stream,
        ctypes.pointer(attribute),
        1,
    )
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(compiled.function), pointers, None)
    if status:
        raise RuntimeError(f"cuLaunchKernelEx returned {status} for {metadata.name}, grid {grid} in clusters of {cluster}")
