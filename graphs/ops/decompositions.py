"""What this project's operators are made of, for compilers that know ATen only: their CPU implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from graphs.ops.attention import operator as attention
from graphs.ops.experts import operator as experts
from graphs.ops.mhc import operator as mhc
from graphs.ops.skinny import operator
from graphs.ops.wo_a import operators

_IMPLEMENTATIONS = operators.IMPLEMENTATIONS | mhc.IMPLEMENTATIONS
DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {
    getattr(torch.ops.graphs, name).default: cpu for name, (cpu, _, _) in _IMPLEMENTATIONS.items()
} | {
    torch.ops.graphs.skinny_linear.default: operator.products,
    torch.ops.graphs.expert_linear.default: experts.products,
    torch.ops.graphs.one_query_attention.default: attention.attend,
}
