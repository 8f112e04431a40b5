"""The driver's calls that read and change nodes of graphs, through ctypes: the library is the one that torch has loaded."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, ClassVar

from graphs.recording.recorder import CannotPoint
from graphs.recording.vendor import Vendor, driver_library

_Size, _Address, _Unsigned = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint
_Fields = list[tuple[str, Any]]
_DIMENSIONS = [(f"{kind}Dim{axis}", _Unsigned) for kind in ("grid", "block") for axis in "XYZ"]


class CudaKernel(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS_v2``."""

    _fields_: ClassVar[_Fields] = [
        ("func", ctypes.c_void_p),
        *_DIMENSIONS,
        ("sharedMemBytes", _Unsigned),
        ("kernelParams", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("ctx", ctypes.c_void_p),
    ]


class HipKernel(ctypes.Structure):
    """``hipKernelNodeParams``."""

    _fields_: ClassVar[_Fields] = [
        *((f"blockDim{axis}", _Unsigned) for axis in "XYZ"),
        ("extra", ctypes.c_void_p),
        ("func", ctypes.c_void_p),
        *((f"gridDim{axis}", _Unsigned) for axis in "XYZ"),
        ("kernelParams", ctypes.c_void_p),
        ("sharedMemBytes", _Unsigned),
    ]


def _side(name: str) -> _Fields:
    places = [(f"{name}{part}", _Size) for part in ("XInBytes", "Y", "Z", "LOD")]
    memory = [(f"{name}MemoryType", _Unsigned), (f"{name}Host", ctypes.c_void_p), (f"{name}Device", _Address)]
    array = [(f"{name}Array", ctypes.c_void_p), (f"{name}Reserved", ctypes.c_void_p)]
    return [*places, *memory, *array, (f"{name}Pitch", _Size), (f"{name}Height", _Size)]


class CudaCopy(ctypes.Structure):
    """``CUDA_MEMCPY3D``."""

    _fields_: ClassVar[_Fields] = [*_side("src"), *_side("dst"), ("WidthInBytes", _Size), ("Height", _Size), ("Depth", _Size)]


class CudaFill(ctypes.Structure):
    """``CUDA_MEMSET_NODE_PARAMS``."""

    _fields_: ClassVar[_Fields] = [
        *(("dst", _Address), ("pitch", _Size), ("value", _Unsigned), ("elementSize", _Unsigned)),
        *(("width", _Size), ("height", _Size)),
    ]


class HipFill(ctypes.Structure):
    """``hipMemsetParams``."""

    _fields_: ClassVar[_Fields] = [
        *(("dst", _Address), ("elementSize", _Unsigned), ("height", _Size), ("pitch", _Size)),
        *(("value", _Unsigned), ("width", _Size)),
    ]


class DriverCalls:
    """What `graphs.recording.graph_nodes` asks of a driver.

    Args:
        vendor: whose driver.

    Raises:
        CannotPoint: its library lacks a call (``cuFuncGetParamInfo`` came with CUDA 12.4).
    """

    def __init__(self, vendor: Vendor) -> None:
        self._library, self._names = driver_library(vendor.libraries), dict(vendor.graph_calls)
        self._is_cuda = vendor.vendor == "cuda"
        self._sizes: dict[int, list[tuple[int, int]]] = {}
        missing = [name for name in self._names.values() if not hasattr(self._library, name)]
        if missing:
            raise CannotPoint(f"the driver has no {missing[0]}")

    def _call(self, what: str, *arguments: Any) -> None:
        status = self._status(what, *arguments)
        if status:
            raise CannotPoint(f"the driver's {self._names.get(what, what)} failed with status {status}")

    def _status(self, what: str, *arguments: Any) -> int:
        if what not in self._names:
            raise CannotPoint(f"nodes of this driver are not changed by {what}")
        return int(getattr(self._library, self._names[what])(*arguments))

    def nodes(self, graph: int) -> list[int]:
        """Handles of the nodes of a graph."""
        count = _Size()
        self._call("nodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
        handles = (ctypes.c_void_p * count.value)()
        self._call("nodes", ctypes.c_void_p(graph), handles, ctypes.byref(count))
        return [handle or 0 for handle in handles]

    def kind(self, node: int) -> int:
        """The kind of a node, as a number."""
        kind = ctypes.c_int()
        self._call("kind", ctypes.c_void_p(node), ctypes.byref(kind))
        return kind.value

    def _structure(self, what: str, structure: Any, node: int) -> Any:
        self._call(what, ctypes.c_void_p(node), ctypes.byref(structure))
        return structure

    def kernel(self, node: int) -> Any:
        """The parameters of a kernel node. What they point to belongs to the node."""
        return self._structure("kernel", CudaKernel() if self._is_cuda else HipKernel(), node)

    def copy(self, node: int) -> Any:
        """The parameters of a copy."""
        return self._structure("copy", CudaCopy(), node)

    def fill(self, node: int) -> Any:
        """The parameters of a fill."""
        return self._structure("fill", CudaFill() if self._is_cuda else HipFill(), node)

    def parameters(self, kernel: Any) -> list[tuple[int, int]]:
        """Offset and size of each parameter of a kernel, in bytes."""
        function, what = kernel.func, "function_parameter"
        if not function:
            function, what = getattr(kernel, "kern", None), "kernel_parameter"
        if function not in self._sizes:
            found: list[tuple[int, int]] = []
            offset, size = _Size(), _Size()
            while not (end := self._status(what, _pointer(function), _Size(len(found)), *map(ctypes.byref, (offset, size)))):
                found.append((offset.value, size.value))
            if end != _INVALID_VALUE:  # which says that there is no further one
                raise CannotPoint(f"the driver's {self._names[what]} failed with status {end}")
            self._sizes[function] = found
        return self._sizes[function]

    def set_kernel(self, executable: int, node: int, structure: Any) -> None:
        """Give a kernel of an instantiated graph other parameters."""
        self._call("set_kernel", _pointer(executable), _pointer(node), ctypes.byref(structure))

    def set_copy(self, executable: int, node: int, structure: Any) -> None:
        """Give a copy of an instantiated graph other ends."""
        self._call("set_copy", _pointer(executable), _pointer(node), ctypes.byref(structure), self._context())

    def set_fill(self, executable: int, node: int, structure: Any) -> None:
        """Give a fill of an instantiated graph another target."""
        context = (self._context(),) if self._is_cuda else ()
        self._call("set_fill", _pointer(executable), _pointer(node), ctypes.byref(structure), *context)

    def _context(self) -> Any:
        context = ctypes.c_void_p()
        self._call("context", ctypes.byref(context))
        return context


_pointer = ctypes.c_void_p
_INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE, hipErrorInvalidValue


@functools.cache
def driver_calls(vendor: Vendor) -> DriverCalls:
    """The calls of a vendor's driver, looked up once."""
    return DriverCalls(vendor)
