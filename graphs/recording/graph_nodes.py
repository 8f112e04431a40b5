"""The nodes of an instantiated device graph: where addresses stand in them, and how these are exchanged.

A kernel node holds the bytes of its parameters. The words in them (of eight bytes, as pointers are aligned) that are addresses
of given memory are found once; from then on only nodes with such words are touched. A word that happens to look like an address,
and an address that a library keeps elsewhere, cannot be told apart here: whoever exchanges addresses compares a replay with eager
before relying on it.
"""

from __future__ import annotations

import ctypes
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from graphs.recording.driver_calls import DriverCalls
from graphs.recording.recorder import CannotPoint

KERNEL, MEMCPY, MEMSET, EMPTY, WAIT, RECORD = 0, 1, 2, 5, 6, 7  # CUgraphNodeType, hipGraphNodeType
_HOLD_NO_ADDRESS = frozenset((EMPTY, WAIT, RECORD))
_WORD = 8
_BUFFER, _BUFFER_SIZE, _OPTIONS = 1, 2, 2  # CU_LAUNCH_PARAM_BUFFER_POINTER and _SIZE, by HIP's names likewise


class Memory:
    """Ranges of addresses, by number.

    Args:
        ranges: first address and bytes of each, apart from each other.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._order = sorted((start, start + size, number) for number, (start, size) in enumerate(ranges) if size)
        self._starts = [start for start, _, _ in self._order]
        self.first = self._order[0][0] if self._order else 0
        self.last = self._order[-1][1] if self._order else 0

    def find(self, address: int) -> tuple[int, int] | None:
        """The number of the range that an address lies in, and its offset there."""
        if not self.first <= address < self.last:
            return None
        start, end, number = self._order[bisect_right(self._starts, address) - 1]
        return (number, address - start) if address < end else None


@dataclass(frozen=True)
class Word:
    """An address in the parameters of a node.

    Attributes:
        position: in bytes.
        place, offset: the number of the memory, and bytes from its begin.
    """

    position: int
    place: int
    offset: int


def words_in(content: bytes, starts: Iterable[tuple[int, int]], memory: Memory) -> list[Word]:
    """The words that are addresses.

    Args:
        starts: position and size of each parameter. A structure is looked at word by word from its begin.
    """
    found = []
    for start, size in starts:
        for index, value in enumerate(struct.unpack_from(f"<{size // _WORD}Q", content, start)):
            at = memory.find(value) if value >= memory.first else None
            if at is not None:
                found.append(Word(start + index * _WORD, *at))
    return found


class _Node(Protocol):
    words: list[Word]

    def set(self, calls: DriverCalls, executable: int) -> None:
        """Give the instantiated graph the parameters as they are here now."""
        ...


class _Parameters:
    """The parameters of one node, in memory of our own."""

    def __init__(self, handle: int, structure: Any, content: Any, words: list[Word], *held: Any) -> None:
        self.handle, self.structure, self.content, self.words = handle, structure, content, words
        self._held = held

    def write(self, bases: Sequence[int]) -> None:
        """Make the words addresses of memory that begins at ``bases``."""
        for word in self.words:
            struct.pack_into("<Q", self.content, word.position, bases[word.place] + word.offset)


class KernelNode(_Parameters):
    """A kernel launch. The structure points into the content, parameter by parameter."""

    def set(self, calls: DriverCalls, executable: int) -> None:
        """See `_Node`."""
        calls.set_kernel(executable, self.handle, self.structure)


class CopyNode(_Parameters):
    """A copy; the content is the structure."""

    def set(self, calls: DriverCalls, executable: int) -> None:
        """See `_Node`."""
        calls.set_copy(executable, self.handle, self.structure)


class FillNode(_Parameters):
    """A fill; the content is the structure."""

    def set(self, calls: DriverCalls, executable: int) -> None:
        """See `_Node`."""
        calls.set_fill(executable, self.handle, self.structure)


class GraphNodes:
    """The nodes of one instantiated graph that hold addresses of some memory.

    Args:
        calls: of the driver.
        graph, executable: handles of the graph as it was captured and as it was instantiated; they have to outlive this.
        recorded: first address and bytes of the memory when the graph was captured.

    Raises:
        CannotPoint: there is a node whose parameters cannot be read.
    """

    def __init__(self, calls: DriverCalls, graph: int, executable: int, recorded: Sequence[tuple[int, int]]) -> None:
        self._calls, self._executable = calls, executable
        self._at = [start for start, _ in recorded]
        memory = Memory(recorded)
        nodes = [_read(calls, handle, memory) for handle in calls.nodes(graph)]
        self._nodes = [node for node in nodes if node is not None]
        self.found = frozenset(word.place for node in self._nodes for word in node.words)
        """Numbers of the memory that some node holds an address of."""

    def point(self, bases: Sequence[int]) -> int:
        """Make the memory begin at ``bases``; returns how many nodes were changed.

        Raises:
            CannotPoint: memory moved that no node holds an address of, or the driver refused. Some nodes may be changed.
        """
        moved = {place for place, (old, new) in enumerate(zip(self._at, bases, strict=True)) if old != new}
        if moved - self.found:
            raise CannotPoint(f"the address of {len(moved - self.found)} tensors that moved is in no node of the graph")
        touched = [node for node in self._nodes if any(word.place in moved for word in node.words)]
        for node in touched:
            node.write(bases)
            node.set(self._calls, self._executable)
        self._at = list(bases)
        return len(touched)


def _read(calls: DriverCalls, handle: int, memory: Memory) -> Any:
    """A node that holds addresses; None for one that does not."""
    kind = calls.kind(handle)
    if kind == KERNEL:
        return _kernel(calls, handle, memory)
    if kind in (MEMCPY, MEMSET):
        structure = calls.copy(handle) if kind == MEMCPY else calls.fill(handle)
        content = (ctypes.c_char * ctypes.sizeof(structure)).from_buffer(structure)
        words = words_in(content.raw, [(0, len(content))], memory)
        made: Any = CopyNode if kind == MEMCPY else FillNode
        return made(handle, structure, content, words) if words else None
    if kind not in _HOLD_NO_ADDRESS:
        raise CannotPoint(f"the graph holds a node of kind {kind}, which cannot be read")
    return None


def _kernel(calls: DriverCalls, handle: int, memory: Memory) -> KernelNode | None:
    structure = calls.kernel(handle)
    sizes = calls.parameters(structure)
    total = max((offset + size for offset, size in sizes), default=0)
    content = ctypes.create_string_buffer(total)
    if structure.kernelParams:
        sources = ctypes.cast(structure.kernelParams, ctypes.POINTER(ctypes.c_void_p))
        for index, (offset, size) in enumerate(sizes):
            ctypes.memmove(ctypes.addressof(content) + offset, sources[index], size)
    elif sizes:
        _copy_buffer(structure.extra, content)
        structure.extra = None  # from now on each parameter is pointed to
    words = words_in(content.raw, sizes, memory)
    if not words:
        return None
    pointers = (ctypes.c_void_p * len(sizes))(*(ctypes.addressof(content) + offset for offset, _ in sizes))
    structure.kernelParams = ctypes.addressof(pointers)
    return KernelNode(handle, structure, content, words, pointers)


def _copy_buffer(extra: int | None, content: ctypes.Array[ctypes.c_char]) -> None:
    """Copy the parameters of a kernel that was launched with all of them in one buffer, as libraries of products do."""
    options = ctypes.cast(extra, ctypes.POINTER(ctypes.c_void_p)) if extra else ()
    given: dict[int, int] = {}
    for index in range(0, 2 * _OPTIONS, 2):
        option = options[index] if options else None
        if option not in (_BUFFER, _BUFFER_SIZE):
            break
        given[option] = options[index + 1] or 0
    size = ctypes.c_size_t.from_address(given[_BUFFER_SIZE]).value if given.get(_BUFFER_SIZE) else 0
    if not given.get(_BUFFER) or size < len(content):
        raise CannotPoint("a kernel of the graph does not tell its parameters")
    ctypes.memmove(content, given[_BUFFER], len(content))
