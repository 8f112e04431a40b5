"""The recorder for CUDA and HIP, through ``torch.cuda.CUDAGraph``.

One pool and one recording stream per captured module. A capture neither synchronises the device nor empties the
allocator's cache; the garbage collector is paused, since a finaliser inside a capture can break it. All that a replay
does on the host is written in `CudaRecording.replay`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from graphs.contract.padding import Padding
from graphs.contract.slots import Contract, is_dense
from graphs.errors import CaptureFailed, Refusal
from graphs.objects.torch_fast_paths import empty_strided_cuda
from graphs.recording.copy_kernels import RING, AddressTable, Copier, Move, load_kernels
from graphs.recording.driver_calls import driver_calls
from graphs.recording.graph_nodes import GraphNodes, Memory
from graphs.recording.host_ring import HostRing
from graphs.recording.recorder import Body, CannotPoint, Storage
from graphs.recording.vendor import current_vendor
from graphs.state.tensor_state import TensorState
from passes.forked_process import put_back_by

Tensor = torch.Tensor
_raw_stream = torch._C._cuda_getCurrentRawStream
_current_device = torch._C._cuda_getDevice
_fast_empty = empty_strided_cuda  # what Inductor's wrappers call: half the time
_data_ptr, _is_contiguous = Tensor.data_ptr, Tensor.is_contiguous
_KEEP = Padding("keep")
LARGE = 1 << 26
"""Bytes above which an input is copied by a launch of its own, ahead of the graph: next to such a copy a launch is nothing,
and the units of an input below fit the 32-bit arithmetic of the copying kernel."""


class StreamOrder:
    """The stream that last replayed any recording of a module; they share a pool, so they must not overlap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.current_stream(device)
        self.raw = self.stream.cuda_stream

    def enter(self) -> None:
        """Make the current stream wait for the last one."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self.stream)
        self.stream, self.raw = stream, stream.cuda_stream


class CudaRecording:
    """A device graph with its slots, address table and output shapes."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        contract: Contract,
        table: AddressTable,
        outputs: list[Tensor],
        order: StreamOrder,
        buffers: list[Tensor],
        keep: tuple[object, ...],
        *,
        owned: bool,
    ) -> None:
        self.graph = graph
        self.contract = contract
        self.outputs: list[Tensor] | None = None if owned else outputs
        self.pool_bytes = 0
        self._replay = partial(torch._C._CUDAGraph.replay, graph)  # without the method that only calls it
        self.at: Sequence[Storage] | None = None
        self._nodes: GraphNodes | None = None
        self._produced = [out.data_ptr() for out in outputs]
        self._table = table
        self._order = order
        self._keep = (*keep, buffers)
        slots = list(zip(contract.slots, buffers, strict=True))
        moved = [slot for slot, buffer in slots if buffer.nbytes <= LARGE]
        self._sources = tuple(slot.index for slot in moved)
        self._gathered = [(position, slot) for position, slot in enumerate(moved) if not slot.like_its_source]
        self._large = [(slot, buffer) for slot, buffer in slots if buffer.nbytes > LARGE]
        self._written = [(slot, buffer) for slot, buffer in slots if slot.written]
        self._device = order.device
        self._index = order.device.index
        self._layouts = [(tuple(o.shape), o.stride(), o.dtype, dim) for o, dim in zip(outputs, contract.output_dims, strict=True)]
        self._layouts_at: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]] = {}
        self._owned = owned

    def replay(self, tensors: Sequence[Tensor], rows: int, journal: TensorState | None = None) -> list[Tensor]:
        """One graph launch, after a copy of each large input; see `graphs.recording.recorder.Recording`.

        Inputs may be freed as soon as this returns.
        """
        if _raw_stream(self._index) != self._order.raw:
            self._order.enter()
        sources = [tensors[index] for index in self._sources]
        if self._gathered and not all(map(_is_contiguous, sources)):
            for position, slot in self._gathered:  # the kernel copies dense memory
                sources[position] = slot.of_source(sources[position]).contiguous()
        row = [rows, *map(_data_ptr, sources)]
        for slot, buffer in self._large:
            slot.fill(buffer, tensors[slot.index])
        outputs = self._new_outputs(rows) if self.outputs is None else _sliced(self.outputs, self._layouts, rows)
        if self._owned:
            row += map(_data_ptr, outputs)
        table = self._table
        table.claim(row)
        self._replay()
        table.turn += 1
        for slot, buffer in self._written:
            slot.copy_back(buffer, tensors[slot.index])
        return outputs

    def _new_outputs(self, rows: int) -> list[Tensor]:
        layouts = self._layouts_at.get(rows)
        if layouts is None:
            layouts = self._layouts_at[rows] = [
                (shape, stride, dtype) if dim is None else (*_contiguous(shape, dim, rows), dtype)
                for shape, stride, dtype, dim in self._layouts
            ]
        if _fast_empty is not None and _current_device() == self._index:
            return [_fast_empty(shape, stride, dtype) for shape, stride, dtype in layouts]
        device = self._device
        return [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in layouts]

    def settle(self, storages: Sequence[Storage]) -> None:
        """Take note of the memory used in place, which the graph knows by address; see `graphs.recording.recorder.Recording`."""
        self.at = storages

    def point(self, recorded: Sequence[tuple[int, int]], storages: Sequence[Storage]) -> None:
        """Exchange addresses in the nodes of the graph; see `graphs.recording.recorder.Recording`.

        Replays that were launched before are not affected.
        """
        bases = [storage.data_ptr() for storage in storages]
        if self._nodes is None:
            if bases == [start for start, _ in recorded]:
                self.at = storages
                return
            self._nodes = self._find_nodes(recorded)
        self._nodes.point(bases)
        self.at = storages

    def let_go(self, recorded: Sequence[tuple[int, int]]) -> None:
        """Hold nothing of it; see `graphs.recording.recorder.Recording`."""
        self.at = None

    def _find_nodes(self, recorded: Sequence[tuple[int, int]]) -> GraphNodes:
        memory = Memory(recorded)
        if any(memory.find(address) is not None for address in self._produced):
            raise CannotPoint("an output is copied from memory that the step uses in place")
        try:
            graph, executable = self.graph.raw_cuda_graph(), self.graph.raw_cuda_graph_exec()
        except (RuntimeError, AttributeError) as error:
            raise CannotPoint(f"this torch does not show its graphs: {str(error).splitlines()[0]}") from error
        with torch.cuda.device(self._device):
            return GraphNodes(driver_calls(current_vendor()), graph, executable, recorded)

    def __del__(self) -> None:
        """Wait for replays in flight: they read the address table and the slots, which are freed with this object."""
        if getattr(self, "_table", None) is not None and self._table.turn and not torch.cuda.is_current_stream_capturing():
            self._order.stream.synchronize()


