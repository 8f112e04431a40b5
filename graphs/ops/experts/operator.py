"""The operator ``graphs::expert_linear``: each row times the weight of its expert, which is read where it is.

``x [P, K]``, ``weights [E, N, K]`` of one 16-bit float dtype with any strides, ``experts [P]`` int32 or int64, from ``-E`` to
``E - 1`` as an index counts; the result ``[P, N]`` is ``x[p] @ weights[experts[p]].T``, sums in float32, rounded once. A row
whose expert is out of range is NaN on a GPU, and an IndexError on a CPU. Nothing writes this operator by hand:
`passes.expert_products` puts it into compiled steps, in place of a copy of every chosen weight.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from graphs.errors import WeightError
from graphs.ops.wo_a.operators import kernels, library

DTYPES = (torch.bfloat16, torch.float16)

library.define("expert_linear(Tensor x, Tensor weights, Tensor experts) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def check(x: Tensor, weights: Tensor, experts: Tensor) -> None:
    """Raise WeightError unless the operands fit together. Reads metadata only."""
    shapes = f"x has shape {tuple(x.shape)}, weights {tuple(weights.shape)}, experts {tuple(experts.shape)}"
    if (
        x.dim() != 2
        or weights.dim() != 3
        or experts.dim() != 1
        or x.shape[1] != weights.shape[2]
        or experts.shape[0] != x.shape[0]
    ):
        raise WeightError(f"expert_linear: {shapes}; legal are [P, K], [E, N, K] and [P]")
    if weights.dtype != x.dtype or experts.dtype not in (torch.int32, torch.int64):
        raise WeightError(
            f"expert_linear: weights are {weights.dtype} and experts {experts.dtype}; legal are {x.dtype} and int32 or int64"
        )
    if weights.shape[0] == 0:
        raise WeightError(f"expert_linear: {shapes}; legal is one expert or more")
    if weights.device != x.device or experts.device != x.device:
        raise WeightError(f"expert_linear: all operands must be on {x.device}, as x is")


def products(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """What the operator means; its implementation on a CPU."""
    check(x, weights, experts)
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(weights[experts], x.unsqueeze(-1)).squeeze(-1)


def _cuda(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    check(x, weights, experts)
    y = x.new_empty(x.shape[0], weights.shape[1])
    if x.dtype not in DTYPES:
        return products(x, weights, experts)
    if y.numel():
        with torch.cuda.device(x.device):
            expert_kernel().launch_experts(x.contiguous(), weights, experts.contiguous(), y)
    return y


def _fake(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    check(x, weights, experts)
    return x.new_empty(x.shape[0], weights.shape[1])


library.impl("expert_linear", products, "CPU")
library.impl("expert_linear", _cuda, "CUDA")
torch.library.register_fake("graphs::expert_linear", _fake, lib=library)


@functools.cache
def expert_kernel() -> ModuleType:
    """The Triton kernel, imported at first use. Raises MissingDependency where triton is absent."""
    kernels()
    from graphs.ops.experts import kernel as module

    return module
