"""Where CUDA and HIP differ for a recorder: one frozen object, chosen once; nothing else asks for the vendor."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from dataclasses import dataclass

import torch

_CUDA_GRAPH_CALLS = (
    ("nodes", "cuGraphGetNodes"),
    ("kind", "cuGraphNodeGetType"),
    ("kernel", "cuGraphKernelNodeGetParams_v2"),
    ("copy", "cuGraphMemcpyNodeGetParams"),
    ("fill", "cuGraphMemsetNodeGetParams"),
    ("function_parameter", "cuFuncGetParamInfo"),
    ("kernel_parameter", "cuKernelGetParamInfo"),
    ("set_kernel", "cuGraphExecKernelNodeSetParams_v2"),
    ("set_copy", "cuGraphExecMemcpyNodeSetParams"),
    ("set_fill", "cuGraphExecMemsetNodeSetParams"),
    ("context", "cuCtxGetCurrent"),
)
_HIP_GRAPH_CALLS = (  # none for copies: HIP tells of them in another form
    ("nodes", "hipGraphGetNodes"),
    ("kind", "hipGraphNodeGetType"),
    ("kernel", "hipGraphKernelNodeGetParams"),
    ("fill", "hipGraphMemsetNodeGetParams"),
    ("function_parameter", "hipKernelGetParamInfo"),
    ("set_kernel", "hipGraphExecKernelNodeSetParams"),
    ("set_fill", "hipGraphExecMemsetNodeSetParams"),
)


@dataclass(frozen=True)
class Vendor:
    """How a vendor's graphs are recorded.

    Attributes:
        vendor: ``"cuda"`` or ``"hip"``, for reports.
        capture_error_mode: which other threads' calls may break a capture. Thread-local on both: the watchdogs of
            NCCL and RCCL poll events while a step is recorded.
        poll_capture: ask the stream whether it is still capturing before ending a capture. HIP before ROCm 7.14
            invalidates a capture without an error at the call that broke it.
        libraries: names of the driver's library, the first that can be loaded is used.
        driver: its symbols that begin a stream capture, ``int (stream, mode)``, and create a stream, ``int (stream*,
            flags)``; see `begin_empty_capture` and `create_stream`.
        graph_calls: what reads and changes nodes of instantiated graphs, by what `graphs.recording.driver_calls` calls it.
        refused_operators: operators that record and then fault on a later replay, with the reason.
        bytes_per_graph: driver memory outside the pool, per graph; 0 where it is not known.
    """

    vendor: str
    capture_error_mode: str = "thread_local"
    poll_capture: bool = False
    libraries: tuple[str, ...] = ("libcuda.so.1",)
    driver: tuple[str, str] = ("cuStreamBeginCapture_v2", "cuStreamCreate")
    graph_calls: tuple[tuple[str, str], ...] = _CUDA_GRAPH_CALLS
    refused_operators: tuple[tuple[str, str], ...] = ()
    bytes_per_graph: int = 0

    def refuses(self, operator: str) -> str | None:
        """Why ``operator`` (``aten.topk.default``) cannot be recorded, or None."""
        return next((why for name, why in self.refused_operators if operator.startswith(name)), None)

    def begin_empty_capture(self, stream: int) -> None:
        """Begin a capture on a raw stream, behind torch's back.

        ``CUDAGraph.capture_end`` tells the allocators and the random generators that the capture is over only if the
        driver ends it without an error. After the driver has dropped a capture there is nothing to end: an empty one
        lets ``capture_end`` do all its work (torch 2.11 to 2.15).
        """
        self._call(self.driver[0], ctypes.c_void_p(stream), ctypes.c_int(_THREAD_LOCAL))

    def create_stream(self) -> int:
        """A raw stream that nobody else has, never destroyed.

        Torch hands out 32 streams in turn, so one of its streams may have been used before, and then the BLAS library
        has a workspace for it in ordinary memory. A recorded GEMM writes there for as long as its graph lives, but
        whoever clears the workspaces (``torch.compile(mode="reduce-overhead")`` does) frees that memory to others.
        The first use of a new stream is a warm-up, and its workspace comes from the recorder's own pool.
        """
        stream = ctypes.c_void_p()
        self._call(self.driver[1], ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        assert stream.value is not None
        return stream.value

    def _call(self, symbol: str, *arguments: object) -> None:
        status = getattr(driver_library(self.libraries), symbol)(*arguments)
        if status != 0:
            raise RuntimeError(f"the driver's {symbol} failed with status {status}")


@functools.cache
def driver_library(libraries: tuple[str, ...]) -> ctypes.CDLL:
    """The first of ``libraries`` that can be loaded; torch has loaded it already."""
    errors = []
    for name in libraries:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
    raise RuntimeError("the driver's library cannot be loaded: " + "; ".join(errors))


_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal, hipStreamCaptureModeThreadLocal
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, hipStreamNonBlocking

CUDA = Vendor("cuda")
HIP = Vendor(
    "hip",
    poll_capture=True,
    libraries=("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"),
    driver=("hipStreamBeginCapture", "hipStreamCreateWithFlags"),
    graph_calls=_HIP_GRAPH_CALLS,
    refused_operators=(("aten.topk", "topk inside a HIP graph faults on its second replay with torch >= 2.13"),),
    bytes_per_graph=4 << 20,
)


def choose_vendor(hip: str | None, has_faulting_topk: bool) -> Vendor:
    """The vendor of a build of torch.

    Args:
        hip: ``torch.version.hip``.
        has_faulting_topk: whether this build carries the sort that faults; see `HIP`.
    """
    if hip is None:
        return CUDA
    return HIP if has_faulting_topk else dataclasses.replace(HIP, refused_operators=())


@functools.cache
def current_vendor() -> Vendor:
    """The vendor of this process's torch. The faulting ``topk`` arrived with ``check_input_liveness``, which is probed for."""
    has_faulting_topk = "check_input_liveness" in (torch.cuda.CUDAGraph.capture_begin.__doc__ or "")
    return choose_vendor(torch.version.hip, has_faulting_topk)