class StagingRecording(CudaRecording):
    """A recording some of whose arguments are host tensors, each brought to pinned memory before the launch."""

    def __init__(self, *arguments: Any, owned: bool) -> None:
        super().__init__(*arguments, owned=owned)
        self._ring = HostRing([slot for slot in self.contract.slots if slot.from_host], RING)

    def replay(self, tensors: Sequence[Tensor], rows: int, journal: TensorState | None = None) -> list[Tensor]:
        """One graph launch; see `CudaRecording.replay`."""
        if _raw_stream(self._index) != self._order.raw:
            self._order.enter()  # first: what marks the end of earlier replays has to come behind them
        turn = self._table.make_room()
        return super().replay(self._ring.stage(tensors, turn), rows)


def _contiguous(shape: tuple[int, ...], dim: int, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes = (*shape[:dim], rows, *shape[dim + 1 :])
    return sizes, torch.empty(sizes, device="meta").stride()


def _sliced(outputs: list[Tensor], layouts: Sequence[tuple[object, object, object, int | None]], rows: int) -> list[Tensor]:
    return [o if line[3] is None else o.narrow(line[3], 0, rows) for o, line in zip(outputs, layouts, strict=True)]


def _dense(tensor: Tensor, sliced: bool) -> Tensor:
    """``tensor``, or a contiguous copy where its memory has holes or overlaps (or has to be sliced by rows)."""
    if tensor.is_contiguous():
        return tensor
    return tensor if is_dense(tensor.shape, tensor.stride()) and not sliced else tensor.contiguous()


class CudaRecorder:
    """Records steps of one captured module on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        self.vendor = current_vendor()
        with torch.cuda.device(self.device):
            torch.cuda.mem_get_info(self.device)  # binds the device's context to a thread that has not used it yet
            self.stream = torch.cuda.ExternalStream(self.vendor.create_stream(), device=self.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.order = StreamOrder(self.device)
        self._keeper: torch.cuda.CUDAGraph | None = None
        self._primed: set[tuple[int, bool]] = set()

    def run(self, fn: Callable[[], object]) -> object:
        """Run ``fn`` on the recording stream, so that library handles and kernels are ready for it there.

        It allocates from the recorder's pool: what a library keeps for the stream has to live as long as the graphs.
        """
        with self._on_stream():
            self._prime()
            index = self.device.index
            torch._C._cuda_beginAllocateCurrentThreadToPool(index, self.pool)
            try:
                return fn()
            finally:
                torch._C._cuda_endAllocateToPool(index, self.pool)
                torch._C._cuda_releasePool(index, self.pool)

    def refuses(self, operator: str) -> str | None:
        """Why an operator cannot be recorded here; see `Vendor`."""
        return self.vendor.refuses(operator)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            yield
        outer.wait_stream(self.stream)

    def _prime(self, columns: int = 0, *, host: bool = False) -> None:
        """Make the pool and the copying kernels for ``columns`` addresses, ``host`` memory among them or not, ready.

        A module load on a capturing stream fails, so the kernels are launched once. A pool is gone for good when its
        last graph is (another capture into it is an internal error of torch), so a graph of one node keeps it.
        """
        table = AddressTable(columns, self.device)
        if (table.padded_width, host) not in self._primed:
            load_kernels(table, host=host)
            self.stream.synchronize()  # the table is about to be freed
            self._primed.add((table.padded_width, host))
        if self._keeper is None:
            self._keeper = torch.cuda.CUDAGraph()
            with _paused_collector(), self._capturing(self._keeper):
                table.current.zero_()

    def record(
        self,
        body: Body,
        contract: Contract,
        tensors: Sequence[Tensor],
        *,
        owned: bool,
        generators: Sequence[torch.Generator] = (),
    ) -> CudaRecording:
        """Record ``body``; nothing of it runs on the device. The caller restores what its Python changed.

        Raises:
            CaptureFailed: the driver refused. The stream, the pool and the allocator are usable afterwards.
        """
        before = torch.cuda.memory_reserved(self.device)
        with self._on_stream():
            buffers = contract.filled(tensors)
            host = any(slot.from_host for slot in contract.slots)
            table, inbound, outbound = self._copiers(contract, buffers, len(contract.output_dims) if owned else 0, host=host)
            graph = _new_graph()
            for generator in generators:
                graph.register_generator_state(generator)
            with _paused_collector(), torch.no_grad(), self._capturing(graph):
                inbound.launch()
                arranged = contract.arrange(buffers, tensors)
                produced = body(arranged)
                contract.settle(buffers, arranged)
                outputs = [_dense(o, dim is not None) for o, dim in zip(produced, contract.output_dims, strict=True)]
                outbound.bind(
                    [Move(o, dim, _KEEP) for o, dim in zip(outputs, contract.output_dims, strict=True)] if owned else []
                )
                outbound.launch()
            outbound.upload()
            _instantiate(graph)
        kind = StagingRecording if host else CudaRecording
        recording = kind(graph, contract, table, outputs, self.order, buffers, (inbound, outbound), owned=owned)
        recording.pool_bytes = max(torch.cuda.memory_reserved(self.device) - before, 0)
        return recording

    def _copiers(
        self, contract: Contract, buffers: Sequence[Tensor], results: int, *, host: bool
    ) -> tuple[AddressTable, Copier, Copier]:
        """The address table with the kernel that fills small slots, ready to launch, and the one that copies ``results`` out.

        Args:
            host: whether host memory is among what is copied in.
        """
        slots = zip(contract.slots, buffers, strict=True)
        moves = [Move(buffer, slot.batch_dim, slot.padding) for slot, buffer in slots if buffer.nbytes <= LARGE]
        self._prime(len(moves) + results, host=host)
        table = AddressTable(len(moves) + results, self.device)
        inbound = Copier(len(moves), table, 1, inbound=True, host=host)
        outbound = Copier(results, table, 1 + len(moves), inbound=False)
        inbound.bind(moves)
        inbound.upload()
        return table, inbound, outbound

    @contextlib.contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        graph.capture_begin(pool=self.pool, capture_error_mode=self.vendor.capture_error_mode)
        try:
            yield
            if self.vendor.poll_capture and not torch.cuda.is_current_stream_capturing():
                raise CaptureFailed("the device dropped the capture without an error")
            graph.capture_end()
        except BaseException as error:
            self._abandon(graph)
            if isinstance(error, Refusal) or not isinstance(error, Exception):
                raise
            raise CaptureFailed(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a broken capture, so that the stream, the pool, the allocators and the generators can be used again."""
        try:
            graph.capture_end()
        except RuntimeError:  # the driver dropped the capture; see begin_empty_capture
            self.vendor.begin_empty_capture(self.stream.cuda_stream)
            graph.capture_end()


def _new_graph() -> torch.cuda.CUDAGraph:
    """A graph that keeps its nodes, so that their parameters can be read and changed; from torch 2.8 on."""
    try:
        return torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:
        return torch.cuda.CUDAGraph()


def _instantiate(graph: torch.cuda.CUDAGraph) -> None:
    """Make a captured graph ready for replays, where the end of the capture did not.

    Raises:
        CaptureFailed: the driver refused.
    """
    if not hasattr(graph, "instantiate"):
        return
    try:
        graph.instantiate()
    except RuntimeError as error:
        raise CaptureFailed(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    with put_back_by(gc.enable) if gc.isenabled() else contextlib.nullcontext():
        gc.disable()
        yield
