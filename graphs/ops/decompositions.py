"""What the operators ``graphs::wo_a_*`` are made of, for compilers that know ATen only: their CPU implementations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from graphs.ops import wo_a

DECOMPOSITIONS: dict[OpOverload, Callable[..., Tensor]] = {
    getattr(torch.ops.graphs, name).default: cpu for name, (cpu, _, _) in wo_a.IMPLEMENTATIONS.items()
}
