"""Memory that recordings may take: what is free, and what the next size will need."""

from __future__ import annotations

from pathlib import Path

import torch

from graphs.contract.arguments import Call
from graphs.contract.batch import Dims
from graphs.errors import OverBudget
from graphs.first_call.recorded_step import RecordedStep

SHARE = 0.8
"""Of the free memory, what recordings take at most where no budget is given: the runs that precede a recording need some too."""
_MIB = 1 << 20


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses, in bytes; for a CPU, what the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if available else 1 << 63  # a system that does not say


def mib(size: float) -> str:
    """A number of bytes as text."""
    return f"{size / _MIB:.1f} MiB" if size >= _MIB / 10 else f"{size:.0f} bytes"


def copied_bytes(call: Call, dims: Dims) -> int:
    """Bytes that the recording of a call takes at least: each argument that has rows is copied into memory of its own."""
    return sum(tensor.nbytes for tensor, dim in zip(call.tensors, dims, strict=True) if dim is not None)


def needed_bytes(size: int, known: RecordedStep, known_size: int, *, first: bool) -> int:
    """An estimate of the bytes that the recording of ``size`` rows adds to that of more rows, made just before it.

    What a recording of a device holds for its intermediate results lies in the pool of the module, so that smaller ones use what
    the ``first`` one took: of that, only what the driver took beside the pool and the copies of arguments are needed again. What
    was measured of a later one holds for the next. The tape of a CPU has memory of its own, which grows with the rows.
    """
    if not known.on_device:
        return known.memory_bytes * size // known_size
    if not first:
        return known.memory_bytes
    return max(0, known.device_free_delta - known.recording.pool_bytes) + known.contract.nbytes * size // known_size


def over_budget(limit: int, needed: int, spent: int, what: str) -> OverBudget | None:
    """Why ``what``, which needs about so many bytes, is not recorded beside those that take ``spent``; None where it fits."""
    left = max(0, limit - spent)
    if needed <= left and spent < limit:
        return None
    return OverBudget(f"{what} needs about {mib(needed)}, and {mib(left)} are left of {mib(limit)}", operator="record")
