"""Addresses in the nodes of a graph: found among parameters of all kinds, and exchanged; with a driver that is made up."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from graphs.recording.driver_calls import CudaCopy, CudaFill, CudaKernel
from graphs.recording.graph_nodes import KERNEL, MEMCPY, MEMSET, GraphNodes, Memory, Word, words_in
from graphs.recording.recorder import CannotPoint

CACHE, WEIGHT = (0x7F0000000000, 4096), (0x7F0000010000, 256)
FUNCTION = 7


class Driver:
    """Nodes by their handles: a list of the bytes of each parameter for a kernel, a structure for what else there is."""

    def __init__(self, *nodes: Any, refuses: int | None = None) -> None:
        self._nodes, self._refuses = dict(enumerate(nodes, 1)), refuses
        self._held: list[Any] = []
        self.set: dict[int, Any] = {}

    def nodes(self, graph: int) -> list[int]:
        return list(self._nodes)

    def kind(self, node: int) -> int:
        found = self._nodes[node]
        if isinstance(found, int):
            return found
        return KERNEL if isinstance(found, list) else MEMCPY if isinstance(found, CudaCopy) else MEMSET

    def kernel(self, node: int) -> Any:
        parts = [ctypes.create_string_buffer(part, len(part)) for part in self._nodes[node]]
        pointers = (ctypes.c_void_p * len(parts))(*map(ctypes.addressof, parts))
        self._held += [parts, pointers]
        structure = CudaKernel(func=FUNCTION, gridDimX=3, kernelParams=ctypes.addressof(pointers))
        self._sizes = list(map(len, self._nodes[node]))
        return structure

    def parameters(self, kernel: Any) -> list[tuple[int, int]]:
        offsets = [sum(-(-size // 8) * 8 for size in self._sizes[:index]) for index in range(len(self._sizes))]
        return list(zip(offsets, self._sizes, strict=True))

    def copy(self, node: int) -> Any:
        return self._nodes[node]

    fill = copy

    def set_kernel(self, executable: int, node: int, structure: Any) -> None:
        if node == self._refuses:
            raise CannotPoint("the driver refused")
        assert (structure.func, structure.gridDimX) == (FUNCTION, 3)
        sources = ctypes.cast(structure.kernelParams, ctypes.POINTER(ctypes.c_void_p))
        sizes = map(len, self._nodes[node])
        self.set[node] = [ctypes.string_at(sources[index] or 0, size) for index, size in enumerate(sizes)]

    def set_copy(self, executable: int, node: int, structure: Any) -> None:
        self.set[node] = (structure.srcDevice, structure.dstDevice, structure.WidthInBytes)

    def set_fill(self, executable: int, node: int, structure: Any) -> None:
        self.set[node] = (structure.dst, structure.value)


def pointer(address: int) -> bytes:
    return struct.pack("<Q", address)


def made(*nodes: Any, **options: Any) -> tuple[GraphNodes, Driver]:
    driver = Driver(*nodes, **options)
    return GraphNodes(driver, 1, 2, [CACHE, WEIGHT]), driver  # type: ignore[arg-type]


def test_memory_is_found_from_its_first_byte_to_its_last() -> None:
    memory = Memory([WEIGHT, CACHE])
    assert memory.find(CACHE[0]) == (1, 0) and memory.find(CACHE[0] + 4095) == (1, 4095)
    assert memory.find(WEIGHT[0] + 8) == (0, 8)
    outside = (0, CACHE[0] - 1, CACHE[0] + 4096, WEIGHT[0] - 1, WEIGHT[0] + 256, 1 << 63)
    assert [memory.find(address) for address in outside] == [None] * 6
    assert Memory([]).find(1) is None


def test_words_are_found_in_structures_and_counted_from_the_begin_of_each_parameter() -> None:
    content = bytes(4) + bytes(4) + pointer(5) + pointer(CACHE[0] + 66) + pointer(WEIGHT[0])[:4]
    assert words_in(content, [(0, 4), (8, 20)], Memory([CACHE, WEIGHT])) == [Word(16, 0, 66)]


def test_only_nodes_with_an_address_that_moved_are_changed_and_nothing_else_in_them() -> None:
    struct_with_both = struct.pack("<iiQQd", 1, 2, WEIGHT[0] + 16, CACHE[0] + 130, 0.5)
    nodes, driver = made([pointer(12345)], [struct.pack("<i", 3), struct_with_both], [pointer(WEIGHT[0])])
    assert nodes.found == {0, 1}
    assert nodes.point([CACHE[0], WEIGHT[0]]) == 0 and not driver.set
    assert nodes.point([0x5000, WEIGHT[0]]) == 1
    assert driver.set == {2: [struct.pack("<i", 3), struct.pack("<iiQQd", 1, 2, WEIGHT[0] + 16, 0x5000 + 130, 0.5)]}
    driver.set.clear()
    assert nodes.point([0x5000, 0x9000]) == 2
    assert driver.set[2][1] == struct.pack("<iiQQd", 1, 2, 0x9000 + 16, 0x5000 + 130, 0.5)
    assert driver.set[3] == [pointer(0x9000)]
    driver.set.clear()
    assert nodes.point([CACHE[0], WEIGHT[0]]) == 2, "back to where it was recorded"
    assert driver.set[2][1] == struct_with_both


def test_a_word_of_memory_that_was_recorded_is_not_taken_for_another_that_lies_there_now() -> None:
    nodes, driver = made([pointer(CACHE[0]), pointer(WEIGHT[0])])
    nodes.point([WEIGHT[0], CACHE[0]])  # each where the other was
    nodes.point([WEIGHT[0], 0x9000])
    assert driver.set[1] == [pointer(WEIGHT[0]), pointer(0x9000)]


def test_copies_and_fills_are_changed_at_both_ends() -> None:
    copy = CudaCopy(srcDevice=CACHE[0] + 64, dstDevice=99, WidthInBytes=32)
    nodes, driver = made(copy, CudaFill(dst=CACHE[0] + 8, value=1, elementSize=4), CudaFill(dst=12, value=2))
    nodes.point([0x5000, WEIGHT[0]])
    assert driver.set == {1: (0x5040, 99, 32), 2: (0x5008, 1)}


def test_memory_that_moved_and_is_in_no_node_is_named() -> None:
    nodes, driver = made([pointer(CACHE[0])])
    with pytest.raises(CannotPoint, match="1 tensors that moved is in no node"):
        nodes.point([CACHE[0], 0x9000])
    assert not driver.set


@pytest.mark.parametrize("kind", [3, 4, 10, 13])
def test_a_node_that_cannot_be_read_is_no_recording_to_point(kind: int) -> None:
    with pytest.raises(CannotPoint, match=f"kind {kind}"):
        made([pointer(CACHE[0])], kind)


def test_nodes_without_parameters_are_passed_over() -> None:
    assert made(5, 6, 7, [])[0].found == frozenset()


class Buffered(Driver):
    """Kernels that were launched with their parameters in one buffer of ``size`` bytes."""

    def __init__(self, *nodes: Any, size: int, end: int = 0) -> None:
        super().__init__(*nodes)
        self._size, self._end = size, end

    def kernel(self, node: int) -> Any:
        structure = super().kernel(node)
        buffer = ctypes.create_string_buffer(64)
        for (offset, size), part in zip(self.parameters(structure), self._nodes[node], strict=True):
            ctypes.memmove(ctypes.addressof(buffer) + offset, part, size)
        size = ctypes.c_size_t(self._size)
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), self._end)
        self._held += [buffer, size, extra]
        structure.kernelParams, structure.extra = None, ctypes.addressof(extra) if self._size else None
        return structure


@pytest.mark.parametrize("end", [0, 3], ids=["CUDA", "HIP"])
def test_parameters_in_one_buffer_are_read_by_their_offsets(end: int) -> None:
    parts = [struct.pack("<i", 3), struct.pack("<QQ", 7, CACHE[0] + 130), pointer(WEIGHT[0])]
    driver = Buffered(parts, size=32, end=end)
    nodes = GraphNodes(driver, 1, 2, [CACHE, WEIGHT])  # type: ignore[arg-type]
    assert nodes.point([0x5000, WEIGHT[0]]) == 1
    assert driver.set[1] == [parts[0], struct.pack("<QQ", 7, 0x5000 + 130), parts[2]]


@pytest.mark.parametrize("size", [0, 16])
def test_parameters_that_are_not_told_are_not_guessed(size: int) -> None:
    with pytest.raises(CannotPoint, match="does not tell"):
        GraphNodes(Buffered([bytes(16), pointer(CACHE[0])], size=size), 1, 2, [CACHE])  # type: ignore[arg-type]


def test_what_the_driver_refuses_is_told() -> None:
    nodes, _ = made([pointer(CACHE[0])], [pointer(CACHE[0])], refuses=2)
    with pytest.raises(CannotPoint, match="refused"):
        nodes.point([0x5000, WEIGHT[0]])


def test_structures_have_the_sizes_of_the_driver_s() -> None:
    sizes = SimpleNamespace(kernel=ctypes.sizeof(CudaKernel), copy=ctypes.sizeof(CudaCopy), fill=ctypes.sizeof(CudaFill))
    assert (sizes.kernel, sizes.copy, sizes.fill) == (72, 200, 40)
