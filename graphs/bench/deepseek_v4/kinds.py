"""What a step consists of: its kernels by kind, or on a CPU its operators."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from passes.core.composites import DispatchMode

KINDS: tuple[tuple[str, str], ...] = (
    ("mhc", r"mhc_"),
    ("experts", r"expert_linear|grouped_mm|group_gemm|GroupProblem"),
    ("attention", r"attend_part|join_parts|one_query_attention|flash|fmha|scaled_dot_product|cudnn.*sdpa"),
    ("products", r"gemm|gemv|cutlass|nvjet|cublas|splitK|skinny_linear|\b(mm|bmm|addmm|baddbmm|matmul|linear|wo_a\w*)\b"),
    ("sums", r"reduce|softmax|triton_(red|per)_|norm|topk|sort|scan|\b(sum|mean|amax|max|cumsum|logsumexp|var_mean)\b"),
    ("copies", r"copy|memcpy|memset|clone|index|gather|scatter|cat|fill|embedding|arange"),
    ("pointwise", r""),
)
"""Name of a kind, and what is looked for in the names of kernels and operators; the first that is found counts."""


def kind_of(name: str) -> str:
    """The kind of a kernel, or of an operator."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def by_kind(counts: Mapping[str, int]) -> dict[str, int]:
    """How many there are of each kind, all kinds in their order."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        found[kind_of(name)] += count
    return {kind: found[kind] for kind, _ in KINDS}


def kernels_of(call: Callable[[], Any], device: torch.device) -> Counter[str]:
    """How often each kernel runs in a call; on a CPU, how often each operator is dispatched."""
    if device.type != "cuda":
        with _Operators() as seen:
            call()
        return seen.counts
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize(device)
    on_device = [event for event in profile.key_averages() if str(event.device_type).endswith("CUDA")]
    return Counter({event.key: event.count for event in on_device})


class _Operators(DispatchMode):
    """Counts operators by name."""

    graphs_observer = True

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not getattr(func, "is_view", False):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))
