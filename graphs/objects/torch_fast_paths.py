"""Private interfaces of torch that only save time: the one file that probes them.

Where a torch has one of them no more, its value here is None (or what does the same more slowly), and what is slower then stands
in `SAVES`. A test says which are missing in the torch that is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_GUARDS = getattr(getattr(torch._C, "_dynamo", None), "guards", None)

tensor_guards: Any = getattr(_GUARDS, "TensorGuards", None)
dict_version: Callable[[dict[Any, Any]], int] | None = getattr(_GUARDS, "dict_version", None)
empty_strided_cuda: Callable[..., Any] | None = getattr(_GUARDS, "_empty_strided_cuda", None)
equal_addresses: Callable[..., Any] | None = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
increment_version: Callable[[Any], None] = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)


class _AsksForProfiler:
    """Stands for ``torch.autograd.profiler`` where that keeps no flag."""

    @property
    def _is_profiler_enabled(self) -> bool:
        return bool(torch._C._autograd._profiler_enabled())


profiler: Any = torch.autograd.profiler if hasattr(torch.autograd.profiler, "_is_profiler_enabled") else _AsksForProfiler()

SAVES: dict[str, tuple[str, bool]] = {
    "torch._C._dynamo.guards.TensorGuards": ("recognising a call like the last one in one call of C++", False),
    "torch._C._dynamo.guards.dict_version": ("seeing writes to dictionaries without going through them", False),
    "torch._C._dynamo.guards._empty_strided_cuda": ("half the time of making an output tensor", True),
    "torch._C._tensors_data_ptrs_at_indices_equal": ("comparing 200 addresses in 1 us", True),
    "torch._C._increment_version": ("telling autograd of several writes at once", False),
    "torch._C._cuda_isCurrentStreamCapturing": ("asking whether the current stream is being recorded", True),
    "torch.autograd.profiler._is_profiler_enabled": ("knowing whether a profiler runs without asking C++", False),
}
"""By interface, what it saves, and whether only builds for a GPU have it."""
